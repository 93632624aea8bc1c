"""How long `persona_prepare` takes on logs shaped like MovieLens 1M and 20M, beside plain pandas.

Hardware: 2 cores of an AMD EPYC, 24 GB, local disk; torch 2.13 (CPU), pyarrow 26.0, pandas 3.1, Python 3.11
Date:     2026-11-20
Command:  OMP_NUM_THREADS=1 python benchmarks/prepare.py --sizes 1m 20m
Result:   1m:  tune run persona_prepare   4.9 s  peak 0.70 GB  202,592 rows/s
          1m:  plain pandas               3.3 s  peak 0.52 GB  306,496 rows/s; ours takes 1.51 of its time
          20m: tune run persona_prepare  21.3 s  peak 3.40 GB  940,520 rows/s
          20m: plain pandas              12.6 s  peak 3.29 GB  1,584,355 rows/s; ours takes 1.68 of its time

Each size is generated (seeded) into a temporary folder and prepared by `tune run persona_prepare` in a process
of its own, whose wall time and peak resident memory are printed. The peer is the shortest pandas script that
reads the same file, sorts it, splits each user, averages items, computes two of the three traits and writes
Parquet; it checks nothing and knows no genres, so the ratio flatters it. Ours includes what `tune` itself imports
(about 3 s at the 1m size).
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

GENRES = ["Action", "Adventure", "Animation", "Comedy", "Crime", "Drama", "Fantasy", "Horror", "Romance", "Thriller"]


@dataclass(frozen=True)
class Size:
    n_users: int
    n_items: int
    n_rows: int
    dat: bool


SIZES = {"1m": Size(6_040, 3_706, 1_000_209, dat=True), "20m": Size(138_493, 26_744, 20_000_263, dat=False)}

CONFIG = """
output_dir: {folder}/run
data:
  format: movielens
  path: {folder}
  rating_scale: {{min: {low}, max: 5, step: {low}}}
  cohort: {{n_users: 200, min_interactions: 100, max_interactions: 200}}
  split: {{by: user_time, train_fraction: 0.6, test_rows: 7000}}
"""

PANDAS = """
import sys
import numpy as np
import pandas as pd

folder, dat = sys.argv[1], sys.argv[2] == "dat"
names = ["userId", "movieId", "rating", "timestamp"]
if dat:
    log = pd.read_csv(f"{folder}/ratings.dat", sep="::", engine="python", names=names)
else:
    log = pd.read_csv(f"{folder}/ratings.csv")
log = log.sort_values(["userId", "timestamp"], kind="stable")
users = log.groupby("userId")
log["position"] = users.cumcount()
size = users["rating"].transform("size")
log["train"] = log["position"] < np.floor(size * 0.6)
train = log[log["train"]]
means = train.groupby("movieId")["rating"].mean()
deviation = (train["rating"] - train["movieId"].map(means)) ** 2
activity, deviation = train.groupby("userId").size(), deviation.groupby(train["userId"]).mean()
np.percentile(activity, [60, 90]), np.percentile(deviation, [25, 80])
counts = users.size()
cohort = counts[(counts >= 100) & (counts <= 200)].sample(200, random_state=0).index
log[log["userId"].isin(cohort)].to_parquet(f"{folder}/cohort.parquet")
log[~log["userId"].isin(cohort)].to_parquet(f"{folder}/outside.parquet")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["1m"])
    for name in parser.parse_args().sizes:
        with tempfile.TemporaryDirectory() as folder:
            benchmark(name, SIZES[name], Path(folder))


def benchmark(name: str, size: Size, folder: Path) -> None:
    started = time.perf_counter()
    log = write_log(size, folder)
    seconds, megabytes = time.perf_counter() - started, log.stat().st_size / 1e6
    print(f"{name}: {size.n_rows} rows, {megabytes:.0f} MB, generated in {seconds:.0f} s", flush=True)
    config = folder / "config.yaml"
    config.write_text(CONFIG.format(folder=folder, low=1 if size.dat else 0.5))
    tune = str(Path(sys.executable).parent / "tune")
    ours = measure([tune, "run", "persona_prepare", "--config", str(config)])
    print(f"{name}: tune run persona_prepare  {report(ours, size.n_rows)}", flush=True)
    script = folder / "plain_pandas.py"
    script.write_text(PANDAS)
    if subprocess.run([sys.executable, "-c", "import pandas"], capture_output=True, check=False).returncode != 0:
        print(f"{name}: plain pandas  not installed here")
        return
    peer = measure([sys.executable, str(script), str(folder), "dat" if size.dat else "csv"])
    ratio = ours.seconds / peer.seconds
    print(f"{name}: plain pandas              {report(peer, size.n_rows)}; ours takes {ratio:.2f} of its time")


