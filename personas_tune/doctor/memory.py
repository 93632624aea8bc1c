"""Whether training and evaluating an experiment fit a device, and which knob to turn if not."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from personas_tune.doctor.changes import first_that_fits, gpus_to_spread_over
from personas_tune.doctor.estimates import Estimate
from personas_tune.doctor.findings import Finding, State
from personas_tune.doctor.knobs import Knobs, most_adapters, trained_sets_of
from personas_tune.doctor.machine import GB, Device
from personas_tune.training.memory_estimate import CUDA_BYTES, Memory

if TYPE_CHECKING:
    from omegaconf import DictConfig

COMMON_GPUS_GB = (16, 24, 40, 80)


def check_memory(
    cfg: "DictConfig", name: str | None, knobs: Knobs, source: str, devices: Sequence[Device]
) -> Iterator[Finding]:
    """How much training and evaluating on a base take, and whether that fits.

    Args:
        cfg: The experiment.
        name: Of the base; None for the default one.
        knobs: The base's.
        source: Where the length of its rows comes from.
        devices: What it may run on; empty for GPUs of common sizes.
    """
    trained = trained_sets_of(cfg, name)
    if trained:
        told = f"rows of {knobs.n_tokens} tokens ({source}), batch_size {knobs.batch_size}"
        of_training = replace(knobs, n_adapters=most_adapters(cfg, trained))
        yield from _verdicts(Estimate.of_training(cfg), of_training, devices, told)
    if any(base_of(cfg, agent) == name for agent in cfg.agents.values()):
        yield from _verdicts(Estimate.of_evaluation(), knobs, devices, f"{knobs.max_tokens} tokens a pass")


def base_of(cfg: "DictConfig", agent: Any) -> str | None:
    """The base of an agent: its own, or that of its adapter set."""
    name = agent.base if agent.adapters is None else cfg.adapter_sets[agent.adapters].base
    return None if name is None else str(name)


def _verdicts(estimate: Estimate, knobs: Knobs, devices: Sequence[Device], told: str) -> Iterator[Finding]:
    memory, stage = estimate.memory(knobs), estimate.stage
    yield Finding("ok", f"{stage}: {_told(memory, knobs.on_gpu)}; {told}, {knobs.n_adapters} adapters")
    # A GPU that isn't here is not missed: the sizes are there to choose one.
    rooms = devices or [Device(f"a GPU of {size} GB", size * GB, True) for size in COMMON_GPUS_GB]
    fitting = [room for room in rooms if memory.total <= _allowed(room)]
    for room in rooms:
        if room not in fitting:
            state: State = "missing" if devices else "note"
            yield Finding(state, f"{stage} does not fit {_named(room)}", _what_fits(estimate, knobs, room))
    if fitting:
        larger = "" if devices or len(fitting) == 1 else " and larger ones"
        yield Finding("ok", f"{stage} fits {_named(fitting[0])}{larger}")


def _allowed(room: Device) -> float:
    return room.free - (CUDA_BYTES if room.is_gpu else 0)


def _named(room: Device) -> str:
    return room.name if room.name.startswith("a GPU of ") else f"{room.name}, {_size(room.free)} free"


def _told(memory: Memory, is_gpu: bool) -> str:
    parts = {
        "base": memory.base,
        "adapters": memory.adapters,
        "optimizer": memory.optimizer,
        "working copy": memory.working,
        "passes": memory.passes,
        "CUDA itself": CUDA_BYTES if is_gpu else 0,
    }
    total = memory.total + parts["CUDA itself"]
    return f"{_size(total)} = " + " + ".join(f"{name} {_size(size)}" for name, size in parts.items() if size)


def _size(n_bytes: float) -> str:
    if n_bytes < GB / 10:
        return f"{n_bytes / 1e6:.1f} MB"
    return f"{n_bytes / GB:.{1 if n_bytes >= 10 * GB else 2}f} GB"


def _what_fits(estimate: Estimate, knobs: Knobs, room: Device) -> str:
    """The first change with which the estimate fits."""
    change = first_that_fits(estimate, knobs, _allowed(room))
    if change is not None:
        setting, changed = change
        return f"set {setting}: {_size(estimate.memory(changed).total + (CUDA_BYTES if room.is_gpu else 0))}"
    n = gpus_to_spread_over(estimate.memory(knobs), knobs, _allowed(room)) if knobs.on_gpu else None
    if n is not None:
        return f"spread the base over {n} GPUs: tune run --nproc_per_node {n} ... parallel=fsdp"
    return "take a smaller base"
