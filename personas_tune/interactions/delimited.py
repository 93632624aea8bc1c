"""Logs as delimited text: fast through Arrow, line by line only to name the row that Arrow refused."""

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv

from personas_tune.errors import DataError
from personas_tune.interactions.log import MEND_ROW, RawLog
from personas_tune.interactions.text_files import check_encoding, first_line, read_bytes, text_lines
from personas_tune.interactions.values import NUMBER, time_type, value_problem

_BLOCK_BYTES = 1 << 23
_IDS = pa.dictionary(pa.int32(), pa.string())


@dataclass(frozen=True)
class Layout:
    """How a delimited file is written.

    Args:
        path: The file, which may end in ``.gz``.
        names: Every column's name, in file order.
        delimiter: One character, or ``::``.
        has_header: Whether the first line holds names rather than values.
        quoted: Whether ``"`` quotes values.
        encoding: The text's encoding.
    """

    path: Path
    names: Sequence[str]
    delimiter: str = ","
    has_header: bool = True
    quoted: bool = True
    encoding: str = "utf-8"


def header_of(path: Path, encoding: str) -> str:
    """The first line.

    Raises:
        DataError: If the file is empty.
    """
    line = next(text_lines(path, encoding), "").rstrip("\r\n")
    if not line.strip():
        raise DataError("empty file" if not line else "row 1 is blank", where=str(path), remedy="check data.path")
    return line


def read_rows(layout: Layout) -> Iterator[tuple[int, list[str]]]:
    """Row number (as an editor shows it) and fields of every row below the header that isn't blank.

    Raises:
        DataError: For text that can't be divided into fields.
    """
    rows = _split(text_lines(layout.path, layout.encoding), layout)
    if layout.has_header:
        next(rows, None)
    return rows


def ragged(layout: Layout, row: int, fields: Sequence[str]) -> DataError | None:
    """The error of a row with more or fewer values than columns, if it is one."""
    if len(fields) == len(layout.names):
        return None
    what = f"{len(fields)} values where {len(layout.names)} belong"
    return DataError(what, where=f"{layout.path} row {row}", remedy=MEND_ROW)


def read_delimited(layout: Layout, columns: Mapping[str, str]) -> RawLog:
    """Read a log from delimited text.

    Args:
        layout: How the file is written.
        columns: A log column to the file's name of it.

    Raises:
        DataError: Naming the file and row that can't be read.
    """
    check_encoding(layout.encoding)
    indices = {column: list(layout.names).index(name) for column, name in columns.items()}
    first = next(read_rows(layout), None)
    if first is None:
        raise DataError("a header and no interactions", where=str(layout.path), remedy="check data.path")
    at = indices.get("timestamp", len(first[1]))
    time = time_type(first[1][at]) if at < len(first[1]) else NUMBER
    try:
        table = _read_fast(layout, indices, time)
    except (pa.ArrowInvalid, UnicodeError, OSError) as error:
        raise _name_bad_row(layout, indices, time, error) from error
    return RawLog(table, str(layout.path), lambda index: _row_number(layout, index))


def _read_fast(layout: Layout, indices: Mapping[str, int], time: pa.DataType) -> pa.Table:
    types = {"user_id": _IDS, "item_id": _IDS, "rating": pa.float64(), "timestamp": time}
    delimiter = layout.delimiter
    if delimiter == "::":
        content = read_bytes(layout.path)
        if b"\t" in content:
            raise pa.ArrowInvalid("a tab in a '::' file")
        source, delimiter = pa.BufferReader(content.replace(b"::", b"\t")), "\t"
    else:
        source = pa.input_stream(str(layout.path))
    table = pa_csv.read_csv(
        source,
        read_options=pa_csv.ReadOptions(
            column_names=[str(index) for index in range(len(layout.names))],
            skip_rows=int(layout.has_header),
            encoding=layout.encoding,
            block_size=_BLOCK_BYTES,
        ),
        parse_options=pa_csv.ParseOptions(
            delimiter=delimiter,
            quote_char='"' if layout.quoted else False,
            newlines_in_values=layout.quoted,
        ),
        convert_options=pa_csv.ConvertOptions(
            include_columns=[str(index) for index in indices.values()],
            column_types={str(index): types[column] for column, index in indices.items()},
            null_values=[],
        ),
    )
    return table.rename_columns(list(indices))


def _split(lines: Iterable[str], layout: Layout) -> Iterator[tuple[int, list[str]]]:
    if layout.delimiter == "::":
        rows = enumerate((line.rstrip("\r\n").split("::") for line in lines), 1)
        yield from ((row, fields) for row, fields in rows if fields != [""])
        return
    if layout.quoted:
        reader = csv.reader(lines, delimiter=layout.delimiter)
    else:
        reader = csv.reader(lines, delimiter=layout.delimiter, quoting=csv.QUOTE_NONE)
    try:
        yield from ((reader.line_num, fields) for fields in reader if fields)
    except csv.Error as error:
        raise DataError(str(error), where=f"{layout.path} row {reader.line_num}", remedy=MEND_ROW) from error


def _row_number(layout: Layout, index: int) -> int:
    return next(row for number, (row, _) in enumerate(read_rows(layout)) if number == index)


def _name_bad_row(layout: Layout, indices: Mapping[str, int], time: pa.DataType, error: Exception) -> DataError:
    for row, fields in read_rows(layout):
        if mistake := ragged(layout, row, fields):
            return mistake
        for column, index in indices.items():
            if problem := value_problem(column, fields[index], time):
                return DataError(problem, where=f"{layout.path} row {row}", remedy=MEND_ROW)
    return DataError(first_line(error), where=str(layout.path), remedy="mend the file")
