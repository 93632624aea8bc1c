"""The table of faithfulness: what a low error doesn't say of a simulator."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from personas_tune.evaluation.reading import title_of
from personas_tune.report.figure import WIDE, Absent, Figure, write_notes, write_table
from personas_tune.report.markup import Child, join, number, percent, tag
from personas_tune.report.run import Row, Run


@dataclass(frozen=True)
class Column:
    """A figure of every predictor.

    Args:
        name: Its heading.
        path: Where it stands in a row of ``metrics.json``.
        best: Which value is best: ``high``, ``low`` or ``near 1``.
        written: How it is printed.
    """

    name: str
    path: tuple[str, ...]
    best: str
    written: Callable[[float | None], str] = number


def _in_tenths(share: float | None) -> str:
    return percent(share, 1)


_COLUMNS = (
    Column("accuracy", ("accuracy",), "high", _in_tenths),
    Column("within 1", ("within_1",), "high", _in_tenths),
    Column("kappa", ("kappa",), "high"),
    Column("Pearson", ("pearson",), "high"),
    Column("Spearman", ("spearman",), "high"),
    Column("pairs in order", ("pairwise_order",), "high", _in_tenths),
    Column("JS", ("distribution", "overall", "js"), "low"),
    Column("JS of points", ("distribution", "points", "js"), "low"),
    Column("Wasserstein", ("distribution", "overall", "wasserstein"), "low"),
    Column("variance ratio", ("distribution", "overall", "variance_ratio"), "near 1"),
    Column("JS per user", ("distribution", "per_user", "js"), "low"),
    Column("NLL", ("nll",), "low"),
    Column("RPS", ("rps",), "low"),
    Column("ECE", ("ece",), "low"),
)
_ARROWS = {"high": "\N{UPWARDS ARROW}", "low": "\N{DOWNWARDS ARROW}", "near 1": "\N{RIGHTWARDS ARROW}1"}


def faithful_table(run: Run) -> Figure | Absent:
    """Agreement, order, spread and what probabilities are worth, of every predictor."""
    baseline = run.best_baseline
    skill = [] if baseline is None else [Column("skill", ("skill", baseline["name"]), "high")]
    rows = run.predictors
    columns = [column for column in [*_COLUMNS, *skill] if any(value_at(row, column.path) is not None for row in rows)]
    if not columns:
        return Absent("faithfulness", "Faithfulness", "eval/metrics.json doesn’t have it; run persona_eval again")
    header = ["predictor", *(f"{column.name}\N{NO-BREAK SPACE}{_ARROWS[column.best]}" for column in columns)]
    best = [_best_of(column, [*run.agents, *run.baselines]) for column in columns]
    no_best = [None] * len(columns)  # of the floor
    compared = len(run.agents) + len(run.baselines)
    cells = [
        [title_of(row), *map(_cell, [row] * len(columns), columns, best if at < compared else no_best)]
        for at, row in enumerate(rows)
    ]
    return Figure(
        "faithfulness",
        "Faithfulness",
        "A simulator that gives everyone the average can have a low error; these figures show what it lacks. Arrows "
        "say which way is better; the best of agents and baselines in a column is bold.",
        join([write_table(header, cells), write_notes(_notes(baseline))]),
        size=WIDE,
    )


def value_at(row: Row, path: Sequence[str]) -> float | None:
    """A figure of ``metrics.json``; None where it doesn't exist."""
    value: Any = row
    for key in path:
        value = (value or {}).get(key)
    return None if value is None else float(value)


def _best_of(column: Column, rows: Sequence[Row]) -> float | None:
    known = [value for row in rows if (value := value_at(row, column.path)) is not None]
    keys: dict[str, Callable[[float], float]] = {
        "high": lambda value: -value,
        "low": lambda value: value,
        "near 1": lambda value: abs(value - 1),
    }
    return min(known, key=keys[column.best], default=None)


def _cell(row: Row, column: Column, best: float | None) -> Child:
    value = value_at(row, column.path)
    text = column.written(value)
    return tag("b", text) if value is not None and value == best else text


def _notes(baseline: Row | None) -> list[str]:
    skill = "" if baseline is None else f" Skill: 1 \N{MINUS SIGN} MSE / MSE of {title_of(baseline)}."
    return [
        "Accuracy, within 1 and kappa (quadratic weights) are of the label nearest the prediction. Pairs in order: of "
        "two ratings of one user that differ, how often the higher one is predicted higher; ties count half.",
        "JS (Jensen\N{EN DASH}Shannon), Wasserstein and the variance ratio compare simulated ratings with true ones. "
        "An agent with the readout expected simulates by drawing from its distribution, a baseline from a normal "
        "distribution round its prediction, as wide as its errors on held-out train rows, every other predictor by the "
        "label nearest its prediction. JS of points takes the latter for all.",
        f"NLL, ranked probability score (RPS) and calibration error (ECE) are of these distributions.{skill}",
    ]
