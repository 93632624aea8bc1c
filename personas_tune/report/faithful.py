"""Whether simulated ratings behave as true ones do: spread, order, confusions, calibration."""

from collections.abc import Callable, Iterable
from typing import Any

from personas_tune.evaluation.reading import title_of
from personas_tune.report.charts import draw_matrix, draw_pairs
from personas_tune.report.faithful_table import faithful_table, value_at
from personas_tune.report.figure import BROAD, SMALL, WIDE, Absent, Figure, write_panels
from personas_tune.report.markup import Markup, number, percent, tag
from personas_tune.report.plots import Frame, draw, draw_axes, draw_line, draw_marker, padded, write
from personas_tune.report.run import Row, Run

_OLD = "eval/metrics.json doesn’t have it; run persona_eval again"
_N_BESIDE = 6  # so many small charts fit beside the confusion matrix
_SHOWN = "shown for the best agent and the best baseline"


def faithful_figures(run: Run) -> list[Figure | Absent]:
    """The table of faithfulness, distributions, confusions and calibration."""
    return [faithful_table(run), _distribution(run), _calibration(run), _confusion(run), _by_persona(run)]


def _shown(run: Run, has: Callable[[Row], Any]) -> list[Row]:
    return [row for row in (run.best_agent, run.best_baseline) if row is not None and has(row)]


def _distribution(run: Run) -> Figure | Absent:
    shown = _shown(run, _overall)
    title = "Ratings, true and simulated"
    if not shown:
        return Absent("distribution", title, _OLD)
    top = _top(share for row in shown for share in _shares(row["distribution"]["overall"]))
    panels = [(title_of(row), _pairs(row["distribution"], row["distribution"]["overall"], top)) for row in shown]
    return Figure(
        "distribution",
        title,
        f"Share of each rating: outlined bars are true, full bars simulated; {_SHOWN}. {_variance(shown)}",
        write_panels(panels),
        told="Shares of each rating. " + " ".join(map(shares_in_words, shown)),
        size=BROAD,
    )


def shares_of_best(run: Run) -> Row | None:
    """The best agent, where its distribution was measured."""
    row = run.best_agent
    return row if row is not None and _overall(row) else None


def _overall(row: Row) -> Any:
    """The true shares of a predictor's rows; None where it answered nothing."""
    return ((row.get("distribution") or {}).get("overall") or {}).get("true")


def distribution_panel(row: Row) -> Markup:
    """True and simulated shares of one predictor."""
    shares = row["distribution"]["overall"]
    return _pairs(row["distribution"], shares, _top(_shares(shares)))


def _variance(rows: list[Row]) -> str:
    known = [(title_of(row), value_at(row, ("distribution", "overall", "variance_ratio"))) for row in rows]
    told = [f"{name} {percent(ratio)}" for name, ratio in known if ratio is not None]
    return f"Variance, in percent of the true ratings’: {', '.join(told)}." if told else ""


def shares_in_words(row: Row) -> str:
    """True and simulated shares of one predictor, for readers who can't see them."""
    distribution = row["distribution"]
    overall = distribution["overall"]
    shares = zip(distribution["labels"], overall["true"], overall["simulated"], strict=True)
    return (
        f"{title_of(row)}: "
        + ", ".join(f"{label:g} true {percent(t)} simulated {percent(s)}" for label, t, s in shares)
        + "."
    )


def _pairs(distribution: Any, shares: Any, top: float, *, small: bool = False) -> Markup:
    labels = [f"{label:g}" for label in distribution["labels"]]
    return draw_pairs(labels, {"true": shares["true"], "simulated": shares["simulated"]}, top, small=small)


def _shares(shares: Any) -> list[float]:
    return [*shares["true"], *shares["simulated"]]


def _top(shares: Iterable[float]) -> float:
    return min(1.0, max(shares) * 1.08)


