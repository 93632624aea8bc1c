"""A finished experiment as far as the report needs it; what a stage didn't leave is None or empty."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from personas_tune.evaluation.reading import best_compared, best_of
from personas_tune.report.shapes import CLUSTERING, EVAL_MANIFEST, METRICS, PROMPT, damaged, read_shaped
from personas_tune.report.shapes import MANIFEST as ANY_MANIFEST
from personas_tune.workspace import COLUMNS, MANIFEST, Workspace, prompt_inputs, read_table

Row = Mapping[str, Any]  # of metrics.json: an agent, a baseline or the oracle
Pair = Mapping[str, Any]  # a paired difference


@dataclass(frozen=True)
class Run:
    """What the stages left.

    Args:
        name: The experiment's folder.
        workspace: Its files.
        metrics: ``eval/metrics.json``.
        labels: The rating scale.
        clustering: ``personas/clustering.json``.
        personas: ``personas/personas.parquet``.
        losses: ``losses.parquet`` of each adapter set.
        manifests: By stage folder, such as ``data`` or ``adapters/persona``.
    """

    name: str
    workspace: Workspace
    metrics: Mapping[str, Any]
    labels: tuple[str, ...]
    clustering: Mapping[str, Any] | None
    personas: pa.Table | None
    losses: Mapping[str, pa.Table]
    manifests: Mapping[str, Any]

    @property
    def agents(self) -> list[Row]:
        """The agents, in the config's order."""
        return list(self.metrics["agents"])

    @property
    def baselines(self) -> list[Row]:
        """The baselines, regressions that use an agent among them."""
        return list(self.metrics["baselines"])

    @property
    def hybrids(self) -> Mapping[str, str]:
        """Regressions that use an agent, each with the one without it that it is compared with."""
        baselines = {row["name"] for row in self.baselines}
        return {pair["a"]: pair["b"] for pair in self.metrics["paired"] if pair["a"] in baselines}

    @property
    def plain_baselines(self) -> list[Row]:
        """The baselines that aren't there for the sake of a regression that uses an agent."""
        hybrids = {*self.hybrids, *self.hybrids.values()}
        return [row for row in self.baselines if row["name"] not in hybrids]

    @property
    def has_gaps(self) -> bool:
        """Whether some predictor left rows unanswered, so that only the filled errors are of the same rows."""
        return any(row["n_parsed"] < row["n"] for row in self.predictors)

    @property
    def predictors(self) -> list[Row]:
        """Agents, baselines and, of a world, the floor."""
        oracle = self.metrics.get("oracle")
        return [*self.agents, *self.baselines, *([oracle] if oracle else [])]

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the metrics were measured with."""
        return dict(self.metrics["settings"])

    @property
    def confidence(self) -> str:
        """Of the intervals."""
        return f"{100 * self.settings['confidence']:g}%"

    @property
    def best_agent(self) -> Row | None:
        """The agent with the lowest RMSE over all rows."""
        return best_of(self.agents)

    @property
    def best_baseline(self) -> Row | None:
        """The best of the baselines that agents are compared with."""
        return best_compared(self.metrics) or best_of(self.plain_baselines)

    @property
    def evaluation(self) -> Mapping[str, Any]:
        """The settings of ``eval/``."""
        return dict(self.manifests.get("eval", {}).get("settings", {}))


def read_run(workspace: Workspace) -> Run:
    """Read an experiment.

    Raises:
        MissingInputError: If it isn't evaluated yet.
        DataError: If a file is damaged.
    """
    metrics = read_metrics(workspace)
    labels = tuple(read_shaped(workspace.prompt_settings, PROMPT)["labels"])
    if (wrong := _uneven(metrics, len(labels))) is not None:
        raise damaged(workspace.metrics, wrong)
    manifests = {path.parent.relative_to(workspace.root).as_posix(): _manifest(path) for path in _manifests(workspace)}
    losses = {path.parent.name: read_table(path, ("adapter", "step", "loss", "n_rows")) for path in _losses(workspace)}
    return Run(
        name=workspace.root.name,
        workspace=workspace,
        metrics=metrics,
        labels=labels,
        clustering=read_shaped(workspace.clustering, CLUSTERING) if workspace.clustering.is_file() else None,
        personas=read_table(workspace.personas, COLUMNS["personas"]) if workspace.personas.is_file() else None,
        losses=losses,
        manifests=manifests,
    )


def read_metrics(workspace: Workspace) -> Mapping[str, Any]:
    """``eval/metrics.json``, of the shape that the report needs; raises as :func:`read_run` does."""
    return dict(read_shaped(workspace.metrics, METRICS))


def _manifest(path: Path) -> Mapping[str, Any]:
    return dict(read_shaped(path, EVAL_MANIFEST if path.parent.name == "eval" else ANY_MANIFEST))


def _uneven(metrics: Mapping[str, Any], n_labels: int) -> str | None:
    """The first thing in it that hasn't as many entries as it is drawn with."""
    for row in [*metrics["agents"], *metrics["baselines"]]:
        confusion = row.get("confusion")
        if confusion is not None and [len(counts) for counts in confusion] != [n_labels] * n_labels:
            return f"the confusion of {row['name']} is not {n_labels} x {n_labels}, as samples/prompt.json has labels"
        distribution = row.get("distribution") or {"labels": [], "overall": {}}
        groups = [distribution["overall"], *distribution.get("per_persona", {}).values()]
        shares = [each[side] for each in groups if each for side in ("true", "simulated") if each[side] is not None]
        if any(len(each) != len(distribution["labels"]) for each in shares):
            return f"the distribution of {row['name']} has not a share for each label"
    for agent, matrix in (metrics.get("own_versus_other") or {}).items():
        n_personas = len(matrix["personas"])
        if [len(matrix["n"]), *map(len, matrix["rmse"])] != [n_personas] * (1 + len(matrix["adapters"])):
            return f"own_versus_other.{agent} has not a figure for each adapter and persona"
    return None


