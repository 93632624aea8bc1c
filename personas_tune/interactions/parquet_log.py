"""Logs as Parquet."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from personas_tune.errors import DataError
from personas_tune.interactions.columns import pick_columns
from personas_tune.interactions.log import RawLog
from personas_tune.interactions.text_files import first_line
from personas_tune.interactions.typed import read_typed

_REMEDY = "fetch or write the file again"


def read_parquet_log(path: Path, columns: Mapping[str, str], encoding: str | None = None) -> RawLog:
    """Read a log from one Parquet file; ``encoding`` doesn't matter to it.

    Raises:
        ConfigError: For an entry of ``columns`` that the file doesn't have.
        DataError: For a damaged file, a missing column or a value that can't be read.
    """
    try:
        picked = pick_columns(pq.read_schema(path).names, columns, str(path))
        table = pq.read_table(path, columns=list(picked.values()))
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from error
    table = table.select(list(picked.values())).rename_columns(list(picked))
    return read_typed(table, str(path), lambda index: index + 1)


def parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """1-based row number and values of every row.

    Raises:
        DataError: For a damaged file.
    """
    row = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=4096):
            for record in batch.to_pylist():
                row += 1
                yield row, record
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(f"not a readable Parquet file ({first_line(error)})", where=str(path), remedy=_REMEDY)