def _by_persona(run: Run) -> Figure | Absent:
    title = "The same by persona"
    row = run.best_agent or {}
    measured = (row.get("distribution") or {}).get("per_persona") or {}
    personas = {name: measured[name] for name in sorted(measured, key=int) if measured[name]["true"]}
    if not personas:
        return Absent("distribution-by-persona", title, _OLD)
    top = _top(share for shares in personas.values() for share in _shares(shares))
    panels = [(f"persona {name}", _pairs(row["distribution"], personas[name], top, small=True)) for name in personas]
    told = ", ".join(f"persona {name} {number(personas[name]['js'])}" for name in personas)
    return Figure(
        "distribution-by-persona",
        title,
        f"Ratings of each persona’s users: outlined bars are true, full bars simulated by {title_of(row)}.",
        write_panels(panels, "small multiples" if len(panels) <= _N_BESIDE else "multiples"),
        told=f"Shares of each rating by persona; JS divergences: {told}",
        size=SMALL if len(panels) <= _N_BESIDE else WIDE,
    )


def _confusion(run: Run) -> Figure | Absent:
    title = "True against predicted label"
    shown = _shown(run, lambda row: row.get("confusion"))
    if not shown:
        return Absent("confusion", title, _OLD)
    return Figure(
        "confusion",
        title,
        "For each true rating, the percentage predicted as each label (the nearest to the prediction); rows "
        f"of the matrix add up to 100. Framed cells are right. {_SHOWN.capitalize()}.",
        write_panels([(title_of(row), _matrix(run, row["confusion"])) for row in shown]),
        told="Confusion matrices; rows predicted right: "
        + ", ".join(f"{title_of(row)} {percent(row.get('accuracy'), 1)}" for row in shown),
        size=BROAD,
    )


def _matrix(run: Run, counts: list[list[int]]) -> Markup:
    shares = [[n / sum(row) if sum(row) else None for n in row] for row in counts]
    texts = [["" if share is None else f"{100 * share:.0f}" for share in row] for row in shares]
    names = [f"{label} (n={sum(row):,})" for label, row in zip(run.labels, counts, strict=True)]
    own = [(at, at) for at in range(len(counts))]
    return draw_matrix(shares, texts, names, run.labels, ("true", "predicted"), own)


def _calibration(run: Run) -> Figure | Absent:
    title = "Calibration"
    shown = _shown(run, lambda row: row.get("calibration_curve"))
    if not shown:
        return Absent("calibration", title, _OLD)
    curves = {title_of(row): [(b["predicted"], b["true"]) for b in row["calibration_curve"]] for row in shown}
    span = padded([value for points in curves.values() for point in points for value in point])
    frame = Frame(span, span, height=300)
    diagonal = tag("line", **_ends(frame, span), class_="diagonal")
    marks = []
    for at, points in enumerate(curves.values()):
        marks += [draw_line(frame, points, at), *(draw_marker(*frame.at(*point), at, 3.6) for point in points)]
    keys = [_key(frame, at, name) for at, name in enumerate(curves)]
    drawn = draw(frame, draw_axes(frame, "mean predicted rating", "mean true rating"), diagonal, *marks, *keys)
    told = "; ".join(
        f"{name}: " + ", ".join(f"{number(p, 2)} predicted {number(t, 2)} true" for p, t in points)
        for name, points in curves.items()
    )
    return Figure(
        "calibration",
        title,
        "Rows with about the same prediction, and their true ratings on average. On the dashed line predictions "
        "are right; a flatter curve is overconfident.",
        tag("div", drawn, class_="panels"),
        told=f"Calibration: {told}",
    )


def _ends(frame: Frame, span: tuple[float, float]) -> dict[str, float]:
    (x1, y1), (x2, y2) = frame.at(span[0], span[0]), frame.at(span[1], span[1])
    return {"x1": x1, "y1": y1, "x2": x2, "y2": y2}


def _key(frame: Frame, at: int, name: str) -> Markup:
    y = frame.top + 8 + 16 * at
    return tag(
        "g", draw_marker(frame.left + 12, y, at, 3.6), write(frame.left + 22, y + 3.5, name, class_=f"name c{at}")
    )
