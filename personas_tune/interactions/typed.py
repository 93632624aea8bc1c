"""From the typed columns of JSON and Parquet to a log's."""

from collections.abc import Callable

import pyarrow as pa
import pyarrow.compute as pc

from personas_tune.errors import DataError
from personas_tune.interactions.log import MEND_ROW, RawLog
from personas_tune.interactions.text_files import first_line
from personas_tune.interactions.values import NUMBER, time_type, value_problem


def read_typed(table: pa.Table, source: str, row_of: Callable[[int], int]) -> RawLog:
    """A log from columns of any type that can stand for an id, a number or a time.

    Args:
        table: Columns user_id, item_id, rating and, if there are times, timestamp.
        source: The file's name for messages.
        row_of: The row that an editor shows for an index of ``table``.

    Raises:
        DataError: For a missing value or one that can't be converted, with its row.
    """
    columns = {}
    for column in table.column_names:
        values = _plain(table[column])
        if values.null_count:
            index = pc.index(pc.is_null(values), True).as_py()
            raise DataError(f"{column} is missing", where=f"{source} row {row_of(index)}", remedy=MEND_ROW)
        convert = {"rating": _as_number, "timestamp": _as_time}.get(column, _as_ids)
        try:
            columns[column] = convert(values)
        except pa.ArrowException as error:
            raise _name_bad_value(column, values, source, row_of, error) from error
    return RawLog(pa.table(columns), source, row_of)


def _plain(values: pa.ChunkedArray) -> pa.ChunkedArray:
    return values.cast(values.type.value_type) if pa.types.is_dictionary(values.type) else values


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _as_ids(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Ids as text; whole floats, as pandas writes integers beside gaps, lose their ``.0``."""
    if pa.types.is_floating(values.type):
        values = values.cast(pa.int64())
    if not (_is_text(values.type) or pa.types.is_integer(values.type)):
        raise pa.ArrowInvalid(f"ids of type {values.type}")
    encoded = values.dictionary_encode()
    return encoded.cast(pa.dictionary(pa.int32(), pa.string()))


def _as_number(values: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_boolean(values.type) or pa.types.is_temporal(values.type):
        raise pa.ArrowInvalid(f"numbers of type {values.type}")
    return values.cast(pa.float64())


def _as_time(values: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_timestamp(values.type):
        return values
    if pa.types.is_date(values.type):
        return values.cast(pa.timestamp("s"))
    time = _time_type(values)
    return _as_number(values) if time == NUMBER else values.cast(time)


def _time_type(values: pa.ChunkedArray) -> pa.DataType:
    return time_type(values[0].as_py()) if _is_text(values.type) and len(values) else NUMBER


def _name_bad_value(
    column: str, values: pa.ChunkedArray, source: str, row_of: Callable[[int], int], error: Exception
) -> DataError:
    if _is_text(values.type):
        time = _time_type(values)
        for index, value in enumerate(values):
            if problem := value_problem(column, value.as_py(), time):
                return DataError(problem, where=f"{source} row {row_of(index)}", remedy=MEND_ROW)
    what = f"{column} can't be read ({first_line(error)})"
    return DataError(what, where=source, remedy="write ids as text, ratings and times as numbers")
