"""K adapters on one base model.

The model's own adapter parameters keep their identity and hold the working copy of the adapter
that is in use; the bank keeps every adapter's fp32 master weights and its random stream. So
optimizers, ``torch.compile`` and sharding never see a parameter replaced, and training a bank
equals training each of its adapters alone.
"""

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torchtune.modules.peft import DoRALinear, LoRALinear, get_adapter_params, set_trainable_params

from personas_tune.errors import AdapterError


@dataclass
class Adapter:
    """One adapter's master weights and random stream.

    Args:
        name: Its name within the bank, such as ``persona/0``.
        masters: fp32 weights by torchtune parameter name. They keep their identity, and may wait in CPU memory.
        rng: Random state of its dropout: CPU, and the accelerator's where there is one.
    """

    name: str
    masters: dict[str, nn.Parameter]
    rng: dict[str, Tensor] = field(repr=False)

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of the weights on the CPU, fp32."""
        return {name: weight.detach().cpu().clone() for name, weight in self.masters.items()}


class AdapterBank:
    """The adapters of one base model, one of them in use at a time.

    The base's weights are frozen; its adapter parameters are what torchtune's LoRA builders put in.

    Args:
        model: A torchtune model with LoRA or DoRA modules, base weights loaded.

    Raises:
        AdapterError: If the model has no adapter parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        self._working: dict[str, nn.Parameter] = get_adapter_params(model)
        if not self._working:
            raise AdapterError("the model has no adapter parameters", where="model", remedy="use a lora_* builder")
        set_trainable_params(model, self._working)
        self._model = model
        self._adapters: dict[str, Adapter] = {}
        self._in_use: str | None = None

    @property
    def names(self) -> list[str]:
        """The adapters' names, in the order they were added."""
        return list(self._adapters)

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next(iter(self._working.values())).device

    @property
    def n_parameters(self) -> int:
        """Number of weights of one adapter."""
        return sum(weight.numel() for weight in self._working.values())

    def __getitem__(self, name: str) -> Adapter:
        if name not in self._adapters:
            known = ", ".join(self._adapters) or "none"
            raise AdapterError(f"no adapter {name!r} in the bank", remedy=f"it holds {known}")
        return self._adapters[name]

    def add_new(self, name: str, seed: int, *, stream: int = 0) -> Adapter:
        """Add an adapter with fresh weights, drawn as the model's own modules draw them.

        Weights and dropout depend on ``seed`` and ``name`` only, not on the adapters added before.

        Args:
            name: Its name in the bank.
            seed: The experiment's seed.
            stream: Processes that share an adapter's rows have the same weights, and each a dropout of its own.
        """
        with _forked_rng(self.device, stable_seed(seed, name)):
            for module in self._model.modules():
                if isinstance(module, LoRALinear | DoRALinear):
                    module.initialize_parameters()
                if isinstance(module, DoRALinear):
                    module.initialize_dora_magnitude()
            if stream:
                torch.manual_seed(stable_seed(seed, name, f"stream {stream}"))
            rng = _rng_state(self.device)
        weights = {name: weight.detach() for name, weight in self._working.items()}
        return self._add(name, weights, rng)

    def add_loaded(self, name: str, weights: Mapping[str, Tensor], *, where: str) -> Adapter:
        """Add an adapter with given weights.

        Args:
            name: Its name in the bank.
            weights: By torchtune parameter name.
            where: The file they come from, for the error.

        Raises:
            AdapterError: If names or shapes don't fit the model, or a weight isn't finite.
        """
        self._require_fitting(weights, where)
        return self._add(name, weights, _rng_state(self.device))

    def start_from(self, name: str, weights: Mapping[str, Tensor], *, where: str) -> None:
        """Let an adapter begin with given weights in the place of fresh ones; arguments and errors as above."""
        self._require_fitting(weights, where)
        with torch.no_grad():
            for key, master in self[name].masters.items():
                master.copy_(weights[key])

    def _require_fitting(self, weights: Mapping[str, Tensor], where: str) -> None:
        expected = {key: tuple(weight.shape) for key, weight in self._working.items()}
        found = {key: tuple(weight.shape) for key, weight in weights.items()}
        if expected != found:
            raise AdapterError(
                f"adapter does not fit the model ({_first_difference(expected, found)})",
                where=where,
                remedy="use the model section that it was trained with, or train it again",
            )
        broken = next((key for key, weight in weights.items() if not torch.isfinite(weight).all()), None)
        if broken is not None:
            raise AdapterError(f"weight {broken} is not finite", where=where, remedy="train the adapter again")

    def remove(self, name: str) -> None:
        """Forget an adapter, to make room."""
        del self._adapters[self[name].name]

    @contextmanager
    def use(self, name: str) -> Iterator[Adapter]:
        """Put an adapter's weights and random stream into the model for the length of a block.

        A forward and its backward belong into one block.

        Raises:
            AdapterError: If another adapter is in use.
        """
        if self._in_use is not None:
            raise AdapterError(
                f"adapter {name!r} asked for while {self._in_use!r} is in use", remedy="finish its backward pass first"
            )
        adapter = self[name]
        with torch.no_grad():
            for key, weight in self._working.items():
                weight.copy_(adapter.masters[key])
        outer = _rng_state(self.device)
        _set_rng_state(self.device, adapter.rng)
        self._in_use = name
        try:
            yield adapter
        finally:
            self._in_use = None
            adapter.rng = _rng_state(self.device)
            _set_rng_state(self.device, outer)

    def take_gradients(self, scale: float) -> None:
        """Add the working copy's gradients, times ``scale``, to the masters of the adapter in use.

        Called after every backward pass, it sums a step's gradients in fp32: in bf16 a sum of many loses digits.

        Raises:
            AdapterError: If no adapter is in use.
        """
        if self._in_use is None:
            raise AdapterError("no adapter is in use", remedy="call it inside `with bank.use(name)`")
        for key, master in self._adapters[self._in_use].masters.items():
            gradient = self._working[key].grad
            if gradient is not None:
                scaled = gradient.to(master.dtype) * scale
                master.grad = scaled if master.grad is None else master.grad.add_(scaled)
            self._working[key].grad = None

    def _add(self, name: str, weights: Mapping[str, Tensor], rng: dict[str, Tensor]) -> Adapter:
        if name in self._adapters:
            raise AdapterError(f"adapter {name!r} is in the bank already")
        masters = {
            key: nn.Parameter(weight.to(device=self.device, dtype=torch.float32, copy=True))
            for key, weight in weights.items()
        }
        self._adapters[name] = Adapter(name, masters, rng)
        return self._adapters[name]


def stable_seed(seed: int, *names: str) -> int:
    """A seed that depends on ``seed`` and names only, the same on every machine and run."""
    return (seed * 1_000_003 + zlib.crc32("/".join(names).encode())) % 2**63


def _first_difference(expected: Mapping[str, object], found: Mapping[str, object]) -> str:
    for key in sorted(expected.keys() | found.keys()):
        if expected.get(key) != found.get(key):
            return f"{key}: model {expected.get(key, 'has none')}, file {found.get(key, 'has none')}"
    return "no difference"


def _rng_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_rng_state(device: torch.device, state: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def _forked_rng(device: torch.device, seed: int) -> Iterator[None]:
    outer = _rng_state(device)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        _set_rng_state(device, outer)
