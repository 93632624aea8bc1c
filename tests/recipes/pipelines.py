"""Small logs, experiments on them, and recipes run as `tune run` runs them."""

import contextlib
import csv
import io
import json
import runpy
import shutil
import subprocess
import sys
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from several import Outcome
from tiny import base_sections

from personas_tune.workspace import MANIFEST

GENRES = ("War", "Romance", "Comedy", "Crime", "Drama")
WORDS = (
    "anchor", "bridge", "castle", "desert", "engine", "forest", "garden", "harbor", "island", "jungle", "kettle",
    "lantern", "meadow", "needle", "orchard", "palace",
)  # fmt: skip
PEOPLE = ("Ann Lee", "Bo Fox", "Cleo Aké", "Dan Ruiz", "Eva Stone")
N_EARLY, N_LATE = 24, 8
TRAIN_FRACTION = 0.6
PREPARATION = "stages=[persona_prepare,persona_distill,persona_cluster,persona_raft]"


@dataclass
class SmallLog:
    """A log and its items, to be changed before they are written.

    The last quarter of every user's ratings is about late items, which occur nowhere else: with 60% of a
    user's ratings to learn from, they are in test rows only.
    """

    ratings: list[dict[str, Any]]
    items: list[dict[str, Any]]

    def write(self, folder: Path) -> None:
        """Write ``ratings.csv`` and ``items.csv``."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in (("ratings", self.ratings), ("items", self.items)):
            with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as stream:
                writer = csv.DictWriter(stream, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)

    @property
    def late_items(self) -> list[dict[str, Any]]:
        return [item for item in self.items if item["item_id"].startswith("late")]

    def rows_to_predict(self, user_ids: set[str]) -> list[dict[str, Any]]:
        """Every rating behind the cut of one of these users."""
        chosen = []
        for user_id in user_ids:
            rows = [row for row in self.ratings if row["user_id"] == user_id]
            chosen += rows[int(len(rows) * TRAIN_FRACTION + 1e-9) :]
        return chosen


def small_log(seed: int = 0, n_users: int = 24) -> SmallLog:
    """Ratings from 0.5 to 5 by users who each like one genre; times with ties; some items lack what can lack."""
    rng = np.random.default_rng(seed)
    items = [_item(number, rng) for number in range(N_EARLY + N_LATE)]
    ratings = []
    for user in range(n_users):
        n = int(rng.integers(12, 18))
        early, late = rng.permutation(N_EARLY)[: n - n // 4], N_EARLY + rng.permutation(N_LATE)[: n // 4]
        times = 1_000_000 * user + np.cumsum(rng.integers(0, 3, n))
        for number, time in zip([*early, *late], times, strict=True):
            liking = 1.5 if GENRES[user % 5] in items[number]["genres"] else -0.5
            rating = np.clip(np.rint(2 * (3 + liking + rng.normal())) / 2, 0.5, 5)
            ratings.append(
                {
                    "user_id": f"u{user:02}", "item_id": items[number]["item_id"], "rating": float(rating),
                    "timestamp": int(time),
                }
            )  # fmt: skip
    return SmallLog(ratings, items)


def _item(number: int, rng: np.random.Generator) -> dict[str, Any]:
    words = [WORDS[index] for index in rng.permutation(len(WORDS))]
    return {
        "item_id": f"early{number:02}" if number < N_EARLY else f"late{number:02}",
        "title": f'The {words[0].title()}, or "{words[1].title()}"',
        "year": 1960 + int(rng.integers(60)) if number % 7 else "",
        "genres": "|".join(GENRES[index] for index in rng.permutation(5)[: 1 + number % 2]),
        "summary": f"A tale of a {words[2]} and a {words[3]} by the {words[4]}" if number % 5 else "",
        "cast": "|".join(PEOPLE[index] for index in rng.permutation(5)[: number % 3]),
    }


def csv_experiment(folder: Path, checkpoint: Path) -> dict[str, Any]:
    """An experiment on the log in ``folder``, with all kinds of agents."""
    return {
        "output_dir": str(folder / "run"),
        "seed": 3,
        "data": {
            "format": "csv",
            "path": str(folder / "ratings.csv"),
            "item_metadata": str(folder / "items.csv"),
            "rating_scale": {"min": 0.5, "max": 5, "step": 0.5},
            "cohort": {"n_users": 6, "min_interactions": 10, "max_interactions": 30},
            "split": {"by": "user_time", "train_fraction": TRAIN_FRACTION},
        },
        "distill": {"distiller": "template", "batch_size": 5},
        "personas": {"embedder": "lsa", "dim": 4, "k": 2, "k_max": 4},
        "retrieval": {"embedder": "lsa", "dim": 8, "k": 1, "before_target": True},
        **base_sections(checkpoint, lora_dropout=0.1),
        "epochs": 1,
        "batch_size": 8,
        "gradient_accumulation_steps": 1,
        "rows_per_user": 4,
        "training": {"prefix_sharing": "auto"},
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 0.01},
        "loss": {"_component_": "torch.nn.CrossEntropyLoss"},
        "adapter_sets": {
            "persona": {"per": "persona", "memories": "both"},
            "single": {"per": "all", "memories": "short", "rows": "largest_persona"},
        },
        "agents": {
            "base": {"memories": "both"},
            "single": {"adapters": "single", "readout": "argmax"},
            "persona": {"adapters": "persona"},
            "persona_generate": {"adapters": "persona", "readout": "generate"},
        },
        "evaluation": {"n_resamples": 99},
        "metric_logger": {
            "_component_": "torchtune.training.metric_logging.DiskLogger",
            "log_dir": "${output_dir}/logs",
            "filename": "training.txt",
        },
    }


def world_experiment(folder: Path, checkpoint: Path) -> dict[str, Any]:
    """The same on a small synthetic world, with shuffled personas as a control."""
    experiment = deepcopy(csv_experiment(folder, checkpoint))
    experiment["data"] = {
        "format": "world",
        "world": {"n_users": 120, "n_items": 60, "n_groups": 3, "mean_interactions": 22, "seed": 7},
        "cohort": {"n_users": 6, "min_interactions": 20, "max_interactions": 24},
    }
    experiment["adapter_sets"]["shuffled"] = {"per": "persona", "shuffle_personas": True}
    experiment["agents"] = {
        "base": {"memories": "both"},
        "shuffled": {"adapters": "shuffled"},
        "persona": {"adapters": "persona"},
    }
    return experiment


def write_yaml(path: Path, experiment: dict[str, Any]) -> Path:
    """Write an experiment's YAML; give its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(experiment, sort_keys=False), encoding="utf-8")
    return path


