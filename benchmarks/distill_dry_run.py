"""What distilling N users takes, by `distill.dry_run` on a made-up cohort of that size.

    OMP_NUM_THREADS=1 python benchmarks/distill_dry_run.py --users 1000000

Writes a data/ folder in which N users have 100 to 200 interactions, 60% of them train, with the items
of the synthetic world (titles, genres, one-line summaries, casts), runs the recipe on it and prints
what it says. Prices and batch size are those of configs/phi3_persona.yaml.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

USERS_PER_GROUP = 20_000
COLUMNS = ("activity", "conformity", "diversity")


def write_cohort(data: Path, n_users: int) -> None:
    """Replace the interactions and users of a prepared experiment by those of ``n_users`` users."""
    item_ids = pq.read_table(data / "items.parquet")["item_id"].combine_chunks()
    rng = np.random.default_rng(0)
    schema = pa.schema(
        [("user_id", pa.string()), ("item_id", pa.string()), ("rating", pa.float64()), ("timestamp", pa.int64()),
         ("position", pa.int32()), ("split", pa.string())]
    )  # fmt: skip
    n_train = []
    with pq.ParquetWriter(data / "interactions.parquet", schema, compression="zstd") as writer:
        for begin in range(0, n_users, USERS_PER_GROUP):
            n_rows = rng.integers(100, 201, min(USERS_PER_GROUP, n_users - begin))
            n_train.append((0.6 * n_rows).astype(np.int32))
            writer.write_table(_rows(rng, begin, n_rows, n_train[-1], item_ids, schema))
    train = np.concatenate(n_train)
    traits = {name: np.ones(n_users) for name in COLUMNS}
    tiers = {f"{name}_tier": np.ones(n_users, np.int32) for name in COLUMNS}
    users = {
        "user_id": _names(np.arange(n_users)),
        "n_train": train,
        "n_test": train,
        "mean_rating": np.full(n_users, 3.5),
    }
    pq.write_table(pa.table({**users, **traits, **tiers}), data / "users.parquet")


def _rows(
    rng: np.random.Generator, begin: int, n_rows: np.ndarray, n_train: np.ndarray, item_ids: pa.Array, schema: pa.Schema
) -> pa.Table:
    user = np.repeat(np.arange(len(n_rows)), n_rows)
    position = np.arange(len(user)) - np.repeat(np.cumsum(n_rows) - n_rows, n_rows)
    columns = [
        _names(begin + user),
        item_ids.take(pa.array(rng.integers(0, len(item_ids), len(user)))),
        rng.integers(1, 6, len(user)).astype(np.float64),
        position.astype(np.int64),
        position.astype(np.int32),
        pa.array(np.where(position < n_train[user], "train", "test")),
    ]
    return pa.table(columns, schema=schema)


def _names(numbers: np.ndarray) -> pa.Array:
    return pa.array(np.char.mod("u%09d", numbers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=1_000_000)
    n_users = parser.parse_args().users
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"output_dir={folder}/run", "distill.distiller=openai", "distill.dry_run=true"]
        prices = "distill.prices={input: 2.5, cached_input: 1.25, output: 10}"
        subprocess.run(
            [sys.executable, "-m", "persona_prepare", "--config", "quickstart.yaml", *overrides],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        write_cohort(Path(folder) / "run" / "data", n_users)
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "persona_distill", "--config", "quickstart.yaml", *overrides, prices,
             "distill.profile_words=400", "distill.requests_per_minute=10000"],
            check=True,
        )  # fmt: skip
        print(f"{time.perf_counter() - started:.0f} s for {n_users} users")


if __name__ == "__main__":
    main()
