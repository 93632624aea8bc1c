"""Rows as tensors: each on its own, or as branches of a prefix that is run once.

Shapes: B sequences or branches, S their length, U prefixes, P their length, N answer tokens, M places in the sequences
from which they are predicted (several from one, where a branch has several answers).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from personas_tune.datasets.token_tree import TokenTree, build_token_tree, common_prefix_length, shared_length
from personas_tune.datasets.tokens import TokenRow

Branch = Sequence[TokenRow]  # rows that differ in their answers, or just one row
Part = TypeVar("Part")

# Sharing must save a sixth of the tokens: less doesn't pay for a prefix pass.
LEAST_TOKEN_RATIO = 1.2


@dataclass(frozen=True)
class AnswerBatch:
    """Rows or branches ready for the model, and where their answers are predicted.

    Args:
        tokens: Padded on the right, shape ``(B, S)``.
        batch_index: Batch row of each place, shape ``(M,)``.
        source: Index in the sequence of each place, shape ``(M,)``; no two places are the same.
        place: From which place each answer token is predicted, shape ``(N,)``.
        targets: The answer tokens, shape ``(N,)``.
        input_pos: Position of each token in its row, shape ``(B, S)``; None counts from 0.
        mask: What each token of a branch sees of its branch, shape ``(B, S, S)``; None for all up to itself.
        runs: How many branches each prefix has; those of the first prefix come first. Empty for plain rows.
        counts: False if its loss is not to count (see :func:`fill_plan`).
    """

    tokens: Tensor
    batch_index: Tensor
    source: Tensor
    place: Tensor
    targets: Tensor
    input_pos: Tensor | None = None
    mask: Tensor | None = None
    runs: tuple[int, ...] = ()
    counts: bool = True

    def to(self, device: torch.device) -> "AnswerBatch":
        """The same batch on ``device``."""
        moved: dict[str, Any] = {
            name: value.to(device) if isinstance(value, Tensor) else value for name, value in vars(self).items()
        }
        return AnswerBatch(**moved)


@dataclass(frozen=True)
class Prefixes:
    """What groups of rows begin with.

    Args:
        tokens: Padded on the right, shape ``(U, P)``.
        lengths: Without padding.
    """

    tokens: Tensor
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Round:
    """A pass of prefixes, and the passes of the branches that continue them."""

    prefixes: Prefixes
    batches: tuple[AnswerBatch, ...]


Plan = list[AnswerBatch | Round]  # passes of whole rows, and rounds


def plan_passes(
    rows: Sequence[TokenRow], names: Sequence[str], *, pad_id: int, share: bool, rows_per_pass: int
) -> Plan:
    """Cut rows into passes; those of one name share what they begin with where that saves enough.

    Prefixes of groups that are small enough to fit into one pass of branches are run together.

    Args:
        rows: In any order.
        names: Of each row; only rows of equal names may share.
        pad_id: Token that fills up short rows.
        share: Whether to share at all.
        rows_per_pass: Most rows or branches of one pass.
    """
    groups, others = group_rows(rows, names) if share else ([], rows)
    together = bundles([len(group) for group in groups], rows_per_pass)
    return [
        *(plan_round(groups[part.start : part.stop], rows_per_pass, pad_id) for part in together),
        *(plain_batch(part, pad_id) for part in even_parts(others, rows_per_pass)),
    ]


def group_rows(rows: Sequence[TokenRow], names: Sequence[str]) -> tuple[list[list[TokenRow]], list[TokenRow]]:
    """Groups of rows whose prefix is worth sharing, and the rows that are left.

    Groups are sorted by the length of their prefixes and their rows by length, so that little is padded.
    """
    by_name: dict[str, list[TokenRow]] = {}
    for row, name in zip(rows, names, strict=True):
        by_name.setdefault(name, []).append(row)
    groups = [sorted(group, key=lambda row: len(row.tokens)) for group in by_name.values() if is_worth_sharing(group)]
    others = [row for group in by_name.values() if not is_worth_sharing(group) for row in group]
    return sorted(groups, key=shared_length), others


def is_worth_sharing(rows: Sequence[TokenRow]) -> bool:
    """Whether running the common prefix once saves enough tokens."""
    n_tokens = sum(len(row.tokens) for row in rows)
    return n_tokens >= LEAST_TOKEN_RATIO * (n_tokens - (len(rows) - 1) * shared_length(rows))


def plan_round(groups: Sequence[Sequence[TokenRow]], branches_per_pass: int, pad_id: int) -> Round:
    """As :func:`plan_tree_round` for branches of one row each."""
    return plan_tree_round([[[row] for row in group] for group in groups], branches_per_pass, pad_id)


def plan_tree_round(groups: Sequence[Sequence[Branch]], branches_per_pass: int, pad_id: int) -> Round:
    """The groups' prefixes and their branches, in as few passes as will do.

    Only the token-level common prefix of whole rows is shared; no text is tokenised in parts.
    """
    lengths = tuple(shared_length([row for branch in group for row in branch]) for group in groups)
    tokens = [group[0][0].tokens[:length] for group, length in zip(groups, lengths, strict=True)]
    owners = [index for index, group in enumerate(groups) for _ in group]
    branches = [branch for group in groups for branch in group]
    batches = tuple(
        branch_batch([branches[i] for i in part], [owners[i] for i in part], lengths, pad_id)
        for part in even_parts(range(len(branches)), branches_per_pass)
    )
    return Round(Prefixes(padded(tokens, pad_id), lengths), batches)


def plan_prompts(
    prompts: Sequence[list[int]], n_answer_tokens: int, max_tokens: int
) -> Iterator[tuple[list[list[int]], int]]:
    """Group prompts that share at least half of their tokens.

    Args:
        prompts: In any order.
        n_answer_tokens: Tokens of all answers that a prompt is read with.
        max_tokens: Of prefixes and one pass of what follows them, padding included.

    Yields:
        Groups whose prefixes are read together, as indices of prompts, and how many prompts a pass may have.
    """
    groups = sorted(_alike(prompts), key=lambda group: len(prompts[group[0]]))
    shared = [_n_shared(prompts[group[0]], prompts[group[-1]]) for group in groups]
    longest = [max(len(prompts[index]) for index in group) for group in groups]
    widths = [length - n_shared + n_answer_tokens for length, n_shared in zip(longest, shared, strict=True)]
    sizes = [n_shared + len(group) * width for group, n_shared, width in zip(groups, shared, widths, strict=True)]
    for part in bundles(sizes, max_tokens):
        left = max_tokens - sum(shared[index] for index in part)
        yield groups[part.start : part.stop], max(1, left // max(widths[index] for index in part))


def _alike(prompts: Sequence[list[int]]) -> Iterator[list[int]]:
    """Indices of prompts with a common prefix; in sorted order they are neighbours."""
    group: list[int] = []
    for index in sorted(range(len(prompts)), key=prompts.__getitem__):
        if group and _n_shared(prompts[group[0]], prompts[index]) < len(prompts[index]) / 2:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def _n_shared(first: list[int], last: list[int]) -> int:
    """Tokens that two prompts share, short of the last one, from which the answer is predicted."""
    return min(common_prefix_length(first, last), len(first) - 1, len(last) - 1)


def plain_batch(rows: Sequence[TokenRow], pad_id: int) -> AnswerBatch:
    """Each row its own sequence, padded on the right, as stock torchtune batches them."""
    tokens = padded([row.tokens for row in rows], pad_id)
    spots = [(b, t) for b, row in enumerate(rows) for t in range(row.answer_start, len(row.tokens))]
    batch_index, position = torch.tensor(spots, dtype=torch.long).unbind(1)
    place = torch.arange(len(spots))
    return AnswerBatch(tokens, batch_index, position - 1, place, tokens[batch_index, position])


def branch_batch(branches: Sequence[Branch], owners: Sequence[int], lengths: Sequence[int], pad_id: int) -> AnswerBatch:
    """What follows the prefixes.

    Args:
        branches: The rows of one branch (a prompt with several answers) are merged into a token tree.
        owners: Index of the prefix that each branch continues, ascending.
        lengths: Of the prefixes.
        pad_id: Token that fills up short branches.
    """
    starts = [lengths[owner] for owner in owners]
    # Rows of a training keep their last tokens as plain rows do: dropout draws a number for every token.
    whole = all(len(branch) == 1 for branch in branches)
    trees = [
        build_token_tree([TokenRow(row.tokens[start:], row.answer_start - start) for row in branch], whole=whole)
        for branch, start in zip(branches, starts, strict=True)
    ]
    tokens = padded([tree.tokens.tolist() for tree in trees], pad_id)
    input_pos = torch.zeros_like(tokens)
    for index, (tree, start) in enumerate(zip(trees, starts, strict=True)):
        input_pos[index, : len(tree.tokens)] = torch.from_numpy(tree.depth) + start
    places = torch.cat(
        [
            torch.stack([torch.full((len(tree.sources),), index), torch.from_numpy(tree.sources)])
            for index, tree in enumerate(trees)
        ],
        dim=1,
    )
    (batch_index, source), place = torch.unique(places, dim=1, return_inverse=True)
    return AnswerBatch(
        tokens=tokens,
        batch_index=batch_index,
        source=source,
        place=place,
        targets=torch.cat([torch.from_numpy(tree.targets) for tree in trees]),
        input_pos=input_pos,
        mask=None if whole else _tree_mask(trees, tokens.shape[1]),
        runs=tuple(owners.count(index) for index in range(len(lengths))),
    )


def shape_of(plan: Plan) -> list[int]:
    """Number of passes of whole rows, then the number of branch passes of each round, largest first."""
    rounds = _rounds(plan)
    return [len(plan) - len(rounds), *(len(part.batches) for part in rounds)]


def fill_plan(plan: Plan, shape: Sequence[int], pad_id: int) -> Plan:
    """Add passes that don't count until a plan has a shape that is nowhere smaller than its own.

    Processes that share a model's layers must run the same passes, whatever rows each of them has.
    """
    blank = TokenRow([pad_id] * 3, 2)
    plain = [part for part in plan if isinstance(part, AnswerBatch)]
    plain += [_uncounted(plain_batch([blank], pad_id))] * (shape[0] - len(plain))
    rounds = [
        *_rounds(plan),
        *(
            replace(part, batches=tuple(_uncounted(batch) for batch in part.batches))
            for part in [plan_round([[blank]], 1, pad_id)] * (len(shape) - 1)
        ),
    ]
    filled = [
        replace(part, batches=part.batches + (_uncounted(part.batches[0]),) * (n_passes - len(part.batches)))
        for part, n_passes in zip(rounds, shape[1:], strict=False)
    ]
    return [*filled, *plain]


def _rounds(plan: Plan) -> list[Round]:
    return sorted((part for part in plan if isinstance(part, Round)), key=lambda part: -len(part.batches))


def _uncounted(batch: AnswerBatch) -> AnswerBatch:
    return replace(batch, counts=False)


def bundles(sizes: Sequence[int], limit: int) -> Iterator[range]:
    """Cut neighbours into runs whose sizes sum to at most ``limit``; what is larger stands alone."""
    start, total = 0, 0
    for index, size in enumerate(sizes):
        if index > start and total + size > limit:
            yield range(start, index)
            start, total = index, 0
        total += size
    if sizes:
        yield range(start, len(sizes))


def even_parts(whole: Sequence[Part], limit: int) -> Iterator[Sequence[Part]]:
    """Cut into as few parts of at most ``limit`` as will do, of nearly equal sizes."""
    n_parts = -(-len(whole) // limit)
    ends = [len(whole) * part // n_parts for part in range(n_parts + 1)] if n_parts else []
    return (whole[start:end] for start, end in pairwise(ends))


def padded(rows: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Rows of tokens filled up on the right, shape ``(len(rows), longest)``."""
    tokens = torch.full((len(rows), max(len(row) for row in rows)), pad_id, dtype=torch.long)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.tensor(row, dtype=torch.long)
    return tokens


def _tree_mask(trees: Sequence[TokenTree], width: int) -> Tensor:
    mask = np.tile(np.eye(width, dtype=np.bool_), (len(trees), 1, 1))  # padding sees itself: no softmax is empty
    for index, tree in enumerate(trees):
        size = len(tree.tokens)
        mask[index, :size, :size] = tree.attends
    return torch.from_numpy(mask)
