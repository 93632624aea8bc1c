"""Two runs side by side."""

from collections.abc import Mapping
from typing import Any

from personas_tune.evaluation.intervals import Resampling, paired_difference
from personas_tune.evaluation.reading import title_of, verdict
from personas_tune.report.accuracy import leak
from personas_tune.report.faithful import distribution_panel, shares_in_words, shares_of_best
from personas_tune.report.faithful_table import value_at
from personas_tune.report.figure import HALF, WIDE, Absent, Figure, write_notes, write_panels, write_table
from personas_tune.report.headline import outcome
from personas_tune.report.markup import Child, Markup, join, number, tag
from personas_tune.report.page import Section, write_page
from personas_tune.report.run import Row, Run
from personas_tune.report.settings import differing, versions_of
from personas_tune.report.whiskers import CIRCLE, SQUARE, Whisker, draw_whiskers
from personas_tune.workspace import sha256_of_file


def write_comparison(run: Run, other: Run) -> str:
    """``report/against_<other>.html``."""
    sections: list[Section] = [
        ("errors", "Errors", [_intervals(run, other, "rmse"), _intervals(run, other, "mae"), _table(run, other)]),
        ("distributions", "Distributions", [_distributions(run, other)]),
        ("differ", "What differs", [_settings(run, other)]),
    ]
    return write_page(f"{run.name} against {other.name}", _header(run, other), sections)


def are_alike_in_rows(run: Run, other: Run) -> bool:
    """Whether both runs predict the same test rows."""
    files = [each.workspace.test_samples for each in (run, other)]
    if not all(file.is_file() for file in files):
        return False
    if sha256_of_file(files[0]) == sha256_of_file(files[1]):
        return True
    return _rows_of(run) == _rows_of(other)


def _rows_of(run: Run) -> list[tuple[Any, ...]]:
    from personas_tune.workspace import COLUMNS, read_table

    table = read_table(run.workspace.test_samples, COLUMNS["samples"]).select(["user_id", "item_id", "rating"])
    return sorted(tuple(row.values()) for row in table.to_pylist())


def difference_between(run: Run, row: Row, other: Row) -> Mapping[str, float | None] | None:
    """RMSE of ``row`` minus RMSE of ``other`` over the same users' rows, with its interval.

    Args:
        run: Gives how intervals are drawn.
        row: An agent or a baseline, all of whose rows have an answer.
        other: One of another run.

    Returns:
        difference, low and high; None when either left rows unanswered or their users differ.
    """
    mine, theirs = row["per_user"], other["per_user"]
    complete = row["n_parsed"] == row["n"] and other["n_parsed"] == other["n"]
    if not complete or {u: v["n"] for u, v in mine.items()} != {u: v["n"] for u, v in theirs.items()}:
        return None
    users = sorted(mine)
    settings = run.settings
    resampling = Resampling(settings["n_resamples"], settings["confidence"], settings["seed"])
    sse, others = ([each[user]["sse"] for user in users] for each in (mine, theirs))
    difference, low, high = paired_difference(sse, others, [mine[user]["n"] for user in users], resampling)
    return {"difference": difference, "low": low, "high": high}


def _header(run: Run, other: Run) -> Markup:
    heading = f"{run.name} against {other.name}"
    return tag(
        "header",
        tag("p", "Two runs side by side", class_="eyebrow"),
        tag("h1", heading),
        tag("p", _sentence(run, other), class_="deck"),
        tag(
            "dl", *(tag("div", tag("dt", each.name), tag("dd", outcome(each))) for each in (run, other)), class_="facts"
        ),
    )


def _sentence(run: Run, other: Run) -> str:
    return f"{_compared_in_words(run, other)}{_leaks(run, other)}"


def _leaks(run: Run, other: Run) -> str:
    """What prompts of one run know that those of the other don't."""
    said = [
        f"{key.replace('_', ' ')} is {_setting(run, key)}, but {_setting(other, key)}"
        for key in ("historical_average", "traits")
        if run.settings[key] != other.settings[key]
    ]
    return f" What prompts show differs, so that the errors aren’t on equal terms: {'; '.join(said)}." if said else ""


def _setting(run: Run, key: str) -> str:
    value = run.settings[key]
    return f"{value}{leak(value)} in {run.name}"


