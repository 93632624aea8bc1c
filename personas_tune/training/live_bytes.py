"""What a pass on the meta device would hold in memory: every storage that it makes, until it is let go."""

import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torchao.dtypes.nf4tensor import NF4Tensor
from torchtune.modules import MultiHeadAttention

_ELEMENTWISE = (torch.ops.aten.mul.Tensor, torch.ops.aten.add.Tensor)


def peak_of(network: nn.Module, run: Callable[[], None]) -> int:
    """The most bytes that a run of a network holds beside the network's own weights.

    Args:
        network: On the meta device.
        run: Runs it, forward or backward too.
    """
    own = [tensor for tensor in (*network.parameters(), *network.buffers()) if not _is_wrapper(tensor)]
    with (
        warnings.catch_warnings(action="ignore"),
        _gpu_attention(network),
        LiveBytes(own, torch.device("meta")) as live,
        _dequantised_once(live),
    ):
        run()
    return int(live.peak) + _largest_dequantised(network)


@contextmanager
def _gpu_attention(network: nn.Module) -> Iterator[None]:
    """Have attention keep what the fused kernels of a device keep, not every query's weight for every key."""
    layers = [module for module in network.modules() if isinstance(module, MultiHeadAttention)]
    before = [layer._attention_call for layer in layers]
    for layer in layers:
        layer._attention_call = _fused_attention
    try:
        yield
    finally:
        for layer, call in zip(layers, before, strict=True):
            layer._attention_call = call


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]
    return out


@contextmanager
def _dequantised_once(live: "LiveBytes") -> Iterator[None]:
    """Have a weight in NF4 dequantised once for all of its shape: it takes twenty operations, and as much each time."""
    whole = NF4Tensor.get_original_weight
    known: dict[Any, int] = {}

    def dequantise(weight: NF4Tensor) -> Tensor:
        key = (weight.shape, weight.dtype, torch.is_grad_enabled())
        if key in known:
            live.rise(known[key])
            return torch.empty(weight.shape, dtype=weight.dtype, device="meta")
        peak, now, live.peak = live.peak, live.now, live.now
        made: Tensor = whole(weight)
        if live.peak > now and live.now - now == made.nbytes:  # seen at all, and nothing else stays
            known[key] = live.peak - now
        live.peak = max(peak, live.peak)
        return made

    NF4Tensor.get_original_weight = dequantise
    try:
        yield
    finally:
        NF4Tensor.get_original_weight = whole


def _largest_dequantised(network: nn.Module) -> int:
    """Bytes of the largest quantised weight while it is computed with; torchao makes it out of sight."""
    sizes = [weight.numel() * weight.element_size() for weight in network.parameters() if isinstance(weight, NF4Tensor)]
    return max(sizes, default=0)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that are made while it is on, until they are let go.

    Args:
        known: What is there already, and isn't counted.
        device: Tensors elsewhere aren't counted.

    Attributes:
        now: Bytes that are there.
        peak: The most there were.
    """

    def __init__(self, known: Sequence[Tensor], device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._device = device
        self._seen: dict[int, Any] = {id(tensor.untyped_storage()): tensor for tensor in known}

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it made."""
        made = _quickly(operation, args) if len(args) == 2 and not kwargs else operation(*args, **(kwargs or {}))
        for tensor in (made,) if isinstance(made, Tensor) else tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.device.type == self._device.type and not _is_wrapper(tensor):
                self._count(tensor.untyped_storage())
        return made

    def rise(self, n_bytes: int) -> None:
        """Note that so much more is there for a moment."""
        self.peak = max(self.peak, self.now + n_bytes)

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, n_bytes = id(storage), storage.nbytes()
        if key not in self._seen:
            self._seen[key] = weakref.ref(storage, partial(self._let_go, key, n_bytes))
            self.now += n_bytes
            self.rise(0)

    def _let_go(self, key: int, n_bytes: int, _: object) -> None:
        self.now -= n_bytes
        del self._seen[key]


def _quickly(operation: Any, args: Any) -> Any:
    """The result of an operation; of the most frequent ones on meta tensors without torch's 0.1 ms in Python."""
    first, second = args
    if operation in _ELEMENTWISE and isinstance(first, Tensor) and isinstance(second, Tensor):
        alike = first.shape == second.shape and first.dtype == second.dtype and first.is_meta and second.is_meta
        if alike and not _is_wrapper(first) and not _is_wrapper(second):
            return torch.empty_like(first)
    return operation(*args)


def _is_wrapper(tensor: Tensor) -> bool:
    return bool(is_traceable_wrapper_subclass(tensor))
