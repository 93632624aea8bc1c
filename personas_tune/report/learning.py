"""How training went: its loss by step, and errors by the share of train rows."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from personas_tune.report.charts import draw_lines
from personas_tune.report.figure import WIDE, Absent, Figure, write_panels
from personas_tune.report.markup import Markup, number, percent
from personas_tune.report.plots import Frame, padded
from personas_tune.report.run import Row, Run

_N_POINTS = 16  # of a loss curve

Points = list[tuple[float, float]]


def learning_figures(run: Run) -> list[Figure | Absent]:
    """Loss curves and learning curves."""
    return [_losses(run), _by_share(run)]


def _losses(run: Run) -> Figure | Absent:
    title = "Training loss"
    if not run.losses:
        return Absent("loss", title, "no adapter set has a losses.parquet; it is written when the set is trained")
    curves = {name: loss_curves(table) for name, table in run.losses.items()}
    curves |= {f"{name}, validation": validation_curves(table) for name, table in run.losses.items()}
    curves = {name: of for name, of in curves.items() if of}
    if not curves:
        return Absent("loss", title, "losses.parquet holds no finite loss")
    heights = [value for of_set in curves.values() for points in of_set.values() for _, value in points]
    panels = [(name, _loss_panel(of_set, padded(heights))) for name, of_set in curves.items()]
    last = "; ".join(
        f"{name}: " + ", ".join(f"{adapter} {number(points[-1][1])}" for adapter, points in of_set.items())
        for name, of_set in curves.items()
    )
    return Figure(
        "loss",
        title,
        f"Loss of each adapter over its own steps, all panels on one scale.{_stretches(run)}",
        write_panels(panels),
        told=f"Training loss; at the end: {last}",
        size=WIDE,
    )


def _stretches(run: Run) -> str:
    n_steps = [len(rows) for table in run.losses.values() for _, rows in _by_adapter(table, "loss")]
    if max(n_steps, default=0) <= _N_POINTS:
        return ""
    which = "Training losses" if min(n_steps) > _N_POINTS else f"Training losses of more than {_N_POINTS} steps"
    return f" {which} are means of {_N_POINTS} equal stretches."


def _loss_panel(curves: Mapping[str, Points], height: tuple[float, float]) -> Markup:
    longest = max(points[-1][0] for points in curves.values())
    return draw_lines(Frame((0, longest), height), curves, "steps", "loss", dots=False)


def loss_curves(losses: pa.Table) -> dict[str, Points]:
    """A smoothed curve per adapter.

    Args:
        losses: ``losses.parquet`` of an adapter set.

    Returns:
        By adapter, points of (steps done, mean loss weighted by rows) over stretches of equally many steps.
    """
    curves = {}
    for adapter, rows in _by_adapter(losses, "loss"):
        step, loss, n_rows = (rows[name].to_numpy().astype(np.float64) for name in ("step", "loss", "n_rows"))
        stretches = np.array_split(np.arange(len(step)), min(_N_POINTS, len(step)))
        curves[adapter] = [(float(step[s].max()), float(np.average(loss[s], weights=n_rows[s]))) for s in stretches]
    return curves


def validation_curves(losses: pa.Table) -> dict[str, Points]:
    """By adapter, points of (steps done, validation loss); empty where none was measured."""
    if "validation_loss" not in losses.column_names:
        return {}
    found = _by_adapter(losses, "validation_loss")
    return {
        name: list(zip(*(rows[c].to_pylist() for c in ("step", "validation_loss")), strict=True))
        for name, rows in found
    }


def _by_adapter(losses: pa.Table, column: str) -> Iterator[tuple[str, pa.Table]]:
    """Each adapter's rows that have a finite value, by step."""
    known = losses.filter(pc.fill_null(pc.is_finite(losses[column].cast(pa.float64())), False))
    for adapter in sorted(set(known["adapter"].to_pylist())):
        yield adapter.rpartition("/")[2], known.filter(pc.equal(known["adapter"], adapter)).sort_by("step")


def _by_share(run: Run) -> Figure | Absent:
    title = "Error by train size"
    curves = share_curves(run)
    if not curves:
        return Absent("train-size", title, "no agents whose adapter sets differ in nothing but their share")
    panels = [(metric.upper(), _share_panel(curves, metric)) for metric in ("rmse", "mae")]
    told = "; ".join(
        f"{name}: " + ", ".join(f"{percent(share)} {number(row['rmse'])}" for share, row in rows)
        for name, rows in curves.items()
    )
    return Figure(
        "train-size",
        title,
        "Agents trained on growing shares of the train rows: where a curve still falls on the right, more may help. "
        f"Whiskers: {run.confidence} intervals over users.",
        write_panels(panels),
        told=f"RMSE by share of train rows. {told}",
        size=WIDE,
    )


def _share_panel(curves: Mapping[str, list[tuple[float, Row]]], metric: str) -> Markup:
    series = {name: [(share, float(row[metric])) for share, row in rows] for name, rows in curves.items()}
    ends = {name: [(share, *row[f"{metric}_ci"]) for share, row in rows] for name, rows in curves.items()}
    whiskers = {name: [each for each in of if None not in each] for name, of in ends.items()}
    heights = [value for points in series.values() for _, value in points]
    heights += [end for of in whiskers.values() for _, *both in of for end in both]
    shares = sorted({share for points in series.values() for share, _ in points})
    ticks = [(share, percent(share)) for share in shares]
    frame = Frame((0, 1), padded(heights, 0.12))
    return draw_lines(frame, series, "share of train rows", "", x_ticks=ticks, whiskers=whiskers)


def share_curves(run: Run) -> dict[str, list[tuple[float, Row]]]:
    """Agents that are alike but for the share of rows that their adapter set was trained on.

    Returns:
        By the name of the agent with the largest share: shares and rows of metrics, the smallest share first.
    """
    sets: Mapping[str, Any] = run.evaluation.get("adapter_sets") or {}
    agents: Mapping[str, Any] = run.evaluation.get("agents") or {}
    alike: dict[str, list[tuple[float, Row]]] = {}
    for row in run.agents:
        trained = sets.get(row.get("adapters") or "")
        if trained is None or row["rmse"] is None:
            continue
        share = trained.get("share")
        rest = [{**trained, "share": None}, {**agents.get(row["name"], {}), "adapters": None}]
        alike.setdefault(json.dumps(rest, sort_keys=True), []).append((1.0 if share is None else float(share), row))
    curves = {}
    for entries in alike.values():
        by_share = sorted(dict(entries).items())
        if len(by_share) > 1:
            curves[str(by_share[-1][1]["name"])] = by_share
    return curves