def _compared_in_words(run: Run, other: Run) -> str:
    best, theirs = run.best_agent, other.best_agent
    if best is None or theirs is None:
        return "One of the runs has no agent."
    said = (
        f"The best agent of {run.name}, {best['name']}, errs by {number(best['rmse_filled'])} (RMSE over all rows), "
        f"that of {other.name}, {theirs['name']}, by {number(theirs['rmse_filled'])}."
    )
    if not are_alike_in_rows(run, other):
        return f"{said} The runs predict different test rows, so that differences aren’t paired and prove little."
    pair = difference_between(run, best, theirs)
    if pair is None or pair["low"] is None or pair["high"] is None:
        return f"{said} Both predict the same test rows."
    ends = f"{number(pair['low'], sign=True)} to {number(pair['high'], sign=True)}"
    words = {
        "better": f"{run.name} is better",
        "worse": f"{other.name} is better",
        "not told apart": "they can’t be told apart",
    }
    return (
        f"{said} On the same test rows the difference has the {run.confidence} interval {ends}: {words[verdict(pair)]}."
    )


def _matched(run: Run, other: Run) -> dict[str, tuple[Row | None, Row | None]]:
    mine, theirs = ({row["name"]: row for row in each.predictors} for each in (run, other))
    return {name: (mine.get(name), theirs.get(name)) for name in {**mine, **theirs}}


def _intervals(run: Run, other: Run, metric: str) -> Figure | Absent:
    name = metric.upper()
    rows, told = [], []
    for predictor, pair in _matched(run, other).items():
        known = [(row, each) for row, each in zip(pair, (run, other), strict=True) if row and row[metric] is not None]
        for at, (row, each) in enumerate(known):
            shape = CIRCLE if each is run else SQUARE
            low, high = row[f"{metric}_ci"]
            rows.append(Whisker("" if at else predictor, row[metric], low, high, shape))
            told.append(f"{predictor} of {each.name} {number(row[metric])}")
    if not rows:
        return Absent(metric, name, "no predictor answered a single row")
    says = f"Circles: {run.name}, squares: {other.name}. Whiskers: {run.confidence} intervals over users."
    drawn = draw_whiskers(rows, name)
    return Figure(metric, f"{name}, lower is better", says, drawn, told=f"{name}: {'; '.join(told)}", size=HALF)


_COMPARED = {
    "RMSE": ("rmse",),
    "MAE": ("mae",),
    "kappa": ("kappa",),
    "JS": ("distribution", "overall", "js"),
    "variance ratio": ("distribution", "overall", "variance_ratio"),
}


def _table(run: Run, other: Run) -> Figure:
    columns = {
        n: path for n, path in _COMPARED.items() if any(value_at(row, path) is not None for row in run.predictors)
    }
    header = ["predictor"]
    for name in columns:
        header += [f"{name} {run.name}", other.name, "difference"]
    rows: list[list[Child]] = []
    for name, (mine, theirs) in _matched(run, other).items():
        cells: list[Child] = [title_of(mine or theirs or {"name": name})]
        for path in columns.values():
            cells += _compared(value_at(mine or {}, path), value_at(theirs or {}, path))
        rows.append(cells)
    notes = [
        f"Differences are {run.name} minus {other.name}, matched by the predictors’ names. They have no intervals; "
        "only the difference between the best agents, at the top, has one."
    ]
    says = "Every predictor of either run; a dash where one of them has none of that name."
    return Figure("table", "Row by row", says, join([write_table(header, rows), write_notes(notes)]), size=WIDE)


def _compared(mine: float | None, theirs: float | None) -> list[Child]:
    difference = None if mine is None or theirs is None else mine - theirs
    return [number(mine), number(theirs), number(difference, sign=True)]


def _distributions(run: Run, other: Run) -> Figure | Absent:
    title = "Ratings, true and simulated"
    shown = [(each, row) for each in (run, other) if (row := shares_of_best(each)) is not None]
    if not shown:
        return Absent("distribution", title, "neither eval/metrics.json has it; run persona_eval again")
    panels = [(f"{each.name}: {title_of(row)}", distribution_panel(row)) for each, row in shown]
    says = "Share of each rating for the best agent of each run: outlined bars are true, full bars simulated."
    told = " ".join(f"{each.name}, {shares_in_words(row)}" for each, row in shown)
    return Figure("distribution", title, says, write_panels(panels), told=f"Shares of each rating. {told}", size=WIDE)


def _settings(run: Run, other: Run) -> Figure:
    rows: list[list[Child]] = []
    for stage in {**run.manifests, **other.manifests}:
        pair = (_recorded(run, stage), _recorded(other, stage))
        rows += [[f"{stage}/", *difference] for difference in differing(*pair)]
    rows += [["versions", *difference] for difference in differing(versions_of(run), versions_of(other))]
    says = "Settings and versions that the runs don’t share." if rows else "None: the runs share settings and versions."
    body = write_table(["stage", "key", run.name, other.name], rows, n_text=4) if rows else Markup()
    return Figure("settings", "Settings that differ", says, body, size=WIDE)


def _recorded(run: Run, stage: str) -> dict[str, Any]:
    manifest = run.manifests.get(stage, {})
    return {"seed": manifest.get("seed"), **(manifest.get("settings") or {})}
