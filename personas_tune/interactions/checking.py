"""Every value of a log checked, and the log put in order."""

from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from personas_tune.errors import DataError, PersonasTuneError, raise_together
from personas_tune.interactions.log import MEND_ROW, Log, RawLog, encode_ids

_MAX_SECONDS = 1e11  # the year 5138: a larger one is in other units
_PER_SECOND = 1_000_000
_GRID_TOLERANCE = 1e-4  # of a step: float32 writes 9.7 as 9.69999981
_DECIMALS = 6  # as many as rating_labels writes


def build_log(
    raw: RawLog,
    *,
    rating_min: float,
    rating_max: float,
    rating_step: float,
    timestamp_unit: Literal["s", "ms"] = "s",
    duplicates: Literal["error", "first", "last"] = "error",
) -> Log:
    """Check every value of a log and put it in order; ties in time keep file order.

    Args:
        raw: The log as read.
        rating_min: Lowest rating of the scale.
        rating_max: Highest.
        rating_step: Distance between neighbouring ratings.
        timestamp_unit: Unit of timestamps that are plain numbers.
        duplicates: What to do when a user rated an item twice: refuse, or keep the first or last in time.

    Raises:
        DataError: For one mistake, with its file and row.
        SeveralErrors: For mistakes in several columns.
    """
    table = raw.table
    if table.num_rows == 0:
        raise DataError("no interactions", where=raw.source, remedy="check data.path")
    rating = table["rating"].to_numpy()
    mistakes = [
        _empty_id(raw, "user_id"),
        _empty_id(raw, "item_id"),
        _rating_mistake(raw, rating, rating_min, rating_max, rating_step),
        _time_mistake(raw, timestamp_unit),
    ]
    raise_together([mistake for mistake in mistakes if mistake is not None])
    user_ids, user = encode_ids(table["user_id"])
    item_ids, item = encode_ids(table["item_id"])
    time = _microseconds(raw, timestamp_unit)
    order = np.lexsort((time, user))
    on_grid = np.round(rating_min + np.round((rating - rating_min) / rating_step) * rating_step, _DECIMALS)
    log = Log(user_ids, item_ids, user[order], item[order], on_grid[order], time[order] // _PER_SECOND)
    return _without_duplicates(log, order, raw, duplicates)


def _empty_id(raw: RawLog, column: str) -> PersonasTuneError | None:
    text = raw.table[column]
    if pa.types.is_dictionary(text.type):
        text = text.unify_dictionaries()
        if "" not in {value.strip() for value in text.chunk(0).dictionary.to_pylist()}:
            return None
        text = text.cast(pa.string())
    empty = pc.equal(pc.utf8_trim_whitespace(text), "").to_numpy()
    if not empty.any():
        return None
    return DataError(f"empty {column}{_more(empty)}", where=raw.where(int(empty.argmax())), remedy=MEND_ROW)


def _rating_mistake(
    raw: RawLog, rating: NDArray[np.float64], low: float, high: float, step: float
) -> PersonasTuneError | None:
    finite = np.isfinite(rating)
    if not finite.all():
        index = int(finite.argmin())
        what = f"rating {rating[index]} is not a number{_more(~finite)}"
        return DataError(what, where=raw.where(index), remedy=MEND_ROW)
    steps = (rating - low) / step
    outside = (steps < -_GRID_TOLERANCE) | (steps > (high - low) / step + _GRID_TOLERANCE)
    wrong = outside | (np.abs(steps - np.round(steps)) > _GRID_TOLERANCE)
    if not wrong.any():
        return None
    index = int(wrong.argmax())
    scale = f"the scale {low:g} to {high:g} in steps of {step:g}"
    remedy = f"mend the row or set data.rating_scale (the log's ratings run from {rating.min():g} to {rating.max():g})"
    return DataError(f"rating {rating[index]:g} is not on {scale}{_more(wrong)}", where=raw.where(index), remedy=remedy)


def _time_mistake(raw: RawLog, unit: Literal["s", "ms"]) -> PersonasTuneError | None:
    if "timestamp" not in raw.table.column_names:
        return None
    column = raw.table["timestamp"]
    if pa.types.is_timestamp(column.type):
        microseconds = _microseconds(raw, unit)
        return _first_wrong_time(raw, microseconds / 1e6, microseconds < 0, "is before 1970", MEND_ROW)
    number = column.to_numpy()
    if (wrong := ~np.isfinite(number) | (number < 0)).any():
        return _first_wrong_time(raw, number, wrong, "is not a time", MEND_ROW)
    if unit == "ms" and number.max() < _MAX_SECONDS:
        too_early = "is too early for milliseconds"
        return _first_wrong_time(raw, number, number >= 0, too_early, "set data.timestamp_unit=s")
    late = number > (_MAX_SECONDS * 1000 if unit == "ms" else _MAX_SECONDS)
    remedy = "set data.timestamp_unit=ms" if unit == "s" else "write seconds or milliseconds since 1970"
    return _first_wrong_time(raw, number, late, f"is too late for {unit}", remedy)


def _microseconds(raw: RawLog, unit: Literal["s", "ms"]) -> NDArray[np.int64]:
    """Times to sort by, finer than the seconds that are kept; where there are none, rows count as seconds."""
    if "timestamp" not in raw.table.column_names:
        return np.arange(raw.table.num_rows, dtype=np.int64) * _PER_SECOND
    column = raw.table["timestamp"]
    if pa.types.is_timestamp(column.type):
        exact: NDArray[np.int64] = (
            column.cast(pa.timestamp("us", column.type.tz), safe=False).cast(pa.int64()).to_numpy()
        )
        return exact
    per_unit = _PER_SECOND / 1000 if unit == "ms" else _PER_SECOND
    rounded: NDArray[np.int64] = np.round(column.to_numpy() * per_unit).astype(np.int64)
    return rounded


def _first_wrong_time(
    raw: RawLog, values: NDArray[Any], wrong: NDArray[np.bool_], what: str, remedy: str
) -> PersonasTuneError | None:
    if not wrong.any():
        return None
    index = int(wrong.argmax())
    return DataError(f"timestamp {values[index]:.15g} {what}{_more(wrong)}", where=raw.where(index), remedy=remedy)


def _without_duplicates(
    log: Log, file_index: NDArray[np.int64], raw: RawLog, duplicates: Literal["error", "first", "last"]
) -> Log:
    pair = log.user.astype(np.int64) * len(log.item_ids) + log.item
    in_order = np.sort(pair)
    if not (in_order[1:] == in_order[:-1]).any():
        return log
    by_pair = np.argsort(pair, kind="stable")
    repeats = np.flatnonzero(pair[by_pair[1:]] == pair[by_pair[:-1]])
    if duplicates == "error":
        raise _duplicate_error(log, file_index, raw, by_pair[repeats], by_pair[repeats + 1])
    dropped = by_pair[repeats + 1] if duplicates == "first" else by_pair[repeats]
    keep = np.ones(len(pair), dtype=bool)
    keep[dropped] = False
    return log.rows(keep)


def _duplicate_error(
    log: Log, file_index: NDArray[np.int64], raw: RawLog, one: NDArray[np.int64], other: NDArray[np.int64]
) -> DataError:
    rows = np.sort(np.stack([file_index[one], file_index[other]]), axis=0)
    which = int(rows[1].argmin())
    user, item = log.user_ids[log.user[one[which]]].as_py(), log.item_ids[log.item[one[which]]].as_py()
    more = f" ({len(one)} such rows)" if len(one) > 1 else ""
    what = f"user {user!r} rates item {item!r} again, after row {raw.row_of(int(rows[0, which]))}{more}"
    remedy = "mend the log or set data.duplicates=first or last"
    return DataError(what, where=raw.where(int(rows[1, which])), remedy=remedy)


def _more(wrong: NDArray[np.bool_]) -> str:
    n_wrong = int(wrong.sum())
    return f" ({n_wrong} such rows)" if n_wrong > 1 else ""
