"""Rows that share a user's prefix, in the form that torchtune's own recipes can train on.

One sequence holds the prefix once, and behind it the branches: what follows the prefix in each row. A branch's
positions go on from the prefix, and it sees the prefix and itself but no other branch. So every token gets the
hidden state, and every answer the loss, that it has in a row of its own. A stock recipe hands all of that to its model,
since it calls ``model(**batch)`` with whatever its collate function returns.

Shapes: B sequences, S their length.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX, padded_collate_sft

from personas_tune.datasets.arguments import require_whole
from personas_tune.datasets.ratings import labelled, ratings_of
from personas_tune.datasets.token_tree import shared_length
from personas_tune.datasets.tokens import TokenRow
from personas_tune.errors import ConfigError
from personas_tune.schema import MemoriesSeen

COLLATE = "personas_tune.datasets.collate_shared_prefixes"


class PrefixItem(dict[str, Any]):
    """Rows that begin alike.

    It has no keys: a collate function that looks for any doesn't know of prefixes, and would train on something else.

    Args:
        prefix: The tokens that they share.
        branches: What follows in each, with ``tokens`` and ``labels``.
    """

    def __init__(self, prefix: list[int], branches: Sequence[Mapping[str, list[int]]]) -> None:
        super().__init__()
        self.prefix = prefix
        self.branches = branches

    def __missing__(self, key: str) -> Any:
        raise ConfigError(
            f"a collate function asks rows with a shared prefix for {key!r}", where="collate_fn",
            remedy=f"set collate_fn={COLLATE}, or use persona_rating_dataset where the recipe reads no collate_fn",
        )  # fmt: skip


class SharedPrefixDataset(Dataset[PrefixItem]):
    """Rows in groups that share a prefix.

    Args:
        rows: In any order.
        names: Of each row; only rows of equal names come into one group.
        rows_per_item: Most rows of a group.
        max_seq_len: Most tokens of a group, the prefix counted once; None for no limit. A longer row stands alone.
        seed: Which rows of a name come together.

    Attributes:
        groups: Row indices of each item.
    """

    def __init__(
        self,
        rows: Sequence[TokenRow],
        names: Sequence[str],
        *,
        rows_per_item: int,
        max_seq_len: int | None = None,
        seed: int = 0,
    ) -> None:
        self.rows = list(rows)
        groups: dict[str, list[list[int]]] = {}
        for index in np.random.default_rng(seed).permutation(len(self.rows)).tolist():
            mine = groups.setdefault(names[index], [[]])
            grown = [*mine[-1], index]
            if len(grown) == 1 or (len(grown) <= rows_per_item and self._fits(grown, max_seq_len)):
                mine[-1] = grown
            else:
                mine.append([index])
        self.groups = [group for mine in groups.values() for group in mine]

    def _fits(self, group: Sequence[int], max_seq_len: int | None) -> bool:
        if max_seq_len is None:
            return True
        rows = [self.rows[index] for index in group]
        return sum(len(row.tokens) for row in rows) - (len(rows) - 1) * shared_length(rows) <= max_seq_len

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> PrefixItem:
        rows = [self.rows[number] for number in self.groups[index]]
        start = shared_length(rows) if len(rows) > 1 else 0
        return PrefixItem(prefix=rows[0].tokens[:start], branches=[labelled(row, start) for row in rows])


def persona_prefix_dataset(
    tokenizer: Any,
    *,
    source: str,
    split: str = "train",
    persona: int | None = None,
    memories: MemoriesSeen = "both",
    rows_per_item: int = 4,
    seed: int = 0,
    packed: bool = False,
) -> SharedPrefixDataset:
    """Ratings to predict, as :func:`personas_tune.datasets.persona_rating_dataset`, but several of one user an item.

    What the rows begin with is run once. For torchtune recipes that read ``collate_fn``, which must be
    :func:`collate_shared_prefixes`. Loss and gradients of a step are those of the same rows on their own (without
    dropout, which draws once for a shared token).

    Args:
        tokenizer: A torchtune ``ModelTokenizer``; recipes pass theirs.
        source: ``output_dir`` of an experiment for which ``persona_raft`` has run.
        split: ``train`` or ``test``.
        persona: Only this persona's users; None for all.
        memories: ``short`` (profile), ``long`` (retrieved memories) or ``both``.
        rows_per_item: Most rows of an item; fewer where they would be longer than ``tokenizer.max_seq_len``
            together. The recipe's ``batch_size`` counts items.
        seed: Which rows of a user come together; the same ones in every epoch.
        packed: Must be false: packing gives every row a prefix of its own.

    Raises:
        ConfigError: If ``packed`` is asked for, or an argument can't be used.
        MissingInputError: If a stage hasn't run.
        PromptError: If a sample can't fit.

    Example:
        In a torchtune YAML::

            dataset:
              _component_: personas_tune.datasets.persona_prefix_dataset
              source: runs/quickstart
              rows_per_item: 8
            collate_fn: personas_tune.datasets.collate_shared_prefixes
            batch_size: 1
    """
    if packed:
        raise ConfigError(
            "shared prefixes can't be packed",
            where="dataset.packed",
            remedy="leave it out or use persona_rating_dataset",
        )
    require_whole("rows_per_item", rows_per_item, 1)
    require_whole("seed", seed, 0)
    ratings = ratings_of(tokenizer, source, split, persona, memories)
    names = [ratings.source.prefix_name(sample) for sample in ratings.samples]
    return SharedPrefixDataset(
        ratings.rows, names, rows_per_item=rows_per_item, max_seq_len=tokenizer.max_seq_len, seed=seed
    )


def collate_shared_prefixes(
    batch: Sequence[Mapping[str, Any]], padding_idx: int = 0, ignore_idx: int = CROSS_ENTROPY_IGNORE_IDX
) -> dict[str, Tensor]:
    """Batches items of :func:`persona_prefix_dataset`, of other datasets, or of both; recipes pass the arguments.

    Other datasets' items (``tokens``, ``labels``) are rows without a prefix. A batch of nothing else is torchtune's
    own, without mask.

    Returns:
        ``tokens``, ``labels`` and ``input_pos``, shape ``(B, S)``, and ``mask``, shape ``(B, S, S)``, true where a
        token attends. Labels stand as in a row: the recipes shift them.
    """
    if not any(isinstance(item, PrefixItem) for item in batch):
        collated: dict[str, Tensor] = padded_collate_sft(list(batch), padding_idx, ignore_idx)
        return collated
    laid_out = [_sequence(item, ignore_idx) for item in batch]
    tokens, labels, input_pos, owners = (
        pad_sequence([sequence[part] for sequence in laid_out], batch_first=True, padding_value=padding)
        for part, padding in enumerate((padding_idx, ignore_idx, 0, -1))
    )
    return {"tokens": tokens, "labels": labels, "input_pos": input_pos, "mask": _mask(owners)}


def _sequence(item: Mapping[str, Any], ignore_idx: int) -> Tensor:
    """Tokens, labels, positions, and whose each token is: the prefix's (0) or a branch's; shape ``(4, S)``."""
    prefix, branches = (item.prefix, item.branches) if isinstance(item, PrefixItem) else ([], [item])
    start = len(prefix)
    parts = [torch.tensor([prefix, [ignore_idx] * start, range(start), [0] * start], dtype=torch.long)]
    for number, branch in enumerate(branches, 1):
        length = len(branch["tokens"])
        positions = range(start, start + length)
        parts.append(torch.tensor([branch["tokens"], branch["labels"], positions, [number] * length]))
    return torch.cat(parts, dim=1)


def _mask(owners: Tensor) -> Tensor:
    """A token sees what stands before it of its own branch and of the prefix; padding sees padding."""
    size = owners.shape[1]
    earlier = torch.ones(size, size, dtype=torch.bool).tril()
    own, of_prefix = owners[:, :, None] == owners[:, None, :], owners[:, None, :] == 0
    return earlier & (own | of_prefix)
