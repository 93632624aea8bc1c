"""Exact search in one user's own memories.

All users' keys lie in one flat inner-product index, sorted by user and position, so that what a
sample may see is a contiguous range of rows: nothing outside the range can be found. Similarity is
the cosine, since all vectors have unit length.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from personas_tune.embedding.vectors import Embeddings, Space, npy_bytes, require_same_space
from personas_tune.errors import DataError, MissingInputError, RetrievalError

# A unit vector's cosine with itself is 1 only to this precision in float32.
_FLOOR_SLACK = 1e-6
_LENGTH_SLACK = 1e-3
_REMEDY = "remove samples/manifest.json and run `tune run persona_raft --config ...` again"


@dataclass(frozen=True, eq=False)
class MemoryIndex:
    """The keys of all users' memories; make one with :func:`build_index`.

    Args:
        user_ids: The users with memories, in row order.
        offsets: User ``i`` has the rows from ``offsets[i]`` up to ``offsets[i + 1]``, shape ``(n_users + 1,)``.
        positions: Each row's position within its user, rising, shape ``(n_rows,)``.
        keys: Unit vectors, shape ``(n_rows, dim)``.
        space: The space that the keys and every query lie in.
    """

    user_ids: list[str]
    offsets: NDArray[np.int64]
    positions: NDArray[np.int32]
    keys: NDArray[np.float32]
    space: Space

    @cached_property
    def _rows(self) -> dict[str, tuple[int, int]]:
        bounds = self.offsets.tolist()
        return {user_id: (bounds[i], bounds[i + 1]) for i, user_id in enumerate(self.user_ids)}

    @cached_property
    def _faiss(self) -> Any:
        faiss.omp_set_num_threads(1)
        index = faiss.IndexFlatIP(self.keys.shape[1])
        index.add(np.ascontiguousarray(self.keys))
        return index

    def nearest(
        self,
        user_id: str,
        query: NDArray[np.float32],
        k: int,
        *,
        min_similarity: float | None = None,
        own_position: int | None = None,
        before_position: int | None = None,
    ) -> list[int]:
        """Positions of a user's memories whose keys are most similar to ``query``.

        Equal to sorting all allowed rows by cosine (in float64), highest first, ties by position.

        Args:
            user_id: The user; one without memories finds nothing.
            query: A unit vector of the index's space, shape ``(dim,)``.
            k: At most so many are found.
            min_similarity: Less similar memories are left out.
            own_position: This position is never found.
            before_position: Only earlier positions are found.
        """
        start, stop = self._rows.get(user_id, (0, 0))
        if before_position is not None:
            stop = start + int(np.searchsorted(self.positions[start:stop], before_position))
        own_row = self._row_at(start, stop, own_position)
        n_own = 0 if own_row is None else 1
        if min(k, stop - start - n_own) < 1:
            return []
        rows = self._candidates(start, stop, query, k + n_own)
        if own_row is not None:
            rows = rows[rows != own_row]
        similarities = cosines(self.keys[rows], query)
        best = np.lexsort((rows, -similarities))[:k]
        if min_similarity is not None:
            best = best[similarities[best] >= min_similarity - _FLOOR_SLACK]
        return [int(position) for position in self.positions[rows[best]]]

    def _row_at(self, start: int, stop: int, position: int | None) -> int | None:
        if position is None:
            return None
        row = start + int(np.searchsorted(self.positions[start:stop], position))
        return row if row < stop and self.positions[row] == position else None

    def _candidates(self, start: int, stop: int, query: NDArray[np.float32], k: int) -> NDArray[np.int64]:
        """Rows among which the ``k`` nearest surely are, however float32 sums were rounded."""
        # Each of two scores may be off by dim roundings of 2^-24 of at most 1.
        slack = 2 * self.keys.shape[1] * 2.0**-24
        selector = faiss.IDSelectorRange(start, stop)
        parameters = faiss.SearchParameters(sel=selector)  # type: ignore[call-arg]
        n_asked = k + 1
        while True:
            n_asked = min(n_asked, stop - start)
            scores: NDArray[np.float32]
            rows: NDArray[np.int64]
            scores, rows = self._faiss.search(query[np.newaxis], n_asked, params=parameters)
            if n_asked == stop - start or scores[0, -1] < scores[0, k - 1] - slack:
                nearest: NDArray[np.int64] = rows[0]
                return nearest
            n_asked *= 4

    def files(self) -> dict[str, bytes]:
        """The index as files by name: JSON and plain arrays; FAISS's own format is never written."""
        described = {"user_ids": self.user_ids, "space": asdict(self.space)}
        return {
            "index.json": (json.dumps(described, ensure_ascii=False, indent=0, sort_keys=True) + "\n").encode(),
            "offsets.npy": npy_bytes(self.offsets),
            "positions.npy": npy_bytes(self.positions),
            "keys.npy": npy_bytes(self.keys),
        }

    @classmethod
    def load(cls, folder: Path) -> "MemoryIndex":
        """Read an index that was written as :meth:`files`.

        Raises:
            MissingInputError: If a file isn't there.
            DataError: If a file is damaged.
            RetrievalError: If a key is no unit vector.
        """
        try:
            described = json.loads((folder / "index.json").read_bytes())
            offsets, positions, keys = (
                np.load(folder / f"{name}.npy", allow_pickle=False) for name in ("offsets", "positions", "keys")
            )
            index = cls(described["user_ids"], offsets, positions, keys, Space(**described["space"]))
        except FileNotFoundError as error:
            raise MissingInputError("file of the index not found", where=str(error.filename), remedy=_REMEDY) from error
        except (ValueError, TypeError, KeyError, EOFError) as error:
            raise DataError(f"unreadable index ({error})", where=str(folder), remedy=_REMEDY) from error
        sizes = (len(index.user_ids) + 1, len(positions), (len(positions), index.space.dim))
        if sizes != (len(offsets), int(offsets[-1]), keys.shape):
            raise DataError("the index's files don't belong together", where=str(folder), remedy=_REMEDY)
        require_unit_vectors(keys, lambda row: f"key in row {row}")
        return index


