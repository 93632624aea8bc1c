"""A made-up evaluated experiment, written straight to disk: what the report is made of."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tiny import write_experiment

from personas_tune.datasets.source import RatingSource
from personas_tune.evaluation.baselines import Baseline
from personas_tune.evaluation.intervals import Resampling
from personas_tune.evaluation.measure import Measurement, readout_probabilities, readout_values
from personas_tune.evaluation.predict import prediction_table
from personas_tune.workspace import Workspace, read_table, to_json

READOUTS = {"base": "expected", "persona": "expected", "persona_half": "argmax", "persona_text": "generate"}
ADAPTERS = {"base": None, "persona": "persona", "persona_half": "persona_half", "persona_text": "persona"}
HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)></details>&amp;'


def write_evaluated(root: Path, skill: float = 0.9, seed: int = 3) -> Workspace:
    """Every file that the report reads.

    Args:
        root: The experiment's folder.
        skill: How near the agents' predictions are to the truth, 0 to 1.
        seed: Of predictions and figures.
    """
    workspace = write_experiment(root)
    for folder in ("eval", "personas"):
        (root / folder).mkdir()
    _write_personas(workspace)
    settings = {"agents": {}, "adapter_sets": {}}
    for name, readout in READOUTS.items():
        settings["agents"][name] = {
            "adapters": ADAPTERS[name],
            "readout": "expected" if name == "persona_half" else readout,
        }
    for name, share in {"persona": 1.0, "persona_half": 0.5}.items():
        settings["adapter_sets"][name] = {"per": "persona", "share": share}
        _write_losses(root / "adapters" / name / "losses.parquet")
        _write_manifest(root / "adapters" / name, {"adapter_set": {"share": share}, "optimizer": {"lr": 0.0003}})
    _write_eval(workspace, skill, seed)
    _write_manifest(root / "data", {"data": {"format": "world", "traits": "train", "columns": {}}})
    _write_manifest(root / "eval", settings)
    return workspace


def make_hostile(workspace: Workspace) -> None:
    """Put markup wherever a text of a user's may stand."""
    for path, columns in {
        workspace.items: ["title", "summary"],
        workspace.profiles: ["profile"],
        workspace.memories: ["memory"],
    }.items():
        table = read_table(path)
        for column in columns:
            texts = [None if text is None else f"{text} {HOSTILE}" for text in table[column].to_pylist()]
            table = table.set_column(table.column_names.index(column), column, pa.array(texts, pa.string()))
        pq.write_table(table, path)
    clustering = json.loads(workspace.clustering.read_text())
    clustering["words"]["0"][0]["word"] = HOSTILE
    workspace.clustering.write_text(to_json(clustering))
    _write_manifest(workspace.root / "data", {"data": {"format": "world", HOSTILE: HOSTILE}})
    metrics = json.loads(workspace.metrics.read_text())
    metrics["agents"][0]["base"] = HOSTILE
    workspace.metrics.write_text(to_json(metrics))
    said = read_table(workspace.predictions("persona_text"))
    texts = pa.array([HOSTILE] * len(said), pa.string())
    pq.write_table(
        said.set_column(said.column_names.index("text"), "text", texts), workspace.predictions("persona_text")
    )


def _write_eval(workspace: Workspace, skill: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    source = RatingSource(workspace.root)
    samples = source.samples("test")
    labels = np.array([float(label) for label in source.labels])
    ratings = np.array([sample.rating for sample in samples])
    measurement = Measurement(samples, read_table(workspace.users), labels.tolist(), Resampling(99, 0.95, seed))
    measurement.add_baseline("constant", Baseline(np.full(len(ratings), 4.0), {"label": 4.0}))
    noisy = np.clip(0.5 * ratings + 0.5 * rng.uniform(1, 5, len(ratings)), 1, 5)
    measurement.add_baseline("user_item_bias", Baseline(noisy, {}))
    for name, readout in READOUTS.items():
        near = -((labels - ratings[:, None]) ** 2)
        weights = np.exp(skill * near + rng.normal(0, 1 - skill + 0.1, near.shape))
        p = weights / weights.sum(axis=1, keepdims=True)
        texts = None
        if readout == "generate":
            texts = ["no idea", *["2"] * (len(ratings) - 1)]
        table = prediction_table(samples, p, source.labels, texts)
        pq.write_table(table, workspace.predictions(name))
        published = {"rmse": 0.9, "mae": 0.7, "urr": 0.01} if name == "persona" else None
        described = {"base": "default", "adapters": ADAPTERS[name], "memories": "both", "readout": readout}
        predicted, known = readout_values(table, readout), readout_probabilities(table, readout)
        measurement.add_agent(name, predicted, {**described, "published": published}, known)
    measurement.add_hybrid("persona", Baseline(0.5 * noisy + 0.5 * ratings, {}), Baseline(noisy, {}))
    matrix = {
        "adapters": ["0", "1"], "personas": ["0", "1"], "n": [9, 9],
        "rmse": [[0.91, 1.02], [0.97, 1.0]], "mae": [[0.71, 0.82], [0.77, 0.8]],
        "own_minus_other": {"difference": -0.04, "low": -0.08, "high": 0.01},
    }  # fmt: skip
    metrics = measurement.metrics(historical_average="all", traits="train", seed=seed)
    workspace.metrics.write_text(to_json({**metrics, "own_versus_other": {"persona": matrix}}))


def _write_personas(workspace: Workspace) -> None:
    users = read_table(workspace.users)["user_id"].to_pylist()
    table = pa.table(
        {
            "user_id": users,
            "persona": pa.array([place % 2 for place in range(len(users))], pa.int32()),
            "distance": [0.1] * len(users),
            "x": [float(place % 3) for place in range(len(users))],
            "y": [float(place) for place in range(len(users))],
        }
    )
    pq.write_table(table, workspace.personas)
    words = {
        str(k): [{"word": word, "score": 1.5 - at, "n_users": 2} for at, word in enumerate(_WORDS[k])] for k in (0, 1)
    }
    tried = [
        {"k": k, "inertia": 4.0 / k, "silhouette": None if k == 1 else 0.5 - k / 10, "sizes": []} for k in (1, 2, 3)
    ]
    stability = {"seeds": [3, 4, 5], "adjusted_rand": [1.0, 0.5, 0.75], "mean": 0.75, "low": 0.5}
    record = {"k": 2, "elbow": 2, "range": tried, "words": words, "stability": stability}
    workspace.clustering.write_text(to_json(record))


_WORDS: Sequence[Sequence[str]] = (("river", "noir"), ("comet", "space"))


def _write_losses(path: Path) -> None:
    path.parent.mkdir(parents=True)
    steps = [(f"{path.parent.name}/{adapter}", step) for adapter in "01" for step in range(1, 41)]
    columns = {
        "adapter": [adapter for adapter, _ in steps],
        "step": pa.array([step for _, step in steps], pa.int32()),
        "loss": [2.0 / step for _, step in steps],
        "learning_rate": [0.001] * len(steps),
        "n_rows": pa.array([16] * len(steps), pa.int32()),
        "validation_loss": pa.array([1.0 if step % 20 == 0 else None for _, step in steps], pa.float64()),
    }
    pq.write_table(pa.table(columns), path)


def _write_manifest(folder: Path, settings: dict[str, Any]) -> None:
    record = {"seed": 3, "settings": settings, "versions": {"torch": "2.10.0", "python": "3.11.7"}, "inputs": {}}
    (folder / "manifest.json").write_text(to_json(record))
