"""The forward pass of training and evaluation alike: logits where an answer token is predicted.

Rows are run either each on its own (:func:`plain_batch`) or as branches of a prefix that is run
once (:func:`shared_batch`): a user's samples begin with the same profile and instructions. Both
give the same logits and gradients; with LoRA dropout, branches also share the prefix's dropout
mask, which leaves the expected gradient as it is.

Shapes: B sequences or branches, S their length, U prefixes, P their length, N answer tokens,
H key and value heads, D their size, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torchtune.modules import MultiHeadAttention

from personas_tune.datasets.token_tree import TokenTree, build_token_tree, common_prefix_length
from personas_tune.datasets.tokens import TokenRow

Branch = Sequence[TokenRow]  # rows that differ in their answers, or just one row


@dataclass(frozen=True)
class AnswerBatch:
    """Rows ready for the model, and where their answers are predicted.

    Args:
        tokens: Padded tokens, shape ``(B, S)``.
        batch_index: Batch row of each answer token, shape ``(N,)``.
        source: Index in the sequence from which each answer token is predicted, shape ``(N,)``.
        targets: The answer tokens, shape ``(N,)``.
        mask: What each token attends to, prefix first, shape ``(B, S, P + S)``; None for plain rows.
        input_pos: Position of each token in its row, shape ``(B, S)``; None for plain rows.
        prefix: Padded prefixes, shape ``(U, P)``; None if nothing is shared.
        prefix_mask: What each prefix token attends to, shape ``(U, P, P)``.
        owner: Which prefix each branch continues, shape ``(B,)``.
    """

    tokens: Tensor
    batch_index: Tensor
    source: Tensor
    targets: Tensor
    mask: Tensor | None = None
    input_pos: Tensor | None = None
    prefix: Tensor | None = None
    prefix_mask: Tensor | None = None
    owner: Tensor | None = None

    def to(self, device: torch.device) -> "AnswerBatch":
        """The same batch on ``device``."""
        values: dict[str, Tensor] = {
            field.name: getattr(self, field.name) for field in fields(self) if getattr(self, field.name) is not None
        }
        return AnswerBatch(**{name: value.to(device) for name, value in values.items()})


def plain_batch(rows: Sequence[TokenRow], pad_id: int) -> AnswerBatch:
    """Each row its own sequence, padded on the right, as stock torchtune batches them."""
    tokens = _padded([row.tokens for row in rows], pad_id)
    spots = [(b, t) for b, row in enumerate(rows) for t in range(row.answer_start, len(row.tokens))]
    batch_index, position = torch.tensor(spots, dtype=torch.long).unbind(1)
    return AnswerBatch(tokens, batch_index, position - 1, tokens[batch_index, position])


def shared_batch(groups: Sequence[Sequence[Branch]], pad_id: int) -> AnswerBatch:
    """Each group's common prefix once, and its branches.

    Only the token-level common prefix of whole rows is shared; no text is tokenised in parts.

    Args:
        groups: For each prefix (a user's samples), its branches. The rows of one branch (a prompt
            with several answers) are merged into a token tree.
        pad_id: Token that fills up short rows.
    """
    lengths = [shared_length([row for branch in group for row in branch]) for group in groups]
    prefixes = [group[0][0].tokens[:length] for group, length in zip(groups, lengths, strict=True)]
    trees = [
        build_token_tree([TokenRow(row.tokens[length:], row.answer_start - length) for row in branch])
        for group, length in zip(groups, lengths, strict=True)
        for branch in group
    ]
    owner = torch.tensor([number for number, group in enumerate(groups) for _ in group])
    prefix = _padded(prefixes, pad_id)
    width, prefix_width = max(len(tree.tokens) for tree in trees), prefix.shape[1]
    input_pos = torch.zeros((len(trees), width), dtype=torch.long)
    mask = torch.zeros((len(trees), width, prefix_width + width), dtype=torch.bool)
    for index, tree in enumerate(trees):
        size, length = len(tree.tokens), lengths[owner[index]]
        input_pos[index, :size] = torch.from_numpy(tree.depth) + length
        mask[index, :, :length] = True  # padding too: no row of the softmax is empty
        mask[index, :size, prefix_width : prefix_width + size] = torch.from_numpy(tree.attends)
    return AnswerBatch(
        tokens=_padded([tree.tokens.tolist() for tree in trees], pad_id),
        batch_index=torch.cat([torch.full((len(tree.sources),), index) for index, tree in enumerate(trees)]),
        source=_cat(trees, "sources"),
        targets=_cat(trees, "targets"),
        mask=mask,
        input_pos=input_pos,
        prefix=prefix,
        prefix_mask=torch.ones(prefix_width, prefix_width, dtype=torch.bool).tril().repeat(len(groups), 1, 1),
        owner=owner,
    )


def shared_length(rows: Sequence[TokenRow]) -> int:
    """Tokens that all rows share, short of the one from which an answer is predicted."""
    first = rows[0].tokens
    return min(min(common_prefix_length(first, row.tokens), row.answer_start - 1) for row in rows)


def answer_logits(model: nn.Module, batch: AnswerBatch) -> Tensor:
    """Logits from which each answer token is predicted, shape ``(N, V)``, fp32.

    The final norm and the output layer run at those N places only.
    """
    if batch.prefix is None:
        return _logits_at(model, batch)
    with _prefix_caches(model) as caches:
        position = torch.arange(batch.prefix.shape[1], device=batch.prefix.device).expand_as(batch.prefix)
        first = torch.zeros(1, dtype=torch.long, device=batch.prefix.device)
        with _output_only_at(model, first, first):
            model(batch.prefix, mask=batch.prefix_mask, input_pos=position)
        assert batch.owner is not None
        for cache in caches:
            cache.continue_with(batch.owner)
        return _logits_at(model, batch)


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


class _PrefixCache:
    """Stands where an attention layer looks for its KV cache: keeps the prefix's keys and values,
    then puts them before those of the branches."""

    def __init__(self) -> None:
        self._kept: tuple[Tensor, Tensor] | None = None
        self._owner: Tensor | None = None

    def continue_with(self, owner: Tensor) -> None:
        self._owner = owner

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Called by the layer with its new keys and values, shape ``(B, H, S, D)``."""
        if self._owner is None:
            self._kept = (k, v)
            return k, v
        assert self._kept is not None
        kept_k, kept_v = (kept.index_select(0, self._owner) for kept in self._kept)
        return torch.cat([kept_k, k], dim=2), torch.cat([kept_v, v], dim=2)