def build_index(user_ids: Sequence[str], positions: Sequence[int], keys: Embeddings) -> MemoryIndex:
    """Put memories into one index.

    Args:
        user_ids: Each memory's user; equal ones must stand together.
        positions: Each memory's position, rising within a user.
        keys: Each memory's key.

    Raises:
        RetrievalError: If the order is another, or a key is zero, not a number or not of unit length.
    """
    row_positions = np.asarray(positions, dtype=np.int32)
    starts = [row for row in range(len(user_ids)) if row == 0 or user_ids[row] != user_ids[row - 1]]
    rises = np.diff(row_positions, prepend=-1) > 0
    rises[starts] = True
    if len({user_ids[row] for row in starts}) < len(starts) or not rises.all():
        raise RetrievalError(
            "memories aren't sorted by user and position, or two share a position", remedy="sort them and keep one each"
        )
    require_unit_vectors(keys.vectors, lambda row: f"memory of user {user_ids[row]} at position {positions[row]}")
    return MemoryIndex(
        user_ids=[user_ids[row] for row in starts],
        offsets=np.array([*starts, len(user_ids)], dtype=np.int64),
        positions=row_positions,
        keys=keys.vectors,
        space=keys.space,
    )


def cosines(keys: NDArray[np.float32], query: NDArray[np.float32]) -> NDArray[np.float64]:
    """Similarity of each key to the query, shape ``(n_keys,)``.

    Every row is summed by itself, so equal keys are equally similar to the last bit; a matrix
    product doesn't promise that.
    """
    similarities: NDArray[np.float64] = (keys.astype(np.float64) * query.astype(np.float64)).sum(axis=1)
    return similarities


def retrieve(
    index: MemoryIndex,
    user_ids: Sequence[str],
    positions: Sequence[int],
    queries: Embeddings,
    k: int,
    *,
    min_similarity: float | None = None,
    before_target: bool = False,
) -> list[list[int]]:
    """The positions of the memories that each sample sees, most similar first.

    A sample never sees its own memory. One whose query has no known word sees none.

    Args:
        index: The memories.
        user_ids: Each sample's user.
        positions: Each sample's position.
        queries: Each sample's query, in the space of the index.
        k: At most so many memories a sample.
        min_similarity: Less similar memories are left out.
        before_target: A sample sees only memories of earlier positions.

    Raises:
        DataError: If the queries come from another embedder or fit than the keys.
        RetrievalError: If a query is not a number or not of unit length.
    """
    require_same_space(index.space, queries.space, where="retrieval")
    is_known = queries.is_known
    known = np.flatnonzero(is_known)
    require_unit_vectors(
        queries.vectors[known], lambda row: f"query of user {user_ids[known[row]]} at position {positions[known[row]]}"
    )
    return [
        index.nearest(
            user_id,
            queries.vectors[row],
            k,
            min_similarity=min_similarity,
            own_position=position,
            before_position=position if before_target else None,
        )
        if is_known[row]
        else []
        for row, (user_id, position) in enumerate(zip(user_ids, positions, strict=True))
    ]


def require_unit_vectors(vectors: NDArray[np.float32], name_of: Callable[[int], str]) -> None:
    """Refuse vectors that have no direction or another length than 1.

    Args:
        vectors: Shape ``(n, dim)``.
        name_of: What the vector in a row is, for the message.

    Raises:
        RetrievalError: For the first such vector.
    """
    lengths = np.sqrt((vectors.astype(np.float64) ** 2).sum(axis=1))
    wrong = np.flatnonzero(~(np.abs(lengths - 1) <= _LENGTH_SLACK))  # a NaN compares as false
    if len(wrong):
        first = int(wrong[0])
        raise RetrievalError(
            f"vector of length {lengths[first]:g}, {len(wrong)} such in all",
            where=name_of(first),
            remedy="vectors must have length 1; check the embedder and the texts",
        )
