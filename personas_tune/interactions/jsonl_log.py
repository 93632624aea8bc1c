"""Logs with one JSON object a line, such as Amazon Reviews."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.json as pa_json

from personas_tune.errors import DataError
from personas_tune.interactions.columns import pick_columns
from personas_tune.interactions.log import MEND_ROW, RawLog
from personas_tune.interactions.text_files import text_lines
from personas_tune.interactions.typed import read_typed
from personas_tune.interactions.values import id_text

_IDS = ("user_id", "item_id")
_REMEDY = "write one object a line"
_BLOCK_BYTES = 1 << 24  # an object must fit into a block


def read_jsonl_log(path: Path, columns: Mapping[str, str], encoding: str = "utf-8") -> RawLog:
    """Read a log from JSON lines; the first object's keys are the columns.

    Raises:
        ConfigError: For an entry of ``columns`` that the first object doesn't have.
        DataError: For a missing column or a row that can't be read.
    """
    first = next(json_rows(path, encoding), None)
    if first is None:
        raise DataError("empty file", where=str(path), remedy="check data.path")
    row, sample = first
    picked = pick_columns(list(sample), columns, f"{path} row {row}")
    try:
        table = _read_fast(path, picked, sample) if encoding == "utf-8" else None
    except (pa.ArrowException, OSError):
        table = None
    if table is None:
        table = _read_slowly(path, picked, encoding)
    return read_typed(table, str(path), lambda index: _row_number(path, encoding, index))


def json_rows(path: Path, encoding: str = "utf-8") -> Iterator[tuple[int, dict[str, Any]]]:
    """Row number and object of every line that isn't blank.

    Raises:
        DataError: For a line that isn't a JSON object, with its row.
    """
    for row, line in enumerate(text_lines(path, encoding), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            if "\\u" in line:
                json.dumps(value, ensure_ascii=False).encode()  # an escape may be half a character: no text can hold it
        except UnicodeEncodeError as error:
            what = f"half a character, {error.object[error.start]!a}"
            raise DataError(what, where=f"{path} row {row}", remedy=MEND_ROW) from error
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"not JSON ({error})", where=f"{path} row {row}", remedy=_REMEDY) from error
        if not isinstance(value, dict):
            raise DataError("not a JSON object", where=f"{path} row {row}", remedy=_REMEDY)
        yield row, value


def _read_fast(path: Path, picked: Mapping[str, str], sample: Mapping[str, Any]) -> pa.Table:
    """Through Arrow, which wants each column's type beforehand: the first object's."""
    types = {
        column: pa.string() if isinstance(sample[name], str) else _number(column) for column, name in picked.items()
    }
    schema = pa.schema([(name, types[column]) for column, name in picked.items()])
    table = pa_json.read_json(
        pa.input_stream(str(path)),
        read_options=pa_json.ReadOptions(block_size=_BLOCK_BYTES),
        parse_options=pa_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
    )
    return table.select(list(picked.values())).rename_columns(list(picked))


def _number(column: str) -> pa.DataType:
    return pa.int64() if column in _IDS else pa.float64()


def _read_slowly(path: Path, picked: Mapping[str, str], encoding: str) -> pa.Table:
    """Line by line: to name the row that Arrow refused, or for encodings that it doesn't read."""
    values: dict[str, list[str | None]] = {column: [] for column in picked}
    for row, record in json_rows(path, encoding):
        for column, name in picked.items():
            value = record.get(name)
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                what = f"{column} ({name}) is {'missing' if value is None else json.dumps(value)[:40]}"
                raise DataError(what, where=f"{path} row {row}", remedy=MEND_ROW)
            values[column].append(id_text(value) if column in _IDS else str(value))
    return pa.table({column: pa.array(texts, type=pa.string()) for column, texts in values.items()})


def _row_number(path: Path, encoding: str, index: int) -> int:
    return next(row for number, (row, _) in enumerate(json_rows(path, encoding)) if number == index)
