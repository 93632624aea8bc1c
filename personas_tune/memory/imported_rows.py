"""Reads the tables of text that a user brings along: CSV, JSONL or Parquet, with column aliases."""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from personas_tune.errors import DistillError

# Compared without case and underscores, as the log's columns are.
ALIASES = {
    "user_id": ("user_id", "user", "uid"),
    "item_id": ("item_id", "movie_id", "item", "parent_asin"),
    "profile": ("profile", "persona", "description"),
    "memory": ("memory", "reason"),
    "upto_position": ("upto_position",),
}


@dataclass(frozen=True)
class ImportedRow:
    """One row of a file.

    Attributes:
        where: File and row (the line of a CSV or JSONL file, the 1-based row of a Parquet file).
        values: The wanted columns; None where a cell is empty or an optional column is missing.
    """

    where: str
    values: dict[str, str | None]

    def __getitem__(self, name: str) -> str | None:
        return self.values[name]


def read_rows(path: Path, required: Sequence[str], optional: Sequence[str] = ()) -> list[ImportedRow]:
    """Read the wanted columns of a CSV, JSONL or Parquet file as text.

    Args:
        path: The file; its suffix tells the format.
        required: Columns (keys of ``ALIASES``) that must be there.
        optional: Columns that may be.

    Raises:
        DistillError: If the file can't be read so, naming its row where there is one.
    """
    readers = {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".ndjson": _jsonl_rows, ".parquet": _parquet_rows}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DistillError(f"unknown file type {path.suffix!r}", where=str(path), remedy=f"use {', '.join(readers)}")
    rows = [ImportedRow(where, _pick(row, where, required, optional)) for where, row in reader(path)]
    if not rows:
        raise DistillError("no rows", where=str(path), remedy="check distill.path and distill.memories_path")
    return rows


def _pick(
    row: Mapping[str, Any], where: str, required: Sequence[str], optional: Sequence[str]
) -> dict[str, str | None]:
    picked: dict[str, str | None] = {}
    columns = {_plain(column): column for column in reversed(list(row))}
    for name in (*required, *optional):
        column = next((columns[_plain(alias)] for alias in ALIASES[name] if _plain(alias) in columns), None)
        if column is None and name in required:
            raise DistillError(
                f"no column {name} (there are: {', '.join(map(str, row)) or 'none'})",
                where=where,
                remedy=f"name it {' or '.join(ALIASES[name])}",
            )
        picked[name] = None if column is None else _as_text(row[column])
    return picked


def _plain(name: str) -> str:
    return name.strip().casefold().replace("_", "")


def _as_text(value: object) -> str | None:
    if value is None or value != value:  # NaN
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip() or None


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(_utf8_text(path), newline=""), strict=True)
    remedy = "put texts with commas or line breaks in double quotes"
    try:
        header = [name.strip() for name in next(reader, [])]
        for cells in reader:
            where = f"{path} line {reader.line_num}"
            if cells and len(cells) != len(header):
                raise DistillError(f"{len(cells)} cells, but the header has {len(header)}", where=where, remedy=remedy)
            if cells:
                yield where, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DistillError(f"not CSV ({error})", where=f"{path} line {reader.line_num}", remedy=remedy) from error


def _jsonl_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_utf8_text(path).split("\n"), start=1):
        where = f"{path} line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if "\\u" in line:
                json.dumps(row, ensure_ascii=False).encode()  # an escape may be half a character: no text can hold it
        except UnicodeEncodeError as error:
            what = f"half a character, {error.object[error.start]!a}"
            raise DistillError(what, where=where, remedy="mend or drop the row") from error
        except json.JSONDecodeError as error:
            raise DistillError(f"not JSON ({error.msg})", where=where, remedy="write one object a line") from error
        if not isinstance(row, dict):
            raise DistillError("not a JSON object", where=where, remedy="write one object a line")
        yield where, row


def _utf8_text(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DistillError(
            f"not UTF-8 (byte {raw[error.start]:#04x})", where=f"{path} line {line}", remedy="save it as UTF-8"
        ) from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        first_line = str(error).splitlines()[0]
        raise DistillError(
            f"not a readable Parquet file ({first_line})", where=str(path), remedy="write it again"
        ) from error
    for number, row in enumerate(table.to_pylist(), start=1):
        yield f"{path} row {number}", row
