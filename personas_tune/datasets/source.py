"""A finished experiment's tables as prompts: who rates what, knowing what."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from personas_tune.errors import DataError
from personas_tune.prompts.render import ItemText, Neighbours, PromptParts, label_of
from personas_tune.prompts.templates import TRAITS, Template, find_template
from personas_tune.retrieval.texts import ProfilesInTime
from personas_tune.schema import MemoriesSeen
from personas_tune.workspace import COLUMNS, Workspace, read_json, read_table

_MADE_APART = "run `tune run persona_raft --config ...` again"  # the tables come from different runs

Tiers: TypeAlias = tuple[int, int, int]
Key = TypeVar("Key")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Sample:
    """One rating to predict: a row of ``samples/train.parquet`` or ``test.parquet``."""

    user_id: str
    item_id: str
    position: int
    rating: float
    persona: int
    memory_positions: tuple[int, ...]
    neighbours: Neighbours | None = None

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"user {self.user_id}, item {self.item_id} (position {self.position})"


class RatingSource:
    """The prompts of one experiment, read from the files that its earlier stages wrote.

    Args:
        output_dir: The experiment's folder, with ``data/``, ``memory/`` and ``samples/`` in it.

    Raises:
        MissingInputError: If a stage hasn't run; names its recipe.
        DataError: If a file is damaged.
    """

    def __init__(self, output_dir: str | Path) -> None:
        self.workspace = Workspace.at(output_dir)
        settings = _prompt_settings(self.workspace.prompt_settings)
        self.labels: tuple[str, ...] = tuple(settings["labels"])
        self.template: Template = find_template(settings["template"])
        self._profile_choice: str = settings["profile"]
        self._items = {row["item_id"]: _item_text(row) for row in _rows(self.workspace.items, "items")}
        self._tiers: dict[str, Tiers] = {
            row["user_id"]: tuple(row[f"{name}_tier"] for name in TRAITS)
            for row in _rows(self.workspace.users, "users")
        }
        self._memories = {
            (row["user_id"], row["position"]): row["memory"] for row in _rows(self.workspace.memories, "memories")
        }
        self._profiles = ProfilesInTime(read_table(self.workspace.profiles, COLUMNS["profiles"]))

    @property
    def items(self) -> Mapping[str, ItemText]:
        """Every known item by id."""
        return self._items

    def add_item(self, item_id: str, item: ItemText) -> None:
        """Make an item known that isn't in ``data/items.parquet``, for samples to name."""
        self._items[item_id] = item

    def add_user(self, user_id: str, tiers: Tiers, profile: str, memories: Sequence[str]) -> None:
        """Make a user known who isn't of the cohort, for samples to name.

        Args:
            user_id: What samples call it.
            tiers: Of its traits, each 1 to 3.
            profile: Its profile.
            memories: Its memories, that of position 0 first.
        """
        self._tiers[user_id] = tiers
        self._profiles.add(user_id, profile)
        self._memories.update({(user_id, position): memory for position, memory in enumerate(memories)})

    def samples(self, split: str) -> list[Sample]:
        """The samples of ``train`` or ``test``, ordered by user and position.

        Raises:
            DataError: If ``split`` is neither.
        """
        files = {"train": self.workspace.train_samples, "test": self.workspace.test_samples}
        if split not in files:
            raise DataError(f"no split {split!r}", where="split", remedy="use train or test")
        return [
            Sample(
                row["user_id"], row["item_id"], row["position"], row["rating"], row["persona"],
                tuple(row["memory_positions"]), _neighbours(row),
            )
            for row in _rows(files[split], "samples")
        ]  # fmt: skip

    def parts(self, sample: Sample, memories: MemoriesSeen) -> PromptParts:
        """All that the agent is told before it rates ``sample``.

        Args:
            sample: The rating to predict.
            memories: ``short`` shows the profile, ``long`` the retrieved memories, ``both`` both.

        Raises:
            DataError: If a table lacks what the sample refers to.
        """
        return PromptParts(
            tiers=_look_up(self._tiers, sample.user_id, "the user has no row in data/users.parquet", sample),
            profile=self._profile(sample) if memories != "long" else None,
            labels=self.labels,
            memories=self._retrieved(sample) if memories != "short" else (),
            item=_look_up(self._items, sample.item_id, "the item has no row in data/items.parquet", sample),
            neighbours=sample.neighbours,
        )

    def prefix_name(self, sample: Sample) -> str:
        """Names what a sample's prompt begins with: samples of one name share user and profile."""
        return f"{sample.user_id} {zlib.crc32(self._profile(sample).encode())}"

    def label(self, sample: Sample) -> str:
        """The answer: the true rating as text."""
        return label_of(sample.rating, self.labels)

    def _profile(self, sample: Sample) -> str:
        final = self._profiles.final(sample.user_id)
        if not final:
            raise DataError(
                "user has no profile", where=sample.name, remedy="run `tune run persona_distill --config ...` again"
            )
        return final if self._profile_choice == "final" else self._profiles.before(sample.user_id, sample.position)

    def _retrieved(self, sample: Sample) -> tuple[str, ...]:
        return tuple(
            _look_up(self._memories, (sample.user_id, position), f"no memory at position {position}", sample)
            for position in sample.memory_positions
        )


def _look_up(table: Mapping[Key, Value], key: Key, lack: str, sample: Sample) -> Value:
    if key not in table:
        raise DataError(lack, where=sample.name, remedy=_MADE_APART)
    return table[key]


def _prompt_settings(path: Path) -> dict[str, Any]:
    settings = read_json(path)
    missing = [key for key in ("labels", "template", "profile") if key not in settings]
    if missing:
        raise DataError(f"no {missing[0]!r} in it", where=str(path), remedy=_MADE_APART)
    return dict(settings)


def _rows(path: Path, table: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_table(path, COLUMNS[table]).to_pylist()
    return rows


def _neighbours(row: dict[str, Any]) -> Neighbours | None:
    rating = row.get("neighbours_rating")
    return None if rating is None else Neighbours(rating, row["n_neighbours"])


def _item_text(row: dict[str, Any]) -> ItemText:
    return ItemText(
        title=row["title"],
        year=row["year"],
        genres=tuple(row["genres"] or ()),
        mean_rating=row["mean_rating"],
        n_ratings=row["n_ratings"],
        summary=row["summary"],
        cast=tuple(row["cast"] or ()),
    )


def of_persona(samples: Sequence[Sample], persona: int | None) -> list[Sample]:
    """The samples of one persona's users; all of them for None.

    Raises:
        DataError: If the persona has no sample.
    """
    if persona is None:
        return list(samples)
    chosen = [sample for sample in samples if sample.persona == persona]
    if not chosen:
        known = ", ".join(str(number) for number in sorted({sample.persona for sample in samples}))
        raise DataError(f"persona {persona} has no sample", where="samples", remedy=f"the personas are {known}")
    return chosen
