"""Finds a few rows in the large tables of a stage without reading them whole."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from personas_tune.errors import DataError
from personas_tune.workspace import STAGE_RECIPES

_BATCH_ROWS = 4096  # read at a time, so that a large file takes little more memory than a small one


def read_matching(path: Path, columns: Sequence[str], key: str, values: Sequence[str]) -> pa.Table:
    """The rows whose ``key`` is one of ``values``, in the file's order.

    Row groups that by their own statistics can't hold any are skipped. So a lookup in a sorted table takes as
    long as reading the one or two row groups that the rows lie in.

    Args:
        path: A Parquet file.
        columns: What to read, ``key`` among it.
        key: A column of text.
        values: At least one.

    Raises:
        DataError: If the file is damaged or lacks a column.
    """
    with _told_in_one_line(path), pq.ParquetFile(path, memory_map=True) as file:
        schema = pa.schema([file.schema_arrow.field(name) for name in columns])
        groups = _groups_that_may_hold(file.metadata, key, values)
        wanted = pa.array(values, schema.field(key).type)
        batches = file.iter_batches(_BATCH_ROWS, groups, list(columns), use_threads=False)
        found = (batch.filter(pc.is_in(batch[key], wanted)) for batch in batches)
        table = pa.Table.from_batches([batch for batch in found if batch.num_rows], schema)
        table.validate(full=True)  # a flipped bit may leave text that is no UTF-8
    return table


def read_column(path: Path, column: str) -> pa.ChunkedArray:
    """One column of a Parquet file.

    Raises:
        DataError: If the file is damaged or lacks the column.
    """
    with _told_in_one_line(path), pq.ParquetFile(path) as file:
        file.schema_arrow.field(column)
        values = file.read([column])[column]
        values.validate(full=True)
    return values


def _groups_that_may_hold(file: pq.FileMetaData, key: str, values: Sequence[str]) -> list[int]:
    return [group for group in range(file.num_row_groups) if _may_hold(file.row_group(group), key, values)]


def _may_hold(row_group: pq.RowGroupMetaData, key: str, values: Sequence[str]) -> bool:
    chunks = (row_group.column(number) for number in range(row_group.num_columns))
    statistics = next((chunk.statistics for chunk in chunks if chunk.path_in_schema == key), None)
    if statistics is None or not statistics.has_min_max:
        return True
    low, high = statistics.min, statistics.max
    return any(low <= value <= high for value in values)


@contextmanager
def _told_in_one_line(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
        recipe = STAGE_RECIPES.get(path.parent.name, "persona_pipeline")
        raise DataError(
            f"can't be read ({str(error).splitlines()[0]})",
            where=str(path),
            remedy=f"run `tune run {recipe} --config ...` again",
        ) from error
