"""Reads one user's rows of an experiment's tables, whichever of them are there."""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from personas_tune.errors import ConfigError, raise_together
from personas_tune.memory.changes import compare_profiles
from personas_tune.memory.history import keep_train, title_with_year
from personas_tune.memory.lookup import read_column, read_matching
from personas_tune.memory.user_view import Persona, Rated, Step, Trait, UserView
from personas_tune.workspace import STAGE_RECIPES, Workspace, missing_inputs, read_json

TRAITS = ("activity", "conformity", "diversity")
_INTERACTIONS = ("user_id", "item_id", "rating", "position", "split")
_ITEMS = ("item_id", "title", "year", "mean_rating")
_NAMED_USERS = 3


@dataclass(frozen=True)
class UserTables:
    """Where the tables lie; all but the profiles may be absent.

    Attributes:
        personas: None where personas are not to be shown.
        left_out: Why some users have no texts, by user; None where that is not to be told.
    """

    interactions: Path
    items: Path
    users: Path
    profiles: Path
    memories: Path
    personas: Path | None = None
    left_out: Path | None = None

    @classmethod
    def of(cls, workspace: Workspace) -> "UserTables":
        """Those of an experiment."""
        return cls(
            interactions=workspace.interactions,
            items=workspace.items,
            users=workspace.users,
            profiles=workspace.profiles,
            memories=workspace.memories,
            personas=workspace.personas,
            left_out=workspace.left_out,
        )


def read_user(user_id: str, tables: UserTables) -> UserView:
    """Read one user's rows of all tables that are there.

    Raises:
        MissingInputError: If there are no profiles.
        ConfigError: If there is no such user.
        DataError: If a table is damaged or lacks a column.
    """
    raise_together(missing_inputs([tables.profiles]))
    users = _rows_of(user_id, tables.users, ("user_id", *TRAITS, *map(_tier, TRAITS)))
    profiles = _rows_of(user_id, tables.profiles, ("user_id", "upto_position", "profile", "distiller"))
    if not users and not profiles:
        raise _unknown(user_id, tables.users if tables.users.is_file() else tables.profiles)
    profiles.sort(key=lambda row: row["upto_position"])
    rated, n_test = _read_history(user_id, tables)
    persona = _read_persona(user_id, tables.personas)
    notes = [*_absent_tables(tables), *_absent_texts(user_id, tables, bool(profiles), rated)]
    if persona is None and tables.personas is not None and tables.personas.is_file():
        notes.append("persona: this user has none")
    return UserView(
        user_id=user_id,
        steps=tuple(_steps(profiles, rated)),
        n_test=n_test,
        distiller=profiles[-1]["distiller"] if profiles else None,
        traits=tuple(Trait(name, row[name], row[_tier(name)]) for row in users for name in TRAITS),
        persona=persona,
        notes=tuple(notes),
    )


def read_user_ids(path: Path) -> pa.Array:
    """The user ids of a table, each once, sorted.

    Raises:
        DataError: If the file is damaged or has no such column.
    """
    ids = read_column(path, "user_id").unique()
    return ids.take(pc.array_sort_indices(ids))


def _rows_of(user_id: str, path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    return read_matching(path, columns, "user_id", [user_id]).to_pylist() if path.is_file() else []


def _tier(trait: str) -> str:
    return f"{trait}_tier"


def _read_history(user_id: str, tables: UserTables) -> tuple[list[Rated], int]:
    """The train interactions with all that is known of them, and how many test interactions there are."""
    if not tables.interactions.is_file():
        return [], 0
    interactions = read_matching(tables.interactions, _INTERACTIONS, "user_id", [user_id])
    train = keep_train(interactions).sort_by("position").to_pylist()
    items = _items([row["item_id"] for row in train], tables.items)
    memories = {
        row["position"]: row["memory"] for row in _rows_of(user_id, tables.memories, ("user_id", "position", "memory"))
    }
    rated = []
    for number, row in enumerate(train, 1):
        title, others = items.get(row["item_id"], (row["item_id"], None))
        rated.append(Rated(number, title, row["rating"], others, memories.get(row["position"])))
    return rated, interactions.num_rows - len(train)


def _items(item_ids: Sequence[str], path: Path) -> dict[str, tuple[str, float | None]]:
    """Title and average of each item that is known."""
    if not item_ids or not path.is_file():
        return {}
    titles = {}
    for row in read_matching(path, _ITEMS, "item_id", item_ids).to_pylist():
        title = title_with_year(row["title"] or row["item_id"], row["year"])
        titles[row["item_id"]] = title, row["mean_rating"]
    return titles


def _read_persona(user_id: str, path: Path | None) -> Persona | None:
    if path is None:
        return None
    own = _rows_of(user_id, path, ("user_id", "persona", "distance"))
    if not own:
        return None
    number, all_users = own[0]["persona"], read_column(path, "persona")
    n_members = pc.sum(pc.equal(all_users, number)).as_py()
    return Persona(number, own[0]["distance"], n_members, len(all_users))


def _steps(profiles: Sequence[dict[str, Any]], rated: Sequence[Rated]) -> Iterator[Step]:
    begin, before = 0, None
    for row in profiles:
        upto, profile = row["upto_position"], row["profile"]
        changes = () if before is None else tuple(compare_profiles(before, profile))
        yield Step(upto, tuple(rated[begin:upto]), profile, changes)
        begin, before = upto, profile
    if begin < len(rated):
        yield Step(len(rated), tuple(rated[begin:]), None)


def _absent_tables(tables: UserTables) -> Iterator[str]:
    wanted = {
        "history": ("data", tables.interactions),
        "titles": ("data", tables.items),
        "traits": ("data", tables.users),
        "memories": ("memory", tables.memories),
        "persona": ("personas", tables.personas),
    }
    for what, (stage, path) in wanted.items():
        if path is not None and not path.is_file():
            yield f"{what}: {STAGE_RECIPES[stage]} hasn't run (no {stage}/{path.name})"


def _absent_texts(user_id: str, tables: UserTables, has_profiles: bool, rated: Sequence[Rated]) -> Iterator[str]:
    if not has_profiles:
        why = read_json(tables.left_out) if tables.left_out is not None and tables.left_out.is_file() else {}
        reason = why.get(user_id) if isinstance(why, dict) else None
        yield f"profile: left out ({reason})" if reason else "profile: this user has none"
    elif rated and tables.memories.is_file() and not any(each.memory for each in rated):
        yield "memories: this user has none"


def _unknown(user_id: str, path: Path) -> ConfigError:
    ids = read_user_ids(path).to_pylist()
    near = difflib.get_close_matches(user_id, ids, n=_NAMED_USERS)
    hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(ids[:_NAMED_USERS])} and others"
    return ConfigError(f"no user {user_id!r} among its {len(ids)} users", where=str(path), remedy=hint)
