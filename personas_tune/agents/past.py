"""What of a user's past a prompt shows: memories found as ``persona_raft`` finds them, and like-minded users."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from personas_tune.agents.records import recorded
from personas_tune.agents.settings import AgentSettings
from personas_tune.collaborative.neighbours import neighbour_ratings
from personas_tune.embedding.vectors import Embeddings, embed_repeated
from personas_tune.prompts.render import ItemText, Neighbours
from personas_tune.retrieval.index import MemoryIndex, build_index
from personas_tune.retrieval.samples import MemorySearch
from personas_tune.retrieval.texts import ProfilesInTime, RetrievalTexts, item_text
from personas_tune.workspace import COLUMNS, MANIFEST, read_table

Asked = tuple[str, str]  # user_id, item_id


@dataclass
class Past:
    """All users' pasts, those of the cohort and of users met since.

    Args:
        retrieval: The settings of ``retrieval`` that the samples were made with.
        texts: What is embedded.
        search: The cohort's memories; None where prompts show none.
        train: The cohort's train interactions; None where prompts don't name like-minded users.
        outside: Ratings of users outside the cohort; None likewise.
        low: The scale's lowest rating.
        high: The scale's highest rating.
    """

    retrieval: Mapping[str, Any]
    texts: RetrievalTexts
    search: MemorySearch | None
    train: pa.Table | None
    outside: pa.Table | None
    low: float
    high: float
    _of_item: dict[str, str] = field(default_factory=dict)
    _indexes: dict[str, MemoryIndex | None] = field(default_factory=dict)
    _histories: dict[str, pa.Table] = field(default_factory=dict)

    @property
    def names_neighbours(self) -> bool:
        """Whether prompts say what like-minded users gave an item."""
        return self.train is not None

    @classmethod
    def of(cls, settings: AgentSettings, items: Mapping[str, ItemText], *, allow_paid_calls: bool) -> "Past":
        """The past as an experiment's stages left it.

        Args:
            settings: The agent's.
            items: The known items.
            allow_paid_calls: Whether texts may be embedded for money.

        Raises:
            DataError: If a file is damaged.
            ConfigError: If the embedder takes paid calls, and these aren't allowed.
        """
        retrieval, workspace = settings.made_with("samples", "retrieval"), settings.workspace
        shows_memories = settings.memories != "short" and retrieval["k"] > 0
        search = _load_search(settings, allow_paid_calls) if shows_memories else None
        scale = settings.cfg.data.rating_scale
        uses_profiles = retrieval["query"] == "user_and_item"
        profiles = ProfilesInTime(read_table(workspace.profiles, COLUMNS["profiles"])) if uses_profiles else None
        of_item = {item_id: _text_of(item) for item_id, item in items.items()}
        train = outside = None
        if retrieval["neighbours"]:
            interactions = read_table(workspace.interactions, COLUMNS["interactions"])
            train = interactions.filter(pc.field("split") == "train")
            outside = read_table(workspace.outside, ("user_id", "item_id", "rating"))
        # A user's profile as it is now is the last one, whatever earlier samples saw of it.
        texts = RetrievalTexts(retrieval["query"], of_item, profiles, "final")
        return cls(retrieval, texts, search, train, outside, scale.min, scale.max, of_item)

    def add_item(self, item_id: str, item: ItemText) -> None:
        """Make an item known that isn't in the catalogue."""
        self._of_item[item_id] = _text_of(item)

    def add_user(self, user_id: str, profile: str, memories: pa.Table) -> None:
        """Make a user known who isn't of the cohort.

        Args:
            user_id: The user.
            profile: Its profile.
            memories: Its memories, as ``memories.parquet`` has them, by position.
        """
        if self.texts.profiles is not None:
            self.texts.profiles.add(user_id, profile)
        self._histories[user_id] = memories
        self._indexes[user_id] = self._indexed(user_id, memories)

    def memories_for(self, asked: Sequence[Asked], own: Sequence[int | None]) -> list[tuple[int, ...]]:
        """The positions of the memories that each prompt shows, most similar first.

        Args:
            asked: Users and items.
            own: Where the user has rated the item, the position of that memory, which isn't shown.
        """
        if self.search is None or not asked:
            return [()] * len(asked)
        rows = _rows_table(asked, [None] * len(asked))
        queries = embed_repeated(self.search.embedder, self.texts.queries(rows))
        return [self._nearest(user_id, queries, row, own[row]) for row, (user_id, _) in enumerate(asked)]

    def neighbours_for(self, asked: Sequence[Asked], positions: Sequence[int]) -> list[Neighbours | None]:
        """What like-minded users gave each item; None for all where prompts don't say.

        Args:
            asked: Users and items.
            positions: One behind each user's last rating, or that of the user's own rating of the item.
        """
        found: list[Neighbours | None] = [None] * len(asked)
        if self.train is None:
            return found
        # A user met since changes nobody else's neighbours, so each is asked for alone.
        rows_of: dict[str | None, list[int]] = {}
        for row, (user_id, _) in enumerate(asked):
            rows_of.setdefault(user_id if user_id in self._histories else None, []).append(row)
        for user, rows in rows_of.items():
            train = self.train if user is None else _joined(self.train, self._histories[user])
            table = _rows_table([asked[row] for row in rows], [positions[row] for row in rows])
            for row, neighbours in zip(rows, self._neighbours(table, train), strict=True):
                found[row] = neighbours
        return found

    def _neighbours(self, rows: pa.Table, train: pa.Table) -> list[Neighbours]:
        k, scale = self.retrieval["neighbours"], {"low": self.low, "high": self.high}
        ratings, n_neighbours = neighbour_ratings(rows, train, self.outside, k, before_target=False, **scale)
        return [Neighbours(float(rating), int(n)) for rating, n in zip(ratings, n_neighbours, strict=True)]

    def _nearest(self, user_id: str, queries: Embeddings, row: int, own: int | None) -> tuple[int, ...]:
        assert self.search is not None
        index = self._indexes.get(user_id, self.search.index)
        if index is None or not queries.is_known[row]:
            return ()
        k, floor = self.retrieval["k"], self.retrieval["min_similarity"]
        return tuple(index.nearest(user_id, queries.vectors[row], k, min_similarity=floor, own_position=own))

    def _indexed(self, user_id: str, memories: pa.Table) -> MemoryIndex | None:
        if self.search is None or memories.num_rows == 0:
            return None
        keys = embed_repeated(self.search.embedder, self.texts.keys(memories))
        known = np.flatnonzero(keys.is_known)
        positions = memories["position"].to_pylist()
        return build_index([user_id] * len(known), [positions[row] for row in known], keys.take(known))


def _load_search(settings: AgentSettings, allow_paid_calls: bool) -> MemorySearch | None:
    samples = settings.workspace.root / "samples"
    if "index/index.json" not in recorded(samples / MANIFEST, "outputs"):  # there was no memory to find
        return None
    means = settings.embedding_if(allow_paid_calls, "retrieval")
    return MemorySearch.load(samples / "index", means)


def _rows_table(asked: Sequence[Asked], positions: Sequence[int | None]) -> pa.Table:
    """As ``interactions.parquet`` has them, without ratings."""
    columns = {"user_id": [user for user, _ in asked], "item_id": [item for _, item in asked]}
    return pa.table({**columns, "position": pa.array(positions, pa.int32())})


def _joined(train: pa.Table, history: pa.Table) -> pa.Table:
    columns = ["user_id", "item_id", "position", "rating"]
    return pa.concat_tables([train.select(columns), history.select(columns)], promote_options="permissive")


def _text_of(item: ItemText) -> str:
    return item_text(asdict(item))
