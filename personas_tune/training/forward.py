"""The forward pass of training and evaluation alike: logits where an answer token is predicted.

Shapes: N answer tokens, M places from which they are predicted, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torchtune.modules import TiedLinear, TransformerSelfAttentionLayer

from personas_tune.training.batches import AnswerBatch


def answer_logits(model: nn.Module, batch: AnswerBatch) -> Tensor:
    """Logits from which each answer token is predicted, shape ``(N, V)``, fp32."""
    return place_logits(model, batch)[batch.place.to(device_of(model))]


def place_logits(model: nn.Module, batch: AnswerBatch) -> Tensor:
    """Logits at each of the batch's places, shape ``(M, V)``, fp32.

    The final norm, the output layer and most of the last layer run at those M places only.
    """
    batch = batch.to(device_of(model))
    with output_only_at(model, batch.batch_index, batch.source):
        return joined_output(model(batch.tokens, mask=batch.mask, input_pos=batch.input_pos))


def answer_loss(loss_fn: nn.Module, logits: Tensor, targets: Tensor) -> Tensor:
    """Mean loss per answer token by a torchtune or torch loss.

    Args:
        loss_fn: ``torch.nn.CrossEntropyLoss`` or a torchtune loss that takes logits in chunks.
        logits: Shape ``(N, V)``.
        targets: Shape ``(N,)``.
    """
    n_chunks = getattr(loss_fn, "num_output_chunks", None)
    if n_chunks is None:
        return torch.as_tensor(loss_fn(logits, targets))
    return torch.as_tensor(loss_fn(list(logits.unsqueeze(0).chunk(n_chunks, dim=1)), targets.unsqueeze(0)))


def device_of(model: nn.Module) -> torch.device:
    """Where a model's weights are."""
    return next(model.parameters()).device


@contextmanager
def output_only_at(model: nn.Module, batch_index: Tensor, source: Tensor) -> Iterator[None]:
    """Run what nothing but the output needs at chosen places only; the model gives them as a batch of one row.

    That is the output layer, the final norm, and of the last layer all but its keys and values. Left whole are
    layers that are compiled or run again in the backward pass, which don't see hooks, or not when it counts; and
    modules with dropout while they train, whose random numbers shall not depend on that.

    Args:
        model: A torchtune decoder.
        batch_index: Batch row of each place, shape ``(M,)``.
        source: Index in the sequence of each place, shape ``(M,)``; no two places are the same.
    """

    def select(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0][batch_index, source].unsqueeze(0), *inputs[1:])

    with ExitStack() as stack:
        for module in _read_by_the_output_only(model):
            stack.enter_context(_run_only_at(module, batch_index, source))
        stack.callback(model.get_submodule("norm").register_forward_pre_hook(select, prepend=True).remove)
        yield


def _read_by_the_output_only(model: nn.Module) -> list[nn.Module]:
    """Modules of the last layer that take each token for itself, and whose results for others nobody reads."""
    layer = list(model.get_submodule("layers").children())[-1]
    if not isinstance(layer, TransformerSelfAttentionLayer) or layer._compiled_call_impl is not None:
        return []
    return [module for module in (layer.attn.q_proj, layer.attn.output_proj, layer.mlp) if not _draws(module)]


def _draws(module: nn.Module) -> bool:
    return any(isinstance(part, nn.Dropout) and part.training and part.p > 0 for part in module.modules())


@contextmanager
def _run_only_at(module: nn.Module, batch_index: Tensor, source: Tensor) -> Iterator[None]:
    """Run a module at chosen places only; its output is 0 at the others."""
    shape: list[int] = []

    def select(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        shape[:] = inputs[0].shape[:2]
        return (inputs[0][batch_index, source].unsqueeze(0), *inputs[1:])

    def spread(_: nn.Module, __: object, output: Tensor) -> Tensor:
        whole = output.new_zeros(*shape, output.shape[-1])
        whole[batch_index, source] = output[0]
        return whole

    handles = [module.register_forward_pre_hook(select), module.register_forward_hook(spread)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def joined_output(logits: Tensor | list[Tensor]) -> Tensor:
    """A model's output for a batch of one row, shape ``(N, V)``, also where it was told to chunk it."""
    whole = torch.cat(logits, dim=1) if isinstance(logits, list) else logits
    return torch.as_tensor(whole).squeeze(0)


@contextmanager
def fp32_head(model: nn.Module) -> Iterator[None]:
    """Compute the final norm and the output layer in fp32; for inference only.

    A bf16 logit near 20 is a multiple of 1/8, so probabilities would come in steps of 13 %. Cheap, as the
    head runs at few places: the upcast weights (0.4 GB for Phi-3-Mini) are there while it runs.
    """
    handles = [model.get_submodule("norm").register_forward_pre_hook(_upcast_inputs)]
    if isinstance(model.output, TiedLinear):  # its weight is an input, and the embedding's too
        handles.append(model.output.linear.register_forward_pre_hook(_upcast_inputs))
    else:
        handles += _upcast_weights(model.get_submodule("output"))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _upcast_inputs(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(value.float() for value in inputs)


def _upcast_weights(module: nn.Module) -> list[RemovableHandle]:
    """Hooks that swap a module's weights for fp32 copies while it runs."""
    kept: dict[nn.Parameter, Tensor] = {}

    def upcast(_: nn.Module, __: object) -> None:
        for weight in module.parameters():
            kept[weight] = weight.data
            weight.data = weight.data.float()

    def restore(*_: object) -> None:
        for weight, data in kept.items():
            weight.data = data
        kept.clear()

    return [
        module.register_forward_pre_hook(upcast),
        module.register_forward_hook(restore, always_call=True),
    ]