def files_of(workspace: Workspace) -> list[Path]:
    """Every file that the report depends on, as far as it is there."""
    optional = [
        *prompt_inputs(workspace), workspace.test_samples, workspace.clustering, workspace.personas,
        *sorted((workspace.root / "eval").glob("predictions_*.parquet")),
        *_losses(workspace), *_manifests(workspace),
    ]  # fmt: skip
    return [workspace.metrics, *(path for path in optional if path.is_file())]


def pair_of(run: Run, a: str, b: str) -> Pair | None:
    """The differences of ``a`` to ``b`` with their ends, whichever way round they were measured."""
    for pair in run.metrics["paired"]:
        if (pair["a"], pair["b"]) == (a, b):
            return dict(pair)
        if (pair["a"], pair["b"]) == (b, a):
            others = {key: _turned(value) for key, value in pair.items() if isinstance(value, dict)}
            return {"a": a, "b": b, **_turned(pair), **others}
    return None


def _turned(ends: Mapping[str, Any]) -> dict[str, Any]:
    turned = {"difference": ends["difference"], "low": ends["high"], "high": ends["low"]}
    return {key: None if value is None else -value for key, value in turned.items()}


def _losses(workspace: Workspace) -> list[Path]:
    return _below(workspace, "adapters/*/losses.parquet")


def _manifests(workspace: Workspace) -> list[Path]:
    stages = ("data", "memory", "personas", "samples", "adapters/*", "eval")
    return [path for stage in stages for path in _below(workspace, f"{stage}/{MANIFEST}")]


def _below(workspace: Workspace, pattern: str) -> list[Path]:
    """Files in order; folders that a killed run left half written are hidden and don't count."""
    return sorted(path for path in workspace.root.glob(pattern) if not path.parent.name.startswith("."))
