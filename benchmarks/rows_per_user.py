"""What `rows_per_user` does to accuracy and cost: the same rows and steps, each step from fewer users.

    tune run persona_pipeline --config quickstart.yaml output_dir=runs/final_profiles prompt.profile=final \\
        'stages=[persona_prepare,persona_distill,persona_cluster,persona_raft]'
    OMP_NUM_THREADS=1 python benchmarks/rows_per_user.py --workspace runs/final_profiles --seeds 3

Trains the adapter set `persona` of an experiment that is done up to `persona_raft`, through `persona_lora` and
`persona_eval`, in folders of their own that share the earlier stages' files. What is finished isn't run again, so
more seeds, or the table after an interruption, come by the same command. The reference of each number of rows a step
is plain training: rows in any order, no prefix shared.
    profiles  different profiles in a step. With `prompt.profile: before_target` a user has a new one every
              `distill.batch_size` rows, so no more rows than that can share it
    RMSE      of the readout `expected` on the test rows: mean of the seeds, lowest and highest
    minus     RMSE over all seeds minus the reference's, and 95% of resamplings of the users
    CPU       of a training row, median of the seeds; ratio: reference / this
The reference's lowest and highest say what the seed alone does; the interval is of the users, not of the seeds.
"""

import argparse
import importlib
import json
import statistics
import sys
import time
import warnings
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig

from personas_tune.config import load_experiment
from personas_tune.datasets import RatingSource
from personas_tune.evaluation.intervals import paired_difference
from personas_tune.training.order import epoch_order
from personas_tune.training.sets import plan_adapter_set
from personas_tune.workspace import read_json, read_table

ROWS_PER_USER = {16: (1, 4, 8, 16), 64: (4, 8, 16, 32)}  # by rows of a step
FIRST_SEED = 42


@dataclass(frozen=True)
class Setting:
    rows_per_step: int
    rows_per_user: int = 1
    prefix_sharing: str = "auto"


@dataclass(frozen=True)
class Outcome:
    """Of one training; arrays by user."""

    squared_errors: NDArray[np.float64]
    n_rows: NDArray[np.float64]
    cpu_seconds: float

    @property
    def rmse(self) -> float:
        return float(np.sqrt(self.squared_errors.sum() / self.n_rows.sum()))


class CpuClock:
    """Takes a metric logger's place and writes the CPU time from the start of a training to its end."""

    def __init__(self, log_dir: str) -> None:
        self.file = Path(log_dir) / "cpu_seconds.json"

    def log_config(self, config: DictConfig) -> None:
        self.started = time.process_time()

    def log_dict(self, payload: Mapping[str, Any], step: int) -> None:
        pass

    def close(self) -> None:
        self.file.parent.mkdir(exist_ok=True)
        self.file.write_text(json.dumps(time.process_time() - self.started))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="quickstart.yaml")
    parser.add_argument("--workspace", type=Path, required=True, help="output_dir of the stages up to persona_raft")
    parser.add_argument("--folder", type=Path, help="for what is trained; WORKSPACE/rows_per_user by default")
    parser.add_argument("--seeds", type=int, default=3, help=f"how many, from {FIRST_SEED} on")
    parser.add_argument("--rows-per-step", type=int, nargs="+", choices=ROWS_PER_USER, default=list(ROWS_PER_USER))
    parser.add_argument("--batch-size", type=int, default=8, help="rows of a pass")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides for every training")
    args = parser.parse_args()
    args.folder = args.folder or args.workspace / "rows_per_user"
    warnings.filterwarnings("error", message=".*training goes on without sharing")
    columns = [settings_of(rows_per_step) for rows_per_step in args.rows_per_step]
    seeds = range(FIRST_SEED, FIRST_SEED + args.seeds)
    base = measure_base(args)
    outcomes = {
        (setting, seed): train_and_measure(args, setting, seed)
        for seed in seeds  # outermost: a run that is stopped has done whole columns
        for column in columns
        for setting in column
    }
    n_test, n_users = int(base.n_rows.sum()), len(base.n_rows)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; {args.workspace}, seeds {list(seeds)}")
    print(f"{n_test} test rows of {n_users} users, base alone: RMSE {base.rmse:.4f}")
    print(" rows of                       RMSE                                                    CPU ms")
    print("step user sharing profiles    mean lowest highest   minus reference's [95%]           a row   ratio")
    for column in columns:
        reference = [outcomes[column[0], seed] for seed in seeds]
        for setting in column:
            print_line(args, setting, [outcomes[setting, seed] for seed in seeds], reference)


def settings_of(rows_per_step: int) -> list[Setting]:
    """The settings of so many rows a step, the reference first."""
    shared = [Setting(rows_per_step, rows_per_user) for rows_per_user in ROWS_PER_USER[rows_per_step]]
    return [Setting(rows_per_step, prefix_sharing="off"), *shared]


