"""The ``file`` distiller: profiles and memories that the user wrote elsewhere."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from personas_tune.errors import ConfigError, DistillError, MissingInputError, PersonasTuneError, raise_together
from personas_tune.memory.history import train_rows
from personas_tune.memory.imported_rows import ImportedRow, read_rows
from personas_tune.memory.tables import Distilled, memories_table, profiles_table
from personas_tune.workspace import home_path

Key = TypeVar("Key")

MAX_NAMED = 5  # users or pairs named in a message
MAX_ERRORS = 20  # lines of one kind before "and N more"


def distill_from_files(
    interactions: pa.Table, users: pa.Table, *, profiles_path: Path, memories_path: Path | None, max_words: int
) -> Distilled:
    """Import profiles, and memories if there is a file of them.

    Users outside the cohort are ignored, and so are pairs that are no interaction of the cohort; the
    notes count them. Without a file of memories there are none.

    Args:
        interactions: All interactions of the cohort. Of the test rows only the pairs of ids are read,
            to refuse memories of them.
        users: The cohort.
        profiles_path: Columns user_id, profile and, optionally, upto_position (how many train
            interactions the writer had seen; all of them if not given).
        memories_path: Columns user_id, item_id, memory.
        max_words: Bound on each text.

    Raises:
        DistillError: For one mistake.
        SeveralErrors: For several.
    """
    train = train_rows(interactions)
    n_train = dict.fromkeys(sorted(users["user_id"].to_pylist()), 0)
    for row in train.group_by("user_id").aggregate([([], "count_all")]).to_pylist():
        n_train[row["user_id"]] = row["count_all"]
    profiles, profile_notes = _import_profiles(profiles_path, n_train, max_words)
    memories = memories_table([])
    memory_notes: list[str] = []
    if memories_path is not None:
        test = interactions.filter(pc.not_equal(interactions["split"], "train")).select(["user_id", "item_id"])
        test_pairs = set(zip(test["user_id"].to_pylist(), test["item_id"].to_pylist(), strict=True))
        memories, memory_notes = _import_memories(memories_path, train, set(n_train), test_pairs, max_words)
    return Distilled(profiles, memories, (*profile_notes, *memory_notes))


def find_file(path: str | None, key: str) -> Path:
    """The file that a config key names.

    Raises:
        ConfigError: If the key isn't set.
        MissingInputError: If the file isn't there.
    """
    if path is None:
        raise ConfigError(
            "is not set, but distill.distiller=file reads it",
            where=key,
            remedy=f"set {key} to a CSV, JSONL or Parquet file",
        )
    file = home_path(path)
    if not file.is_file():
        raise MissingInputError(
            f"{path} not found", where=key, remedy="check the path (it counts from the current folder)"
        )
    return file


def _import_profiles(path: Path, n_train: dict[str, int], max_words: int) -> tuple[pa.Table, list[str]]:
    errors: list[PersonasTuneError] = []
    texts: dict[tuple[str, int], str] = {}
    seen: set[str] = set()
    n_foreign = 0
    for row in read_rows(path, ["user_id", "profile"], ["upto_position"]):
        try:
            user_id = _required(row, "user_id")
            if user_id not in n_train:
                n_foreign += 1
                continue
            seen.add(user_id)
            key = user_id, _upto(row, n_train[user_id])
            _put(texts, key, row, _text(row, "profile", max_words), f"profile of user {user_id}")
        except DistillError as error:
            errors.append(error)
    errors += _lacking_profiles(path, [user_id for user_id in n_train if user_id not in seen], len(n_train))
    _raise_first(errors)
    notes = _ignored(path, n_foreign, "users outside the cohort")
    return profiles_table(((user, upto, text) for (user, upto), text in texts.items()), "file"), notes


def _import_memories(
    path: Path, train: pa.Table, cohort: set[str], test_pairs: set[tuple[str, str]], max_words: int
) -> tuple[pa.Table, list[str]]:
    wanted = {(row["user_id"], row["item_id"]): row for row in train.to_pylist()}
    errors: list[PersonasTuneError] = []
    texts: dict[tuple[str, str], str] = {}
    seen: set[tuple[str, str]] = set()
    leaks: list[str] = []
    n_foreign = n_unknown = 0
    for row in read_rows(path, ["user_id", "item_id", "memory"]):
        try:
            pair = _required(row, "user_id"), _required(row, "item_id")
            if pair in wanted:
                seen.add(pair)
                _put(texts, pair, row, _text(row, "memory", max_words), f"memory of {_pair(pair)}")
            elif pair in test_pairs:
                leaks.append(f"{_pair(pair)} in {row.where}")
            elif pair[0] in cohort:
                n_unknown += 1
            else:
                n_foreign += 1
        except DistillError as error:
            errors.append(error)
    errors += _leaking_memories(path, leaks)
    errors += _lacking_memories(path, [pair for pair in wanted if pair not in seen], len(wanted))
    _raise_first(errors)
    notes = _ignored(path, n_foreign, "users outside the cohort") + _ignored(
        path, n_unknown, "pairs not in data/interactions.parquet"
    )
    rows = [(*pair, row["position"], row["rating"], texts[pair]) for pair, row in wanted.items()]
    return memories_table(rows), notes


def _lacking_profiles(path: Path, user_ids: Sequence[str], n_users: int) -> list[PersonasTuneError]:
    if not user_ids:
        return []
    some = ", ".join(user_ids[:MAX_NAMED]) + (", ..." if len(user_ids) > MAX_NAMED else "")
    what = f"{len(user_ids)} of {n_users} users of the cohort lack a profile: {some}"
    return [DistillError(what, where=str(path), remedy="add their rows, or use distill.distiller=template")]


def _lacking_memories(path: Path, pairs: Sequence[tuple[str, str]], n_train: int) -> list[PersonasTuneError]:
    if not pairs:
        return []
    what = f"{len(pairs)} of {n_train} train interactions lack a memory, such as {_pair(pairs[0])}"
    remedy = "add their rows, or leave distill.memories_path out and set retrieval.k=0"
    return [DistillError(what, where=str(path), remedy=remedy)]


def _leaking_memories(path: Path, leaks: Sequence[str]) -> list[PersonasTuneError]:
    if not leaks:
        return []
    what = f"{len(leaks)} memories are of test interactions, such as {leaks[0]}"
    return [DistillError(what, where=str(path), remedy="remove them: what is to be predicted must not be told")]


def _ignored(path: Path, count: int, what: str) -> list[str]:
    return [f"{path}: {count} rows of {what} ignored"] if count else []


def _required(row: ImportedRow, name: str) -> str:
    value = row[name]
    if value is None:
        raise DistillError(f"{name} is empty", where=row.where, remedy="fill it in or remove the row")
    return value


def _text(row: ImportedRow, name: str, max_words: int) -> str:
    text = _required(row, name)
    n_words = len(text.split())
    if n_words > max_words:
        raise DistillError(
            f"{name} has {n_words} words, more than {max_words}",
            where=row.where,
            remedy=f"shorten it or set distill.max_words={n_words}",
        )
    return text


def _upto(row: ImportedRow, n_train: int) -> int:
    value = row["upto_position"]
    if value is None:
        return n_train
    if not value.isdecimal() or int(value) > n_train:
        raise DistillError(
            f"upto_position {value} is not a number from 0 to the user's {n_train} train interactions",
            where=row.where,
            remedy="a profile must not have seen more than these",
        )
    return int(value)


def _put(texts: dict[Key, str], key: Key, row: ImportedRow, text: str, what: str) -> None:
    if key in texts:
        raise DistillError(f"second {what}", where=row.where, remedy="keep one")
    texts[key] = text


def _pair(pair: tuple[str, str]) -> str:
    return f"user {pair[0]} item {pair[1]}"


def _raise_first(errors: Iterable[PersonasTuneError]) -> None:
    """Raise the errors, of many the first ones and a count of the rest."""
    errors = list(errors)
    if len(errors) > MAX_ERRORS:
        rest = DistillError(f"and {len(errors) - MAX_ERRORS} more mistakes of these kinds")
        errors = [*errors[:MAX_ERRORS], rest]
    raise_together(errors)
