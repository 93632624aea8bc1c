"""Training killed (SIGKILL) again and again, mostly while it writes a checkpoint, and compared with an unbroken run.

    OMP_NUM_THREADS=1 python benchmarks/kill_saves.py --kills 100

A training of two personas (dropout 0.1, a checkpoint after every one of its 12 steps) runs in a process of its own.
Three kills of four come within a save: the moment its temporary folder is seen, or up to 20 ms later. The others
come anywhere. The same command then goes on. After at most nine kills it is let alone; every byte of its adapters
is compared with the unbroken run's, and the next begins.

2026-11-20, 2 cores of an AMD EPYC that other work shared, torch 2.13 (CPU), Python 3.11:
101 kills: 82 left a half-written checkpoint, 14 one without its marker; 22 trainings came to their end, 0 with other
bytes than the unbroken run
"""

import argparse
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import RLock

from tqdm import tqdm

from personas_tune.workspace import MANIFEST

STAGES = "stages=[persona_prepare,persona_distill,persona_cluster,persona_raft]"
SMALL = [
    "data.world.n_users=60", "data.cohort={n_users: 6, min_interactions: 20, max_interactions: 60}",
    "data.world.mean_interactions=40", "personas.k=2", "model.lora_dropout=0.1", "batch_size=4", "rows_per_user=2",
    "max_steps_per_epoch=3", "validation_share=0.1", "training.checkpoint_every_n_steps=1", "agents={}",
    "adapter_sets={persona: {per: persona}}",
]  # fmt: skip
FORK = get_context("forkserver")
FORK.set_forkserver_preload(["torchtune.training", "personas_tune.training.checkpoints", "pyarrow.parquet"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        draw, root = random.Random(arguments.seed), Path(folder) / "run"
        end(start("persona_pipeline", root, STAGES))
        unbroken = Path(folder) / "unbroken"
        shutil.copytree(root, unbroken)
        end(start("persona_lora", unbroken))
        print(summary(torment(root, adapters(unbroken), arguments.kills, draw)))


def torment(root: Path, expected: dict[str, bytes], n_kills: int, draw: random.Random) -> Counter[str]:
    """Kill trainings, each up to nine times, until there have been so many kills; count what was found."""
    found: Counter[str] = Counter()
    while found["kills"] < n_kills:
        for _ in range(draw.randint(1, 9)):
            kill(start("persona_lora", root), root, draw, found)
        end(start("persona_lora", root))
        found["trainings"] += 1
        found["different"] += adapters(root) != expected
        shutil.rmtree(root / "adapters")
    return found


def kill(child: BaseProcess, root: Path, draw: random.Random, found: Counter[str]) -> None:
    """Kill a training at a moment that is drawn."""
    checkpoints = root / "adapters" / ".persona.checkpoints"
    within_a_save = draw.random() < 0.75
    n_saves = draw.randint(1, 3)  # the last of which is the one
    seen: set[str] = set()
    deadline = time.perf_counter() + (60 if within_a_save else draw.uniform(0, 2))
    while child.is_alive() and time.perf_counter() < deadline and len(seen) < n_saves:
        if within_a_save:
            seen |= {name for name in names_in(checkpoints) if name.endswith(".tmp")}
    if within_a_save:
        time.sleep(draw.choice((0, draw.uniform(0, 0.02))))
    assert child.pid is not None
    if child.is_alive():
        os.kill(child.pid, signal.SIGKILL)
    child.join()
    left = [name for name in names_in(checkpoints) if not (checkpoints / name / "complete.json").exists()]
    found["kills"] += child.exitcode == -signal.SIGKILL  # else it was faster
    found["half-written"] += any(name.endswith(".tmp") for name in left)
    found["unmarked"] += any(not name.endswith(".tmp") for name in left)


def names_in(folder: Path) -> list[str]:
    """What is in a folder that may come and go."""
    with suppress(FileNotFoundError):
        return os.listdir(folder)
    return []


def start(recipe: str, root: Path, *overrides: str) -> BaseProcess:
    arguments = ["--config", "quickstart.yaml", f"output_dir={root}", *SMALL, *overrides]
    child = FORK.Process(target=run, args=(recipe, arguments, str(root.parent / "output.txt")))
    child.start()
    return child


def run(recipe: str, arguments: list[str], output: str) -> None:
    """In the child: what `tune run` does, with what it prints in a file."""
    with Path(output).open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    tqdm.set_lock(RLock())  # its own would outlive the kill
    sys.argv = [recipe, *arguments]
    runpy.run_module(recipe, run_name="__main__")


def end(child: BaseProcess) -> None:
    child.join()
    if child.exitcode:
        raise SystemExit(f"it ended with status {child.exitcode}")


def adapters(root: Path) -> dict[str, bytes]:
    """Bytes of all that was trained, by path; manifests name folders."""
    files = (path for path in (root / "adapters").rglob("*") if path.is_file() and path.name != MANIFEST)
    return {str(path.relative_to(root)): path.read_bytes() for path in files if ".tmp" not in str(path)}


def summary(found: Counter[str]) -> str:
    return (
        f"{found['kills']} kills: {found['half-written']} left a half-written checkpoint, {found['unmarked']} one "
        "without its marker; "
        f"{found['trainings']} trainings came to their end, {found['different']} with other bytes than the unbroken run"
    )


if __name__ == "__main__":
    main()