def train_and_measure(args: argparse.Namespace, setting: Setting, seed: int) -> Outcome:
    name = f"{setting.rows_per_step}_{setting.rows_per_user}_{setting.prefix_sharing}_{seed}"
    overrides = [
        f"seed={seed}", f"batch_size={args.batch_size}", f"rows_per_user={setting.rows_per_user}",
        f"gradient_accumulation_steps={setting.rows_per_step // args.batch_size}",
        f"training.prefix_sharing={setting.prefix_sharing}", "training.keep_last_n_checkpoints=0",
        f"metric_logger._component_={CpuClock.__module__}.CpuClock", "metric_logger.log_dir=${output_dir}/logs",
        "agents.persona.adapters=persona", "evaluation.n_resamples=99", *args.set,
    ]  # fmt: skip
    folder = run(args, name, ["persona_lora", "persona_eval"], overrides)
    outcome = measure(folder, "persona", read_json(folder / "logs" / "cpu_seconds.json"))
    print(f"{name}: RMSE {outcome.rmse:.4f}, {outcome.cpu_seconds:.0f} s", file=sys.stderr, flush=True)
    return outcome


def measure_base(args: argparse.Namespace) -> Outcome:
    memories = load_experiment(args.config).adapter_sets.persona.memories
    return measure(run(args, "base", ["persona_eval"], [f"agents.base.memories={memories}"]), "base", 0.0)


def run(args: argparse.Namespace, name: str, recipes: list[str], overrides: list[str]) -> Path:
    """Run recipes as `tune run` does, in a workspace of its own."""
    folder = Path(args.folder, name)
    share_stages(args.workspace, folder)
    shipped = load_experiment(args.config)
    dropped = [f"~agents.{agent}" for agent in shipped.agents]
    dropped += [f"~adapter_sets.{other}" for other in shipped.adapter_sets if other != "persona"]
    for recipe in recipes:
        sys.argv = [recipe, "--config", args.config, f"output_dir={folder}", *dropped, *overrides]
        with (folder / f"{recipe}.txt").open("w") as output, redirect_stdout(output), redirect_stderr(output):
            status = status_of(recipe)
        if status:
            raise SystemExit(f"{recipe} failed, see {output.name}")
    return folder


def share_stages(workspace: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for stage in ("data", "memory", "personas", "samples"):
        if not (folder / stage).exists():
            (folder / stage).symlink_to((workspace / stage).absolute())


def status_of(recipe: str) -> Any:
    try:
        importlib.import_module(recipe).recipe_main()
    except SystemExit as end:
        return end.code


def measure(folder: Path, agent: str, cpu_seconds: float) -> Outcome:
    table = read_table(folder / "eval" / f"predictions_{agent}.parquet", ("user_id", "rating", "expected"))
    errors = table["expected"].to_numpy() - table["rating"].to_numpy()
    _, user = np.unique(table["user_id"].to_numpy(), return_inverse=True)
    return Outcome(np.bincount(user, errors**2), np.bincount(user).astype(np.float64), cpu_seconds)


def print_line(args: argparse.Namespace, setting: Setting, outcomes: list[Outcome], reference: list[Outcome]) -> None:
    rmse = [outcome.rmse for outcome in outcomes]
    cost, peer = (statistics.median(each.cpu_seconds for each in group) for group in (outcomes, reference))
    n_trained, profiles = count_rows_and_profiles(args, setting)
    line = f"{setting.rows_per_step:4} {setting.rows_per_user:4} {setting.prefix_sharing:>7} {profiles:8.1f}"
    line += f" {statistics.mean(rmse):7.4f} {min(rmse):6.4f} {max(rmse):7.4f}"
    line += f"   {against(outcomes, reference):29} {1e3 * cost / n_trained:9.1f} {peer / cost:7.2f}"
    print(line, flush=True)


def against(outcomes: list[Outcome], reference: list[Outcome]) -> str:
    """The paired difference of RMSE over all seeds; a user is drawn with its rows under every seed."""
    if outcomes[0] is reference[0]:
        return "-"
    squared_errors, peers = (sum(each.squared_errors for each in group) for group in (outcomes, reference))
    difference, low, high = paired_difference(squared_errors, peers, sum(each.n_rows for each in outcomes))
    return f"{difference:+.4f} [{low:+.4f}, {high:+.4f}]"


def count_rows_and_profiles(args: argparse.Namespace, setting: Setting) -> tuple[int, float]:
    """Rows that a training takes, all epochs together, and different profiles in a step of its first epoch."""
    cfg, source = load_experiment(args.config, args.set), RatingSource(args.workspace)
    samples = source.samples("train")
    chosen = cfg.adapter_sets.persona
    plans, _ = plan_adapter_set(
        samples, per=chosen.per, rows=chosen.rows, shuffle_personas=chosen.shuffle_personas,
        validation_share=cfg.validation_share, seed=FIRST_SEED,
    )  # fmt: skip
    size, most_steps = setting.rows_per_step, cfg.max_steps_per_epoch
    n_rows, n_profiles = 0, []
    for plan in plans:
        names = [source.prefix_name(samples[index]) for index in plan.rows]
        order = epoch_order(
            names, epoch=0, rows_per_user=setting.rows_per_user, seed=FIRST_SEED, adapter=f"persona/{plan.adapter}"
        )[: most_steps and most_steps * size]
        n_rows += cfg.epochs * len(order)
        n_profiles += [len({names[i] for i in order[start : start + size]}) for start in range(0, len(order), size)]
    return n_rows, statistics.mean(n_profiles)


if __name__ == "__main__":
    main()
