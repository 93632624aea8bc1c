"""Prefixes run once for all rows that begin with them, forward and backward.

A user's samples begin with the same profile and instructions. The prefix is run once and leaves each
layer's keys and values; the branches attend to them. Training goes in two phases, so that memory
doesn't grow with the rows of a user: every pass of branches runs its backward right away, which
leaves gradients on the keys and values, and in the end one backward takes these through the prefix.
Loss and gradients are those of separate rows. With LoRA dropout, branches also share the prefix's
dropout mask, which leaves the expected gradient as it is.

The attention layers' own function steps aside for a :class:`PrefixReader`. Layers are run by the
model's own call, so FSDP2's hooks, activation checkpointing and per-layer ``torch.compile`` work on.

Shapes: N answer tokens, V vocabulary, H heads, D their size; see also ``batches.py``.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torchtune.modules import MultiHeadAttention

from personas_tune.datasets.tokens import TokenRow
from personas_tune.errors import ConfigError
from personas_tune.training.batches import (
    AnswerBatch,
    Branch,
    Plan,
    Prefixes,
    Round,
    fill_plan,
    plan_passes,
    plan_tree_round,
    shape_of,
)
from personas_tune.training.forward import (
    answer_logits,
    answer_loss,
    device_of,
    joined_output,
    output_only_at,
    place_logits,
)
from personas_tune.training.prefix_attention import Runs, attend_with_prefix

KeysAndValues = tuple[Tensor, Tensor]


def backward_rows(
    model: nn.Module,
    rows: Sequence[TokenRow],
    names: Sequence[str],
    loss_fn: nn.Module,
    *,
    pad_id: int,
    sharing: Literal["auto", "off"],
    branches_per_pass: int,
    on_gradients: Callable[[], None] = lambda: None,
    agree: Callable[[list[int]], list[int]] | None = None,
) -> float:
    """Add the gradients of the rows' summed loss to the model's trainable parameters.

    They are those of separate rows, however the rows are cut into passes.

    Args:
        model: The base with the working copy of an adapter.
        rows: What one optimizer step learns from, or a part of it.
        names: Names what each row begins with; rows of equal names may share it.
        loss_fn: A torchtune or torch loss.
        pad_id: Token that fills up short rows.
        sharing: ``auto`` runs what rows have in common once, where that saves enough; ``off`` never.
        branches_per_pass: Most rows or branches of one pass: bounds memory.
        on_gradients: Called after every backward pass, to move the gradients elsewhere.
        agree: Where processes must run the same passes, as FSDP2's do: gets this process's shape of passes
            (:func:`~personas_tune.training.batches.shape_of`), returns the largest of all of them.

    Returns:
        The loss summed over the rows' answer tokens.
    """
    share = sharing == "auto" and obstacle(model) is None
    plan = plan_passes(rows, names, pad_id=pad_id, share=share, rows_per_pass=branches_per_pass)
    if agree is not None:
        plan = fill_plan(plan, agree(shape_of(plan)), pad_id)
    return backward_passes(model, plan, loss_fn, on_gradients)


def backward_passes(
    model: nn.Module, plan: Plan, loss_fn: nn.Module, on_gradients: Callable[[], None] = lambda: None
) -> float:
    """As :func:`backward_rows`, for rows that are cut into passes already."""
    return float(run_passes(model, plan, loss_fn, on_gradients).item())


def run_passes(model: nn.Module, plan: Plan, loss_fn: nn.Module, on_gradients: Callable[[], None]) -> Tensor:
    """As :func:`backward_passes`; the loss stays on the model's device, which may be one without numbers."""
    total = torch.zeros((), device=device_of(model))
    for part in plan:
        if isinstance(part, Round):
            total += _backward_round(model, part, loss_fn, on_gradients)
        else:
            total += _backward(answer_logits(model, part), part, loss_fn)
            on_gradients()
    return total


def _backward_round(model: nn.Module, part: Round, loss_fn: nn.Module, on_gradients: Callable[[], None]) -> Tensor:
    total = torch.zeros((), device=device_of(model))
    with PrefixReader(model) as reader:
        reader.read(part.prefixes, in_two_phases=True)
        for batch in part.batches:
            total += _backward(reader.logits(batch), batch, loss_fn)
            on_gradients()
        reader.backward()
        on_gradients()
    return total