def run_recipe(recipe: str, config: Path | str, *overrides: str) -> Outcome:
    """Run a recipe in this process, as ``tune run RECIPE --config CONFIG ...`` runs it in its own."""
    out, err = io.StringIO(), io.StringIO()
    status: Any = 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", [recipe, "--config", str(config), *overrides])
        try:
            runpy.run_module(recipe, run_name="__main__")
        except SystemExit as stop:
            status = stop.code or 0
    return Outcome(int(status), out.getvalue(), err.getvalue())


@dataclass(frozen=True)
class Finished:
    """A pipeline that has run to its end: its YAML, its ``output_dir`` and what it printed."""

    config: Path
    root: Path
    outcome: Outcome


def run_to_the_end(config: Path, *overrides: str, recipe: str = "persona_pipeline") -> Finished:
    """Run a recipe that must succeed."""
    outcome = run_recipe(recipe, config, *overrides)
    assert outcome.status == 0, outcome.out + outcome.err
    named = [word.removeprefix("output_dir=") for word in overrides if word.startswith("output_dir=")]
    root = named[0] if named else yaml.safe_load(config.read_text(encoding="utf-8"))["output_dir"]
    return Finished(config, Path(root), outcome)


def export_adapters(run: Finished, folder: Path) -> dict[str, Path]:
    """Export a run's adapters from a copy in ``folder``; gives PEFT folders by the names of ``serving.json``."""
    root = Path(shutil.copytree(run.root, folder / "exported"))
    run_to_the_end(run.config, f"output_dir={root}", recipe="persona_export")
    record = json.loads((root / "export" / "serving.json").read_text(encoding="utf-8"))
    return {name: Path(entry["path"]) for name, entry in record["adapters"].items()}


def without_an_adapter(root: Path, set_name: str = "persona") -> None:
    """Take the first user out of an adapter set's assignment."""
    path = root / "adapters" / set_name / "assignment.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)


def files_below(root: Path) -> dict[str, bytes]:
    """Bytes of each file that the stages wrote, by path; manifests (they name paths) and logs left out."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name not in (MANIFEST, "torchtune_config.yaml") and path.parent.name != "logs"
    }


def stage_folders(root: Path) -> dict[str, int]:
    """Every folder with a manifest, and when that was written (ns)."""
    manifests = root.rglob(MANIFEST)
    return {str(path.parent.relative_to(root)): path.stat().st_mtime_ns for path in manifests}


def read(root: Path, name: str) -> pa.Table:
    """A table of a stage, such as ``data/items``."""
    return pq.read_table(root / f"{name}.parquet")


def rows(root: Path, name: str) -> list[dict[str, Any]]:
    """The same as rows."""
    found: list[dict[str, Any]] = read(root, name).to_pylist()
    return found


def tune(folder: Path, *words: Path | str, env: dict[str, str] | None = None) -> Outcome:
    """Run the ``tune`` command for real, in ``folder``."""
    done = subprocess.run(
        [Path(sys.executable).with_name("tune"), *map(str, words)],
        cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    return Outcome(done.returncode, done.stdout, done.stderr)
