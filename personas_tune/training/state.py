"""All that a training is made of at one moment, as tensors and plain JSON values; nothing is pickled."""

import importlib
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import astuple
from typing import Any

import numpy as np
import torch
from torch import Tensor

from personas_tune.adapters.bank import AdapterBank
from personas_tune.training.fit import AdapterJob, StepFigures
from personas_tune.training.schedule import move_training_state

# Packages whose tensor types (states of 8-bit and 4-bit optimizers) may be made again from a file.
_TENSOR_PACKAGES = ("torchao",)


def job_state(bank: AdapterBank, job: AdapterJob) -> dict[str, Any]:
    """Everything that the rest of an adapter's training depends on, and the figures of its steps so far."""
    adapter = bank[job.name]
    return {
        "weights": {name: weight.detach() for name, weight in adapter.masters.items()},
        "rng": adapter.rng,
        "optimizer": job.optimizer.state_dict(),
        "lr_scheduler": None if job.lr_scheduler is None else job.lr_scheduler.state_dict(),
        "steps_done": job.steps_done,
        "history": [list(astuple(figures)) for figures in job.history],
    }


def restore_job(bank: AdapterBank, job: AdapterJob, state: Mapping[str, Any], *, leads: bool = True) -> None:
    """Put a job and its adapter into the state that :func:`job_state` gave.

    Args:
        bank: Holds the adapter.
        job: Its job.
        state: From :func:`job_state`.
        leads: Whether this process takes the optimizer's steps; if another one does, it needs no optimizer state.
    """
    adapter = bank[job.name]
    waits_on = next(iter(adapter.masters.values())).device
    # An optimizer puts its state where the weights lie, and counts of steps stay there.
    move_training_state(adapter.masters.values(), job.optimizer, bank.device)
    with torch.no_grad():
        for name, weight in adapter.masters.items():
            weight.copy_(state["weights"][name])
    adapter.rng = dict(state["rng"])
    if leads:
        _load_optimizer(job, state["optimizer"])
    if leads and job.lr_scheduler is not None:
        job.lr_scheduler.load_state_dict(state["lr_scheduler"])
    job.steps_done = state["steps_done"]
    job.history = [StepFigures(*figures) for figures in state["history"]]
    move_training_state(adapter.masters.values(), job.optimizer, waits_on)


def _load_optimizer(job: AdapterJob, saved: dict[str, Any]) -> None:
    job.optimizer.load_state_dict(saved)
    parameters = [parameter for group in job.optimizer.param_groups for parameter in group["params"]]
    for index, values in saved["state"].items():
        loaded = job.optimizer.state[parameters[index]]
        for name, value in values.items():
            if isinstance(value, Tensor) and loaded[name].dtype != value.dtype:  # torch casts to the weight's dtype
                loaded[name] = value.to(loaded[name].device)


def process_state() -> dict[str, Any]:
    """The random generators of this process, which adapters don't draw from while they train."""
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    states = {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_process(state: Mapping[str, Any]) -> None:
    """Put this process's random generators into the state that :func:`process_state` gave."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def flatten_state(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A state as a JSON value that names its tensors.

    Args:
        value: Dicts (with keys of any plain kind), lists, tuples and counters of tensors, numbers, text and None.
        name: Of the value, the beginning of its tensors' names.
        tensors: Gets copies of the tensors, on the CPU.

    Raises:
        TypeError: For anything else, with its name.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        return _flatten_tensor(value, name, tensors)
    if isinstance(value, list | tuple):
        entries = [flatten_state(entry, f"{name}/{index}", tensors) for index, entry in enumerate(value)]
        return entries if isinstance(value, list) else {"tuple": entries}
    if isinstance(value, dict):
        pairs = [[key, flatten_state(entry, f"{name}/{key}", tensors)] for key, entry in value.items()]
        if all(isinstance(key, str | int) for key in value):
            return {"counter" if isinstance(value, Counter) else "dict": pairs}
    raise TypeError(f"{name} is a {type(value).__name__}")


def unflatten_state(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The state that :func:`flatten_state` took apart."""
    if isinstance(value, list):
        return [unflatten_state(entry, tensors) for entry in value]
    if not isinstance(value, dict):
        return value
    kind, content = next(iter(value.items()))
    if kind == "tensor":
        return tensors[content]
    if kind == "made_of":
        parts = {name: unflatten_state(part, tensors) for name, part in content.items()}
        about = unflatten_state(value["about"], tensors)
        return _tensor_type(value["type"]).__tensor_unflatten__(parts, about, None, None)
    if kind == "tuple":
        return tuple(unflatten_state(entry, tensors) for entry in content)
    pairs = {key: unflatten_state(entry, tensors) for key, entry in content}
    return Counter(pairs) if kind == "counter" else pairs


def _flatten_tensor(value: Tensor, name: str, tensors: dict[str, Tensor]) -> Any:
    if not hasattr(value, "__tensor_flatten__"):
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    parts, about = value.__tensor_flatten__()
    return {
        "made_of": {part: _flatten_tensor(getattr(value, part), f"{name}/{part}", tensors) for part in parts},
        "about": flatten_state(about, name, tensors),
        "type": f"{type(value).__module__}.{type(value).__qualname__}",
    }


def _tensor_type(path: str) -> Any:
    module, _, name = path.rpartition(".")
    if module.partition(".")[0] not in _TENSOR_PACKAGES:
        raise TypeError(f"{path} is no known tensor type")
    return getattr(importlib.import_module(module), name)
