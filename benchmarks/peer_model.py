"""What the peers of the training benchmark share: one model's sizes and weights, the clock, and peak memory."""

import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchtune import training
from torchtune.models.phi3 import lora_phi3
from torchtune.modules.peft import get_adapter_params

from personas_tune.datasets import TokenRow

N_ADAPTERS = 4  # resident, where a peer can hold several
Gradients = Mapping[str, Tensor]
Result = TypeVar("Result")


class Peer(Protocol):
    """A way to train an adapter."""

    def gradients(self, rows: Sequence[TokenRow]) -> tuple[float, Gradients]:
        """Mean loss per answer token of some rows, and its gradients by torchtune parameter name.

        The adapter gets its first weights again before, as steps have moved it.
        """

    def step(self) -> float:
        """Take the next optimizer step; its seconds."""


@dataclass(frozen=True)
class ModelSize:
    """A Phi-3 with LoRA on q and k."""

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    intermediate_dim: int
    rank: int

    def lora_arguments(self) -> dict[str, Any]:
        """Arguments of torchtune's ``lora_phi3``."""
        sizes = {name: value for name, value in vars(self).items() if name != "rank"}
        return {
            **sizes, "num_kv_heads": self.num_heads, "max_seq_len": 4096, "lora_attn_modules": ["q_proj", "k_proj"],
            "apply_lora_to_mlp": False, "apply_lora_to_output": False,
            "lora_rank": self.rank, "lora_alpha": self.rank, "lora_dropout": 0.0,
        }  # fmt: skip


PHI3_MINI = ModelSize(32064, 3072, 32, 32, 8192, 256)


@dataclass(frozen=True)
class Machine:
    """Where the peers run.

    Args:
        device: ``cpu`` or ``cuda``.
        dtype: ``fp32`` or ``bf16``.
    """

    device: torch.device
    dtype: torch.dtype

    def clock(self) -> float:
        """Seconds: CPU time, or wall time when the GPU is done."""
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def with_peak_bytes(self, run: Callable[[], Result], *, compiled: bool) -> tuple[Result, int | None]:
        """What something returns, and the most memory that tensors took meanwhile, beyond what they took before.

        On a CPU compiled code can't be watched: None.
        """
        if self.device.type == "cpu" and compiled:
            return run(), None
        if self.device.type == "cpu":
            with LiveBytes() as live:
                return run(), live.most
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return run(), torch.cuda.max_memory_allocated() - before


@dataclass(frozen=True)
class Weights:
    """By torchtune parameter name."""

    base: dict[str, Tensor]
    adapter: dict[str, Tensor]


def draw_weights(size: ModelSize, machine: Machine) -> Weights:
    """Random weights; B isn't zero as in a fresh adapter, or A would have no gradient."""
    torch.manual_seed(0)
    model = empty_model(size, machine)
    adapter = {name: weight.detach() for name, weight in get_adapter_params(model).items()}
    for name, weight in adapter.items():
        if "lora_b" in name:
            nn.init.normal_(weight, std=0.02)
    base = {name: weight for name, weight in model.state_dict().items() if name not in adapter}
    return Weights(base, adapter)


def empty_model(size: ModelSize, machine: Machine) -> nn.Module:
    with training.set_default_dtype(machine.dtype), machine.device:
        return lora_phi3(**size.lora_arguments())


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.01, fused=True)


@torch.no_grad()
def restore(parameters: Mapping[str, nn.Parameter], weights: Weights) -> None:
    """Give an adapter its first weights again."""
    for name, parameter in parameters.items():
        parameter.copy_(weights.adapter[name])


def taken_gradients(parameters: Mapping[str, nn.Parameter]) -> Gradients:
    """The gradients by name; none is left behind."""
    gradients = {name: weight.grad for name, weight in parameters.items() if weight.grad is not None}
    for weight in parameters.values():
        weight.grad = None
    return gradients


class LiveBytes(TorchDispatchMode):
    """The most bytes that new tensors held at a time; not seen are buffers within a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(out):
            if storage._cdata not in given | self.alive:
                self._add(storage)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        self.alive.add(storage._cdata)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, address: int, n_bytes: int) -> None:
        self.alive.discard(address)
        self.now -= n_bytes


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
