"""Samples: interactions to predict, each with its persona and the memories it sees."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from personas_tune.embedding import EmbeddingSettings, load_embedder
from personas_tune.embedding.vectors import Embedder, Fittable, embed_repeated, require_same_space
from personas_tune.errors import DataError
from personas_tune.retrieval.index import MemoryIndex, build_index, retrieve
from personas_tune.retrieval.texts import RetrievalTexts
from personas_tune.workspace import read_json

# How many users a message names before it stops.
_NAMED = 5


def rows_of_split(interactions: pa.Table, split: Literal["train", "test"]) -> pa.Table:
    """The train or the test interactions, sorted by user and position."""
    rows = interactions.filter(pc.equal(interactions["split"], split))
    return rows.sort_by([("user_id", "ascending"), ("position", "ascending")])


def read_left_out(path: Path) -> list[str]:
    """The users that the distiller was allowed to leave without texts, sorted; they have no persona either.

    Raises:
        DataError: If the file is damaged.
    """
    why_of = read_json(path)
    if not isinstance(why_of, dict):
        raise DataError(
            "not a mapping of users to reasons", where=str(path), remedy="run `tune run persona_distill --config ...`"
        )
    return sorted(why_of)


def leave_out(interactions: pa.Table, user_ids: Sequence[str]) -> tuple[pa.Table, str]:
    """The interactions of all other users, and a line that says what was left out."""
    kept = interactions.filter(pc.invert(pc.is_in(interactions["user_id"], pa.array(user_ids, pa.string()))))
    named = ", ".join(user_ids[:_NAMED]) + (", ..." if len(user_ids) > _NAMED else "")
    n_rows = interactions.num_rows - kept.num_rows
    return kept, f"{len(user_ids)} users without a profile ({named}) and their {n_rows} interactions are left out"


@dataclass(frozen=True, eq=False)
class MemorySearch:
    """An embedder and the index of the memories that it embedded."""

    embedder: Embedder
    index: MemoryIndex

    def files(self) -> dict[str, bytes]:
        """Both as files by name, the embedder's under ``embedder/``."""
        embedder = {f"embedder/{name}": content for name, content in self.embedder.files().items()}
        return {**self.index.files(), **embedder}

    @classmethod
    def load(cls, folder: Path, embedding: EmbeddingSettings | None = None) -> "MemorySearch":
        """Read ``samples/index/`` again; it finds what it found when it was written.

        Args:
            folder: The index's folder.
            embedding: The means of the embedder, needed by those other than ``lsa``.

        Raises:
            MissingInputError: If a file isn't there.
            DataError: If files are damaged or don't belong together.
            ConfigError: If the embedder needs means that aren't given.
        """
        embedder, index = load_embedder(folder / "embedder", embedding), MemoryIndex.load(folder)
        require_same_space(index.space, embedder.space, where=str(folder))
        return cls(embedder, index)


def index_memories(
    unfitted: Fittable, texts: RetrievalTexts, train: pa.Table, memories: pa.Table
) -> MemorySearch | None:
    """Fit the embedder on train texts and index every memory that has a known word.

    Args:
        unfitted: The embedder.
        texts: What is embedded.
        train: The train interactions.
        memories: Memories of train interactions, one each.

    Returns:
        None when there are no memories to find.
    """
    if memories.num_rows == 0:
        return None
    memories = memories.sort_by([("user_id", "ascending"), ("position", "ascending")])
    embedder = unfitted.fit(texts.to_fit(train, memories))
    keys = embed_repeated(embedder, texts.keys(memories))
    known = memories.filter(pa.array(keys.is_known))
    index = build_index(known["user_id"].to_pylist(), known["position"].to_pylist(), keys.take(keys.is_known))
    return MemorySearch(embedder, index)


def find_memories(
    search: MemorySearch | None,
    texts: RetrievalTexts,
    rows: pa.Table,
    k: int,
    *,
    min_similarity: float | None = None,
    before_target: bool = False,
) -> list[list[int]]:
    """The memories that each row sees, most similar first; none without a search."""
    if search is None or rows.num_rows == 0:
        return [[] for _ in range(rows.num_rows)]
    return retrieve(
        search.index,
        rows["user_id"].to_pylist(),
        rows["position"].to_pylist(),
        embed_repeated(search.embedder, texts.queries(rows)),
        k,
        min_similarity=min_similarity,
        before_target=before_target,
    )


def samples_table(rows: pa.Table, personas: pa.Table, memory_positions: Sequence[Sequence[int]]) -> pa.Table:
    """Interactions as samples.

    Args:
        rows: Interactions, sorted by user and position.
        personas: Rows of ``personas.parquet``.
        memory_positions: What each interaction sees.

    Raises:
        DataError: If a user has no persona.
    """
    persona_of = dict(zip(personas["user_id"].to_pylist(), personas["persona"].to_pylist(), strict=True))
    user_ids = rows["user_id"].to_pylist()
    lacking = sorted(set(user_ids) - set(persona_of))
    if lacking:
        raise DataError(
            f"no persona for {len(lacking)} of {len(set(user_ids))} users of data/interactions.parquet",
            where=f"user {lacking[0]}",
            remedy="give them profiles (persona_distill) and run `tune run persona_cluster --config ...` again",
        )
    columns = {name: rows[name] for name in ("user_id", "item_id", "position", "rating")}
    persona = pa.array([persona_of[user_id] for user_id in user_ids], pa.int32())
    return pa.table(
        {**columns, "persona": persona, "memory_positions": pa.array(memory_positions, pa.list_(pa.int32()))}
    )


def with_neighbours(samples: pa.Table, ratings: NDArray[np.float64], n_neighbours: NDArray[np.int64]) -> pa.Table:
    """Samples with what like-minded users gave each item, in the columns neighbours_rating and n_neighbours.

    Args:
        samples: N samples.
        ratings: On the user's own scale, shape ``(N,)``.
        n_neighbours: How many users they rest on, shape ``(N,)``.
    """
    samples = samples.append_column("neighbours_rating", pa.array(ratings, pa.float64()))
    return samples.append_column("n_neighbours", pa.array(n_neighbours, pa.int32()))


def require_train_memories(memories: pa.Table, train: pa.Table) -> None:
    """Refuse memories of anything but train interactions: they tell a test row's rating in words.

    Raises:
        DataError: For the first memory that is foreign, or of which there are two.
    """
    names = ("user_id", "position", "item_id")
    allowed = set(zip(*(train[name].to_pylist() for name in names), strict=True))
    seen = set()
    for row in zip(*(memories[name].to_pylist() for name in names), strict=True):
        if row not in allowed or row in seen:
            user_id, position, item_id = row
            raise DataError(
                "two memories of one interaction" if row in seen else "a memory of no train interaction",
                where=f"memories.parquet user {user_id} position {position} item {item_id}",
                remedy="run `tune run persona_distill --config ...` again",
            )
        seen.add(row)
