"""One frozen base over all processes by FSDP2; its adapters stay whole in each of them.

A layer's weights are gathered from all processes when a pass comes to it, so all must run equally
many passes. An adapter's gradients are those of the process's own rows: to sum them is the caller's.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torchtune import training
from torchtune.modules.peft import DoRALinear, LoRALinear, get_adapter_params

from personas_tune.errors import ConfigError, PersonasTuneError

T = TypeVar("T")


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's weights are spread over the processes."""
    return isinstance(model, FSDPModule)


@contextmanager
def in_lockstep(model: nn.Module) -> Iterator[None]:
    """Let processes run different numbers of forward passes of a sharded model, none of them a backward pass.

    All processes enter the block together. At its end, a process runs blank passes in eval mode for as long as
    others are at work. An error in the block is not told to them: they wait until they are ended too.
    """
    if not is_sharded(model):
        yield
        return

    def announce(*_: object) -> None:
        _count_working(model, True)

    announcing = model.register_forward_pre_hook(announce, prepend=True)  # before FSDP2's, which gathers weights
    try:
        yield
    finally:
        announcing.remove()
    model.eval()  # blank passes draw nothing
    while _count_working(model, False) > 0:
        _run_blank(model)


def _count_working(model: nn.Module, is_working: bool) -> Tensor:
    n_working = torch.tensor(int(is_working), device=next(model.parameters()).device)
    dist.all_reduce(n_working)
    return n_working


@torch.no_grad()
def _run_blank(model: nn.Module) -> None:
    model(torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device))


def on_first_process(work: Callable[[], T]) -> T | None:
    """Do something in the first process alone; None in the others.

    Raises:
        PersonasTuneError: What the work raised, in every process.
    """
    result, failure = None, None
    if dist.get_rank() == 0:
        try:
            result = work()
        except PersonasTuneError as error:
            failure = error
    told = [failure]
    dist.broadcast_object_list(told, src=0)
    if told[0] is not None:
        raise told[0]
    return result


def make_room_for_adapters(network: nn.Module, device: torch.device) -> None:
    """Give the adapters of a network on the meta device room on a real one; their values are arbitrary yet."""
    for module in network.modules():
        if isinstance(module, LoRALinear | DoRALinear):
            module.to_empty(device=device)


def shard(network: nn.Module, weights: dict[str, Tensor], device: torch.device) -> None:
    """Spread a network's frozen weights over all processes; each one holds its part of every weight.

    Args:
        network: On the meta device, but for its adapters.
        weights: The first process's: all of them, by name; used up. The others' are empty.
        device: What this process computes on.

    Raises:
        ConfigError: If the network can't be cut into as many parts.
    """
    _cut(network, device)
    parts = {name: part for name, part in network.state_dict().items() if isinstance(part, DTensor)}
    for _, names in groupby(parts, key=lambda name: name.split(".")[:2]):  # a layer at a time, to bound memory
        whole = {name: _whole(parts[name], weights.pop(name, None), device) for name in names}
        training.load_from_full_model_state_dict(network, whole, device)
    _fill_buffers(network, device)
    _keep_magnitudes(network)


def _cut(network: nn.Module, device: torch.device) -> None:
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    adapters = set(get_adapter_params(network).values())
    try:
        for module in (*network.get_submodule("layers").children(), network):
            fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=adapters)
    except (AssertionError, AttributeError, NotImplementedError) as error:  # NF4 blocks are cut evenly or not at all
        raise ConfigError(
            f"this model can't be cut into {mesh.size()} parts ({' '.join(str(error).split())})",
            where="parallel",
            remedy="run another number of processes, a power of 2, or set parallel=persona",
        ) from error


def _whole(part: DTensor, weight: Tensor | None, device: torch.device) -> Tensor:
    """The first process's weight, there; room for it in the others, of which it is filled where they need all of it."""
    if weight is None:
        whole = torch.empty(part.shape, dtype=part.dtype, device=device)
    else:
        whole = weight.to(device=device, dtype=part.dtype).contiguous()
    if type(part.to_local()) is not Tensor:  # NF4: each process quantises the whole, and keeps its part
        dist.broadcast(whole, src=0)
    return whole


def _fill_buffers(network: nn.Module, device: torch.device) -> None:
    with device:
        for module in network.modules():
            if (fill := getattr(module, "rope_init", None)) is not None:
                fill()
    unknown = [name for name, buffer in network.named_buffers() if buffer.is_meta]
    if unknown:
        raise ConfigError(
            f"this model can't be spread over processes (nothing fills {unknown[0]})",
            where="parallel",
            remedy="set parallel=persona",
        )


def _keep_magnitudes(network: nn.Module) -> None:
    """Find the magnitudes that DoRA starts from once: it takes whole weights, and so all processes."""
    for part in network.modules():
        if not isinstance(part, FSDPModule):
            continue
        part.unshard()
        for module in part.modules():
            if isinstance(module, DoRALinear) and not isinstance(module.weight, DTensor):
                module.initialize_parameters()
                module.initialize_dora_magnitude()
                magnitude = module.magnitude.detach()
                module.initialize_dora_magnitude = partial(magnitude.copy_, magnitude.clone())
        part.reshard()