def _backward(logits: Tensor, batch: AnswerBatch, loss_fn: nn.Module) -> Tensor:
    weight = len(batch.targets) if batch.counts else 0
    loss = answer_loss(loss_fn, logits, batch.targets.to(logits.device)) * weight
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def shared_logits(model: nn.Module, groups: Sequence[Sequence[Branch]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Logits of the groups' answer tokens, shape ``(N, V)``, and these; one graph through prefixes and branches."""
    part = plan_tree_round(groups, sum(len(group) for group in groups), pad_id)
    (batch,) = part.batches
    with PrefixReader(model) as reader:
        reader.read(part.prefixes)
        logits = reader.logits(batch)
    return logits, batch.targets.to(logits.device)


def obstacle(model: nn.Module) -> str | None:
    """Why prefixes can't be shared in this model; None if they can."""
    layers = _attention_layers(model)
    if not layers or len(layers) != len(getattr(model, "layers", [])):
        return "its layers don't all have torchtune's MultiHeadAttention"
    if any(layer.training and layer.attn_dropout > 0 for layer in layers):
        return "it has dropout within the attention"
    return None


class PrefixReader:
    """Runs prefixes through a model, and then the branches that attend to them.

    A context manager: inside of it, the model's attention layers work for the reader.

    Args:
        model: A torchtune decoder.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._pass = _Pass()
        self._seats = [_Seat(layer, self._pass) for layer in _attention_layers(model)]
        self._lengths: tuple[int, ...] = ()
        self._output: Tensor | None = None

    def __enter__(self) -> "PrefixReader":
        for seat in self._seats:
            seat.layer._attention_call = seat
        return self

    def __exit__(self, *_: object) -> None:
        for seat in self._seats:
            seat.layer._attention_call = seat.stock

    def read(self, prefixes: Prefixes, *, in_two_phases: bool = False) -> None:
        """Run prefixes and keep their keys and values.

        Args:
            prefixes: What the branches to come continue.
            in_two_phases: Let the gradients of branches end at the keys and values, until :meth:`backward`.

        Raises:
            ConfigError: If the model's prefixes can't be shared.
        """
        if (reason := obstacle(self._model)) is not None:
            raise ConfigError(f"prefixes can't be shared: {reason}", where="model", remedy="use another model")
        self._lengths, self._pass.runs, self._pass.records = prefixes.lengths, None, True
        tokens = prefixes.tokens.to(device_of(self._model))
        position = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        first = position[0, :1]  # no place is needed: one is run, for the output to be in the graph
        with output_only_at(self._model, first, first):
            self._output = joined_output(self._model(tokens, input_pos=position))
        self._pass.records = False
        for seat in self._seats:
            seat.prefix = _leaves(seat.recorded) if in_two_phases else seat.recorded

    def logits(self, batch: AnswerBatch) -> Tensor:
        """As :func:`answer_logits`, for branches of the prefixes that were read last."""
        return self.place_logits(batch)[batch.place.to(device_of(self._model))]

    def place_logits(self, batch: AnswerBatch) -> Tensor:
        """As :func:`~personas_tune.training.forward.place_logits`, for branches of the prefixes that were read last."""
        self._pass.runs = list(zip(self._lengths, batch.runs, strict=True))
        return place_logits(self._model, batch)

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """Within this block, each pass of the same branches also sees the tokens of the passes before it."""
        self._pass.remembers = True
        try:
            yield
        finally:
            self._pass.remembers = False
            for seat in self._seats:
                seat.own = None

    def backward(self) -> None:
        """Take the gradients that branches left on the keys and values through the prefixes."""
        self._pass.runs = None  # checkpointed layers run again, and as they did in the prefix pass
        gradients = [pair for seat in self._seats for pair in seat.gradients()]
        if isinstance(self._model, FSDPModule):  # its hooks wait for a gradient of the model's output
            assert self._output is not None
            gradients.append((self._output, torch.zeros_like(self._output)))
        for seat in self._seats:
            seat.recorded = seat.prefix = None
        self._output = None
        if gradients:
            torch.autograd.backward([kept for kept, _ in gradients], [gradient for _, gradient in gradients])


@dataclass
class _Pass:
    """What the pass that is being run is for."""

    records: bool = False  # of prefixes, whose keys and values are to be kept
    runs: Runs | None = None  # of branches, and of which prefixes; None: the layer's own attention
    remembers: bool = False  # of branches that go on in later passes


class _Seat:
    """Stands where an attention layer keeps its attention function, and keeps keys and values for the reader."""

    def __init__(self, layer: MultiHeadAttention, now: _Pass) -> None:
        self.layer, self.now = layer, now
        self.stock = layer._attention_call
        self.recorded: KeysAndValues | None = None  # of prefixes, in the graph of their pass
        self.prefix: KeysAndValues | None = None  # the same for branches: in two phases, leaves of their graphs
        self.own: KeysAndValues | None = None  # of branches, from earlier passes

    # A graph break for torch.compile: what is compiled around it doesn't depend on the prefix's length.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool
    ) -> Tensor:
        if self.now.records:
            self.recorded = k, v
        if self.now.runs is None:
            return torch.as_tensor(self.stock(q, k, v, mask=mask, dropout_p=dropout_p, is_causal=is_causal))
        if self.now.remembers:
            if self.own is not None:
                k, v = torch.cat([self.own[0], k], dim=2), torch.cat([self.own[1], v], dim=2)
            self.own = k, v
        assert self.prefix is not None
        return attend_with_prefix(q, k, v, *self.prefix, self.now.runs, mask)

    def gradients(self) -> list[tuple[Tensor, Tensor]]:
        """The prefixes' keys and values with the gradients that came back to them."""
        if self.recorded is None or self.prefix is None:
            return []
        pairs = zip(self.recorded, self.prefix, strict=True)
        return [(kept, leaf.grad) for kept, leaf in pairs if leaf.grad is not None]


def _leaves(kept: KeysAndValues | None) -> KeysAndValues | None:
    if kept is None:
        return None
    k, v = (tensor.detach().requires_grad_(tensor.requires_grad) for tensor in kept)
    return k, v


def _attention_layers(model: nn.Module) -> list[MultiHeadAttention]:
    return [module for module in model.modules() if isinstance(module, MultiHeadAttention)]
