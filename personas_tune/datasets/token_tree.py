"""Rows that begin alike, merged into a tree of tokens that one forward pass reads.

A token attends to its ancestors and itself, and its position is its depth, so the model computes
for every node exactly what it would compute for the row that ends there. The possible answers to
one prompt are thus read with the prompt computed once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from personas_tune.datasets.tokens import TokenRow


@dataclass(frozen=True)
class TokenTree:
    """Merged rows. S nodes, N answer tokens.

    Args:
        tokens: Token of each node, shape ``(S,)``.
        depth: Position of each node in its rows, shape ``(S,)``.
        attends: ``attends[i, j]`` if node i sees node j (an ancestor or itself), shape ``(S, S)``.
        sources: Node before each answer token of each row, rows one after another, shape ``(N,)``.
        targets: The answer tokens, shape ``(N,)``.
    """

    tokens: NDArray[np.int64]
    depth: NDArray[np.int64]
    attends: NDArray[np.bool_]
    sources: NDArray[np.int64]
    targets: NDArray[np.int64]


def build_token_tree(rows: Sequence[TokenRow], *, whole: bool = False) -> TokenTree:
    """Merge rows at their longest common prefixes.

    Rows are merged with their neighbours after sorting, which finds every common prefix.

    Args:
        rows: At least one row.
        whole: Whether a row's last token gets a node, too; nothing is predicted from it.
    """
    order = sorted(range(len(rows)), key=lambda index: rows[index].tokens)
    tokens: list[int] = []
    depth: list[int] = []
    segments: list[tuple[int, list[int]]] = []  # (first node, ancestors) of each run of new nodes
    paths: dict[int, list[int]] = {}
    path: list[int] = []
    previous: list[int] = []
    for index in order:
        row = rows[index].tokens if whole else rows[index].tokens[:-1]
        shared = common_prefix_length(previous, row)
        first = len(tokens)
        path = path[:shared]
        segments.append((first, path))
        tokens += row[shared:]
        depth += range(shared, len(row))
        path = path + list(range(first, len(tokens)))
        paths[index] = path
        previous = row
    sources = [paths[i][t - 1] for i, row in enumerate(rows) for t in range(row.answer_start, len(row.tokens))]
    targets = [token for row in rows for token in row.answer]
    return TokenTree(
        np.array(tokens, dtype=np.int64),
        np.array(depth, dtype=np.int64),
        _ancestor_mask(len(tokens), segments),
        np.array(sources, dtype=np.int64),
        np.array(targets, dtype=np.int64),
    )


def common_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two rows have in common at their beginnings."""
    limit = min(len(a), len(b))
    if a[:limit] == b[:limit]:
        return limit
    return next(i for i in range(limit) if a[i] != b[i])


def shared_length(rows: Sequence[TokenRow]) -> int:
    """Tokens that all rows share, short of the one from which an answer is predicted."""
    first = rows[0].tokens
    return min(min(common_prefix_length(first, row.tokens), row.answer_start - 1) for row in rows)


def _ancestor_mask(n_nodes: int, segments: Sequence[tuple[int, list[int]]]) -> NDArray[np.bool_]:
    mask = np.zeros((n_nodes, n_nodes), dtype=np.bool_)
    ends = [first for first, _ in segments[1:]] + [n_nodes]
    for (first, ancestors), end in zip(segments, ends, strict=True):
        mask[first:end, ancestors] = True
        mask[first:end, first:end] = np.tri(end - first, dtype=np.bool_)
    return mask
