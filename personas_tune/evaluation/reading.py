"""How the rows of ``metrics.json`` are read, in the table and in the report alike."""

from collections.abc import Iterable, Mapping
from typing import Any


def title_of(row: Mapping[str, Any]) -> str:
    """A predictor's name; the constant baseline says which label it answers."""
    label = (row.get("tuned") or {}).get("label")
    return str(row["name"]) if label is None else f"{row['name']} {label:g}"


def best_of(rows: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The predictor with the lowest RMSE over all rows; None when there is none."""
    measured = [row for row in rows if row["rmse_filled"] is not None]
    return min(measured, key=lambda row: float(row["rmse_filled"])) if measured else None


def best_compared(metrics: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The best of the baselines that agents are compared with."""
    agents = {row["name"] for row in metrics["agents"]}
    compared = {pair["b"] for pair in metrics["paired"] if pair["a"] in agents}
    return best_of(row for row in metrics["baselines"] if row["name"] in compared)


def verdict(ends: Mapping[str, float | None]) -> str:
    """What the interval of a difference in error says of the first of a pair.

    It is not told apart from the other when the interval holds 0 or doesn't exist.
    """
    low, high = ends["low"], ends["high"]
    if low is None or high is None or low <= 0 <= high:
        return "not told apart"
    return "better" if high < 0 else "worse"
