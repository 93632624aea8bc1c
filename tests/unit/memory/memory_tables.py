"""Small tables as persona_prepare writes them, for the tests of this folder."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

INTERACTIONS = pa.schema(
    [
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("rating", pa.float64()),
        ("timestamp", pa.int64()),
        ("position", pa.int32()),
        ("split", pa.string()),
    ]
)
ITEMS = pa.schema(
    [
        ("item_id", pa.string()),
        ("title", pa.string()),
        ("year", pa.int32()),
        ("genres", pa.list_(pa.string())),
        ("summary", pa.string()),
        ("cast", pa.list_(pa.string())),
        ("mean_rating", pa.float64()),
        ("n_ratings", pa.int32()),
    ]
)
GENRES = ["Comedy", "Crime", "Drama", "Horror", "War"]
PEOPLE = ["Ann Lee", "Bo Fox", "Cy Dale"]
WORDS = ["heist", "jazz", "revenge", "spies", "wedding"]


def interactions_table(rows: Sequence[tuple[str, str, float, int, str]]) -> pa.Table:
    """From (user_id, item_id, rating, position, split)."""
    records = [
        {"user_id": u, "item_id": i, "rating": r, "timestamp": p, "position": p, "split": s} for u, i, r, p, s in rows
    ]
    return pa.Table.from_pylist(records, schema=INTERACTIONS)


def items_table(items: Sequence[dict[str, Any]]) -> pa.Table:
    """From item dicts; what is left out is null, empty or zero."""
    blank = {"year": None, "genres": [], "summary": None, "cast": [], "mean_rating": None, "n_ratings": 0}
    return pa.Table.from_pylist([{**blank, "title": item["item_id"], **item} for item in items], schema=ITEMS)


def users_table(interactions: pa.Table, tiers: tuple[int, int, int] = (1, 2, 3)) -> pa.Table:
    """The users of an interactions table, all with the same trait tiers."""
    names = ("activity_tier", "conformity_tier", "diversity_tier")
    user_ids = sorted(set(interactions["user_id"].to_pylist()))
    return pa.Table.from_pylist([{"user_id": user_id, **dict(zip(names, tiers, strict=True))} for user_id in user_ids])


def counted_users(interactions: pa.Table) -> pa.Table:
    """The users of an interactions table, with the number of their train rows."""
    n_train = dict.fromkeys(sorted(interactions["user_id"].to_pylist()), 0)
    for user_id, split in zip(interactions["user_id"].to_pylist(), interactions["split"].to_pylist(), strict=True):
        n_train[user_id] += split == "train"
    return pa.table({"user_id": list(n_train), "n_train": list(n_train.values())})


def random_items(rng: np.random.Generator, n_items: int) -> list[dict[str, Any]]:
    """Items with random features; some have no year, summary or average."""
    return [
        {
            "item_id": f"i{number:03}",
            "title": f"Title {number}",
            "year": int(rng.integers(1950, 2010)) if rng.random() < 0.9 else None,
            "genres": sorted(rng.choice(GENRES, size=rng.integers(1, 4), replace=False)),
            "summary": " and ".join(rng.choice(WORDS, size=2, replace=False)) if rng.random() < 0.8 else None,
            "cast": sorted(rng.choice(PEOPLE, size=rng.integers(0, 3), replace=False)),
            "mean_rating": float(rng.uniform(1, 5)) if rng.random() < 0.9 else None,
            "n_ratings": int(rng.integers(1, 50)),
        }
        for number in range(n_items)
    ]


def random_log(seed: int, n_users: int = 3, n_train: int = 17, n_test: int = 5) -> tuple[pa.Table, pa.Table, pa.Table]:
    """Interactions, items and users of a random log; half of the items occur in test rows only."""
    rng = np.random.default_rng(seed)
    n_items = 2 * n_train
    rows = []
    for user in range(n_users):
        train = rng.permutation(n_items // 2 + 5)[:n_train]
        test = n_items // 2 + 5 + rng.permutation(n_items // 2 - 5)[:n_test]
        for position, item in enumerate([*train, *test]):
            split = "train" if position < n_train else "test"
            rows.append((f"u{user}", f"i{item:03}", float(rng.integers(1, 6)), position, split))
    interactions = interactions_table(rows)
    return interactions, items_table(random_items(rng, n_items)), users_table(interactions)
