"""What the stages between the log and the training take, on synthetic worlds.

Hardware: 2 cores of an AMD EPYC that other work shared, hence CPU time; torch 2.13 (CPU), Python 3.11
Date:     2026-11-20
Command:  OMP_NUM_THREADS=1 python benchmarks/stages.py --users 20 200 2000
Result, s of CPU time and peak GB:
                    20 users       200 users      2000 users
                    1,730 train    16,762 train   173,491 train
                    1,161 test     11,299 test    116,913 test
  persona_prepare   5.2  0.49      5.0  0.51       5.3  0.62
  persona_distill   5.4  0.49      6.9  0.52      27.9  0.66
  persona_cluster   7.3  0.59      6.4  0.60       7.6  0.68
  persona_raft      5.8  0.57      6.4  0.62      15.5  0.92

Every user of the world is in the cohort; each stage is a `tune run` of its own. What 20 users cost is importing `tune`,
torch and torchtune.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
from prepare import measure

STAGES = ("persona_prepare", "persona_distill", "persona_cluster", "persona_raft")

CONFIG = """
output_dir: {folder}/run
data:
  format: world
  world: {{n_users: {n_users}, n_items: 400, n_groups: 6, mean_interactions: 150}}
  historical_average: train
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", nargs="+", type=int, default=[200])
    for n_users in parser.parse_args().users:
        with tempfile.TemporaryDirectory() as folder:
            benchmark(n_users, Path(folder))


def benchmark(n_users: int, folder: Path) -> None:
    config = folder / "config.yaml"
    config.write_text(CONFIG.format(folder=folder, n_users=n_users))
    tune = str(Path(sys.executable).parent / "tune")
    lines = [(stage, measure([tune, "run", stage, "--config", str(config)])) for stage in STAGES]
    n_train, n_test = (
        pq.read_metadata(folder / f"run/samples/{split}.parquet").num_rows for split in ("train", "test")
    )
    print(f"{n_users} users, {n_train} train and {n_test} test rows:")
    for stage, measured in lines:
        print(f"  {stage}  {measured.cpu_seconds:6.1f} s of CPU time  peak {measured.gigabytes:.2f} GB", flush=True)


if __name__ == "__main__":
    main()
