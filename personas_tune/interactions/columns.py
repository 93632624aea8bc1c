"""Which column of a log is the user, the item, the rating and the time."""

import difflib
from collections.abc import Mapping, Sequence

from personas_tune.errors import ConfigError, DataError, PersonasTuneError, raise_together

# Compared without case and underscores: user_id, userId and userID are one name.
LOG_ALIASES: dict[str, tuple[str, ...]] = {
    "user_id": ("userid", "user", "uid"),
    "item_id": ("itemid", "movieid", "item", "parentasin"),
    "rating": ("rating", "score", "stars"),
    "timestamp": ("timestamp", "ts", "time", "datetime"),
}
REQUIRED = ("user_id", "item_id", "rating")


def find_alias(names: Sequence[str], aliases: Sequence[str]) -> str | None:
    """The first of ``names`` that one of ``aliases`` stands for, earlier aliases first."""
    plain = {_plain(name): name for name in reversed(names)}
    return next((plain[alias] for alias in aliases if alias in plain), None)


def pick_columns(names: Sequence[str], overrides: Mapping[str, str], where: str) -> dict[str, str]:
    """The file's own name of each of a log's columns; ``timestamp`` may be absent.

    Args:
        names: The file's column names.
        overrides: ``data.columns``: a log column to the file's name of it.
        where: File and row of the names, for messages.

    Raises:
        ConfigError: For an override that names no column.
        DataError: If a column is missing.
        SeveralErrors: For several of these.
    """
    mistakes: list[PersonasTuneError] = []
    picked: dict[str, str] = {}
    for column, aliases in LOG_ALIASES.items():
        if column in overrides:
            name: str | None = overrides[column]
            if name not in names:
                mistakes.append(_unknown_override(column, overrides[column], names))
        else:
            name = find_alias(names, aliases)
        if name is not None:
            picked[column] = name
    missing = [column for column in REQUIRED if column not in picked and column not in overrides]
    if missing:
        mistakes.append(_missing_columns(missing, names, where))
    raise_together(mistakes)
    return picked


def _plain(name: str) -> str:
    return name.strip().casefold().replace("_", "")


def _unknown_override(column: str, name: str, names: Sequence[str]) -> ConfigError:
    near = difflib.get_close_matches(name, names, n=1)
    remedy = f"did you mean {near[0]}?" if near else f"the columns are {_listed(names)}"
    return ConfigError(f"the log has no column {name!r}", where=f"data.columns.{column}", remedy=remedy)


def _missing_columns(missing: Sequence[str], names: Sequence[str], where: str) -> DataError:
    remedy = f"add a header line, or set data.columns.{missing[0]} to one of these names"
    return DataError(f"no {', '.join(missing)} column among {_listed(names)}", where=where, remedy=remedy)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:12])
    return f"{shown}, ..." if len(names) > 12 else shown
