"""A recommender's log: as a reader hands it over (`RawLog`), and checked and in order (`Log`)."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from personas_tune.errors import DataError

MEND_ROW = "mend or drop the row"


@dataclass(frozen=True)
class RawLog:
    """A log in file order, its values not yet checked.

    Args:
        table: Columns user_id and item_id (text, usually dictionary-encoded), rating (float64) and,
            if the log has times, timestamp (a number, or an Arrow timestamp).
        source: The file's name for messages.
        row_of: The row that an editor shows for a 0-based index of ``table``.
    """

    table: pa.Table
    source: str
    row_of: Callable[[int], int]

    def where(self, index: int) -> str:
        """File and row of one interaction, for messages."""
        return f"{self.source} row {self.row_of(index)}"


@dataclass(frozen=True)
class Log:
    """All interactions, sorted by user, then time, then file order.

    Args:
        user_ids: Every user's id in ascending order; ``user`` holds indices into it.
        item_ids: Every item's id in ascending order; ``item`` holds indices into it.
        user: User of each interaction, shape ``(n,)``.
        item: Item of each interaction, shape ``(n,)``.
        rating: Shape ``(n,)``.
        timestamp: Seconds, shape ``(n,)``; the 0-based row where the file has no times.
    """

    user_ids: pa.Array
    item_ids: pa.Array
    user: NDArray[np.int32]
    item: NDArray[np.int32]
    rating: NDArray[np.float64]
    timestamp: NDArray[np.int64]

    @property
    def n_per_user(self) -> NDArray[np.int64]:
        """How many interactions each user has, shape ``(n_users,)``."""
        return np.bincount(self.user, minlength=len(self.user_ids))

    @property
    def position(self) -> NDArray[np.int32]:
        """Each interaction's 0-based place in its user's history, shape ``(n,)``."""
        n_per_user = self.n_per_user
        first_rows = np.cumsum(n_per_user) - n_per_user
        return (np.arange(len(self.user)) - first_rows[self.user]).astype(np.int32)

    def rows(self, keep: NDArray[Any]) -> "Log":
        """The log of some interactions only, by mask or index; ids keep their numbers."""
        return replace(
            self, user=self.user[keep], item=self.item[keep], rating=self.rating[keep], timestamp=self.timestamp[keep]
        )


def encode_ids(column: pa.ChunkedArray) -> tuple[pa.Array, NDArray[np.int32]]:
    """Ids in ascending order, and each row's index into them."""
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    column = column.unify_dictionaries()
    ids = column.chunk(0).dictionary.cast(pa.string())
    codes = np.concatenate([chunk.indices.to_numpy(zero_copy_only=False) for chunk in column.chunks])
    order = pc.array_sort_indices(ids).to_numpy()
    rank = np.empty(len(order), dtype=np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    return ids.take(pa.array(order)), rank[codes]


def decode_ids(ids: pa.Array, codes: NDArray[np.int32]) -> pa.ChunkedArray:
    """The ids that ``codes`` stand for, in chunks small enough for Arrow's 2 GB of text each."""
    size = 1 << 20
    starts = range(0, max(len(codes), 1), size)
    return pa.chunked_array([ids.take(pa.array(codes[start : start + size])) for start in starts], type=pa.string())


def drop_users(log: Log, user_ids: Collection[str], where: str) -> Log:
    """The log without some users' interactions.

    Args:
        log: The log.
        user_ids: Whom to leave out; ids that the log doesn't have are ignored.
        where: Where those ids come from, for messages.

    Raises:
        DataError: If none of them is in the log, or nobody is left.
    """
    listed = pc.is_in(log.user_ids, value_set=pa.array(list(user_ids), type=pa.string()))
    dropped = listed.to_numpy(zero_copy_only=False)
    if not dropped.any():
        what = f"none of its {len(user_ids)} users is in the log"
        raise DataError(what, where=where, remedy="set data.cohort.exclude to a users.parquet made from the same log")
    if dropped.all():
        raise DataError("excludes every user of the log", where=where, remedy="exclude fewer users")
    return log.rows(~dropped[log.user])
