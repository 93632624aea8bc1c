"""The two tables that every distiller hands over."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

USERS_PER_ROW_GROUP = 256

PROFILES = pa.schema(
    [
        ("user_id", pa.string()),
        ("upto_position", pa.int32()),
        ("profile", pa.string()),
        ("distiller", pa.string()),
        ("n_words", pa.int32()),
    ]
)
MEMORIES = pa.schema(
    [
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("position", pa.int32()),
        ("rating", pa.float64()),
        ("memory", pa.string()),
    ]
)

ProfileRow: TypeAlias = tuple[str, int, str]  # user_id, upto_position, profile
MemoryRow: TypeAlias = tuple[str, str, int, float, str]  # user_id, item_id, position, rating, memory


@dataclass(frozen=True)
class Distilled:
    """What a distiller hands over.

    Attributes:
        profiles: One row per user and ``upto_position``, sorted; a user's last row is the final profile.
        memories: One row per train interaction, sorted by user and position; may be empty.
        notes: Lines to print: what was left out and why.
    """

    profiles: pa.Table
    memories: pa.Table
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reflected:
    """One user's texts.

    Attributes:
        user_id: The user.
        profiles: Pairs of ``upto_position`` and the profile as it stood then, ascending.
        memories: One row per train interaction, by position.
    """

    user_id: str
    profiles: tuple[tuple[int, str], ...]
    memories: tuple[MemoryRow, ...]


def profiles_table(rows: Iterable[ProfileRow], distiller: str) -> pa.Table:
    """Profiles from (user_id, upto_position, profile)."""
    records = sorted(rows, key=lambda row: row[:2])
    columns = [
        [user_id for user_id, _, _ in records],
        [upto for _, upto, _ in records],
        [profile for _, _, profile in records],
        [distiller] * len(records),
        [len(profile.split()) for _, _, profile in records],
    ]
    return pa.table(columns, schema=PROFILES)


def memories_table(rows: Iterable[MemoryRow]) -> pa.Table:
    """Memories from (user_id, item_id, position, rating, memory)."""
    records = sorted(rows, key=lambda row: (row[0], row[2]))
    columns = [list(column) for column in zip(*records, strict=True)] or [[] for _ in MEMORIES]
    return pa.table(columns, schema=MEMORIES)


def write_distilled(results: Iterable[Reflected], profiles: Path, memories: Path, distiller: str) -> tuple[int, int]:
    """Write both tables as Parquet, some users at a time; equal results give equal bytes.

    Args:
        results: By user id; pulled as they are written.
        profiles: Where the profiles go.
        memories: Where the memories go.
        distiller: Its name, for the profiles' column.

    Returns:
        How many profiles and how many memories were written.
    """
    n_profiles = n_memories = 0
    with (
        pq.ParquetWriter(profiles, PROFILES, compression="zstd") as profile_writer,
        pq.ParquetWriter(memories, MEMORIES, compression="zstd") as memory_writer,
    ):
        for group in _groups(results, USERS_PER_ROW_GROUP):
            rows = ((user.user_id, upto, profile) for user in group for upto, profile in user.profiles)
            n_profiles += _append(profile_writer, profiles_table(rows, distiller))
            n_memories += _append(memory_writer, memories_table(row for user in group for row in user.memories))
    return n_profiles, n_memories


def _groups(results: Iterable[Reflected], size: int) -> Iterator[list[Reflected]]:
    left = iter(results)
    while group := list(islice(left, size)):
        yield group


def _append(writer: pq.ParquetWriter, table: pa.Table) -> int:
    """Write a table as one row group, unless it is empty; returns how many rows it has."""
    if table.num_rows:
        writer.write_table(table, row_group_size=table.num_rows)
    return int(table.num_rows)