class Measured(NamedTuple):
    """What a process took: wall and CPU seconds, peak resident GB."""

    seconds: float
    cpu_seconds: float
    gigabytes: float


def measure(command: list[str]) -> Measured:
    """Run a process to its end."""
    started = time.perf_counter()
    process = subprocess.Popen(command)
    # wait4 and not RUSAGE_CHILDREN, whose peak is that of the largest child so far.
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"{command} failed with {process.returncode}")
    cpu_seconds = usage.ru_utime + usage.ru_stime
    return Measured(time.perf_counter() - started, cpu_seconds, usage.ru_maxrss * 1024 / 1e9)


def report(measured: Measured, n_rows: int) -> str:
    rows_per_second = n_rows / measured.seconds
    return f"{measured.seconds:6.1f} s  peak {measured.gigabytes:.2f} GB  {rows_per_second:,.0f} rows/s"


def write_log(size: Size, folder: Path) -> Path:
    """A log of MovieLens's shape: long-tailed activity and popularity, sessions with ties, rows unsorted in time."""
    rng = np.random.default_rng(0)
    user, item = draw_pairs(size, rng)
    step = 1.0 if size.dat else 0.5
    rating = np.clip(np.round(rng.normal(3.55, 1.05, size.n_rows) / step) * step, step, 5)
    start = rng.integers(950_000_000, 1_400_000_000, size.n_users)
    timestamp = start[user] + rng.integers(0, 3600, size.n_rows) * (1 + 500 * (rng.random(size.n_users) < 0.3)[user])
    ratings = pa.int8() if size.dat else pa.float64()
    columns = [user + 1, item + 1, pa.array(rating).cast(ratings), timestamp]
    table = pa.table(dict(zip(["userId", "movieId", "rating", "timestamp"], columns, strict=True)))
    write_items(size, folder, rng)
    if not size.dat:
        pa_csv.write_csv(table, folder / "ratings.csv", pa_csv.WriteOptions(quoting_style="none"))
        return folder / "ratings.csv"
    sink = pa.BufferOutputStream()
    pa_csv.write_csv(table, sink, pa_csv.WriteOptions(include_header=False, quoting_style="none"))
    (folder / "ratings.dat").write_bytes(sink.getvalue().to_pybytes().replace(b",", b"::"))
    return folder / "ratings.dat"


def draw_pairs(size: Size, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Distinct (user, item) pairs, users together, items of a user in random order."""
    weight = rng.lognormal(0, 1.15, size.n_users)
    activity = 20 + np.floor((size.n_rows - 20 * size.n_users) * weight / weight.sum()).astype(np.int64)
    activity = np.minimum(activity, size.n_items // 3)
    short = np.flatnonzero(activity < size.n_items // 4)
    activity[: size.n_users] += np.bincount(rng.choice(short, size.n_rows - activity.sum()), minlength=size.n_users)
    popularity = 1 / (np.arange(size.n_items) + 30) ** 0.9
    cumulative = np.cumsum(popularity / popularity.sum())
    shuffled = rng.permutation(size.n_items)
    finished, pairs = [], np.zeros(0, np.int64)
    missing = activity
    while missing.any():
        user = np.repeat(np.arange(size.n_users), missing)
        item = shuffled[np.minimum(np.searchsorted(cumulative, rng.random(len(user))), size.n_items - 1)]
        pairs = np.unique(np.concatenate([pairs, user * size.n_items + item]))
        missing = np.where(missing > 0, activity - np.bincount(pairs // size.n_items, minlength=size.n_users), 0)
        complete = missing[pairs // size.n_items] == 0
        finished.append(pairs[complete])
        pairs = pairs[~complete]
    pairs = np.sort(np.concatenate(finished))
    user, item = np.divmod(pairs, size.n_items)
    order = np.lexsort((rng.random(len(pairs)), user))
    return user, item[order]


def write_items(size: Size, folder: Path, rng: np.random.Generator) -> None:
    rows = []
    for item in range(1, size.n_items + 1):
        genres = "|".join(rng.choice(GENRES, rng.integers(1, 4), replace=False))
        rows.append([str(item), f"Film {item} ({1930 + item % 70})", genres])
    if size.dat:
        (folder / "movies.dat").write_text("".join("::".join(row) + "\n" for row in rows))
    else:
        (folder / "movies.csv").write_text("movieId,title,genres\n" + "".join(",".join(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
