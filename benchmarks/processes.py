"""Training in several processes: rows per second and agreement, against one process.

    OMP_NUM_THREADS=1 python benchmarks/processes.py                    # 1 and 2 processes, about 5 minutes on 2 cores
    python benchmarks/processes.py --config mine.yaml --processes 1 8 --device cuda

Runs `tune run [--nproc_per_node N] persona_lora` on the quickstart's world, its stages up to persona_raft done first.
Rows per second are those of the steps, as the recipe prints them: loading is left out. Then every adapter is
compared with the one that one process made: `bytes` says whether they are the same bytes; else the largest difference
of a weight is told.
"""

import argparse
import os
import re
import shutil
import subprocess
import tempfile
from datetime import date
from pathlib import Path

import torch

from personas_tune.adapters.files import load_native

PREPARATION = "stages=[persona_prepare,persona_distill,persona_cluster,persona_raft]"
SETS = {"persona": "{persona: {per: persona}}", "single": "{single: {per: all}}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="quickstart.yaml")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--parallel", nargs="+", default=["persona", "data"])
    parser.add_argument("--steps", type=int, default=12, help="of an adapter and epoch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    machine = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    print(f"{date.today()}, torch {torch.__version__}, {args.device}, {machine}")
    print("set       parallel  processes   rows/s   ratio   adapters")
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared"
        tune([], "persona_pipeline", args, prepared, PREPARATION)
        for name in SETS:
            peer = Path(folder) / f"{name}_1"
            alone = rows_per_second([], name, args, prepared, peer)
            print(f"{name:10}{'-':10}{1:9}{alone:9.1f}{1:8.2f}", flush=True)
            for parallel in args.parallel:
                for n in (n for n in args.processes if n > 1):
                    root = Path(folder) / f"{name}_{parallel}_{n}"
                    rate = rows_per_second(["--nproc_per_node", str(n)], name, args, prepared, root, parallel)
                    print(
                        f"{name:10}{parallel:10}{n:9}{rate:9.1f}{rate / alone:8.2f}   {difference(peer, root)}",
                        flush=True,
                    )


def rows_per_second(
    launcher: list[str], name: str, args: argparse.Namespace, prepared: Path, root: Path, parallel: str = "auto"
) -> float:
    shutil.copytree(prepared, root)
    only = ["~agents", "~adapter_sets", f"adapter_sets={SETS[name]}"]
    output = tune(
        launcher, "persona_lora", args, root, *only, f"max_steps_per_epoch={args.steps}", f"parallel={parallel}"
    )
    return float(re.findall(r"([\d.]+) rows/s", output)[-1])


def tune(launcher: list[str], recipe: str, args: argparse.Namespace, root: Path, *options: str) -> str:
    command = ["tune", "run", *launcher, recipe, "--config", args.config, f"output_dir={root}", f"device={args.device}"]
    done = subprocess.run([*command, *options, *args.overrides], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def difference(one: Path, other: Path) -> str:
    """How far the adapters of two runs are apart."""
    folders = sorted(file.parent.relative_to(one) for file in one.glob("adapters/*/*/adapter.safetensors"))
    largest, scale = 0.0, 0.0
    for folder in folders:
        a, b = load_native(one / folder), load_native(other / folder)
        largest = max(largest, *(float((a[name] - b[name]).abs().max()) for name in a))
        scale = max(scale, *(float(weight.abs().max()) for weight in a.values()))
    return "same bytes" if largest == 0 else f"differ by {largest:.1e} (largest weight {scale:.1e})"


if __name__ == "__main__":
    main()
