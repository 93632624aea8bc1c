"""The two tables that every distiller hands over."""

from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa

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


def profiles_table(rows: Iterable[tuple[str, int, str]], distiller: str) -> pa.Table:
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


def memories_table(rows: Iterable[tuple[str, str, int, float, str]]) -> pa.Table:
    """Memories from (user_id, item_id, position, rating, memory)."""
    records = sorted(rows, key=lambda row: (row[0], row[2]))
    columns = [list(column) for column in zip(*records, strict=True)] or [[] for _ in MEMORIES]
    return pa.table(columns, schema=MEMORIES)
