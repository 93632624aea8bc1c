"""A small experiment whose users are shown: ann with three profiles, bob with one, zoe with none."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from memory_tables import interactions_table, items_table

from personas_tune.memory.tables import memories_table, profiles_table
from personas_tune.workspace import Workspace

TITLES_OF_TEST_ROWS = ("Alien", "Brazil")


def write_run(
    root: Path,
    *,
    title: str = "Heat",
    profile: str = "I like War. I love slow noir. I leave comedies early.",
    memory: str = "A memory of Heat.",
    distiller: str = "openai",
) -> Workspace:
    """Write data/, memory/ and personas/ of the experiment; the arguments change ann's texts."""
    run = Workspace.at(root)
    for folder in ("data", "memory", "personas"):
        (run.root / folder).mkdir(parents=True, exist_ok=True)
    interactions = [
        ("ann", "i3", 4.5, 2, "train"), ("ann", "i1", 4.0, 0, "train"), ("ann", "i2", 1.5, 1, "train"),
        ("ann", "t1", 5.0, 3, "test"), ("ann", "t2", 5.0, 4, "test"),
        ("bob", "i1", 3.0, 0, "train"), ("zoe", "i1", 2.0, 0, "train"),
    ]  # fmt: skip
    items = [
        {"item_id": "i1", "title": title, "year": 1995, "mean_rating": 3.9},
        {"item_id": "i2", "title": "Up (2009)", "year": 2009},
        {"item_id": "i3", "title": None},
        *({"item_id": f"t{n}", "title": name} for n, name in enumerate(TITLES_OF_TEST_ROWS, 1)),
    ]
    profiles = [
        ("ann", 0, "I am new here."), ("ann", 2, "I like War. I love noir."), ("ann", 3, profile), ("bob", 1, "Bob."),
    ]  # fmt: skip
    long_memory = "A memory of a nameless one, which is so long that it goes over two lines."
    memories = [("ann", "i1", 0, 4.0, memory), ("ann", "i3", 2, 4.5, long_memory), ("bob", "i1", 0, 3.0, "Bob's.")]
    traits = {"activity": (12.0, 1), "conformity": (0.75, 2), "diversity": (4.0, 3)}
    users = [
        {"user_id": user_id, **{key: value for name, (value, tier) in traits.items()
                                for key, value in ((name, value), (f"{name}_tier", tier))}}
        for user_id in ("ann", "bob", "zoe")
    ]  # fmt: skip
    personas = [{"user_id": "ann", "persona": 1, "distance": 0.25}, {"user_id": "bob", "persona": 0, "distance": 0.5}]
    pq.write_table(interactions_table(interactions), run.interactions)
    pq.write_table(items_table(items), run.items)
    pq.write_table(pa.Table.from_pylist(users), run.users)
    pq.write_table(profiles_table(profiles, distiller), run.profiles)
    pq.write_table(memories_table(memories), run.memories)
    pq.write_table(pa.Table.from_pylist(personas), run.personas)
    return run