@contextmanager
def _prefix_caches(model: nn.Module) -> Iterator[list[_PrefixCache]]:
    layers = [module for module in model.modules() if isinstance(module, MultiHeadAttention)]
    caches = [_PrefixCache() for _ in layers]
    try:
        for layer, cache in zip(layers, caches, strict=True):
            layer.kv_cache, layer.cache_enabled = cache, True
        yield caches
    finally:
        for layer in layers:
            layer.kv_cache, layer.cache_enabled = None, False


def _logits_at(model: nn.Module, batch: AnswerBatch) -> Tensor:
    with _output_only_at(model, batch.batch_index, batch.source):
        logits = model(batch.tokens, mask=batch.mask, input_pos=batch.input_pos)
    if isinstance(logits, list):  # the model was told to chunk its output
        logits = torch.cat(logits, dim=1)
    return torch.as_tensor(logits).squeeze(0)


@contextmanager
def _output_only_at(model: nn.Module, batch_index: Tensor, source: Tensor) -> Iterator[None]:
    def select(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0][batch_index, source].unsqueeze(0), *inputs[1:])

    handle = model.get_submodule("norm").register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def _padded(rows: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    tokens = torch.full((len(rows), max(len(row) for row in rows)), pad_id, dtype=torch.long)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.tensor(row, dtype=torch.long)
    return tokens


def _cat(trees: Sequence[TokenTree], name: str) -> Tensor:
    return torch.cat([torch.from_numpy(getattr(tree, name)) for tree in trees])
