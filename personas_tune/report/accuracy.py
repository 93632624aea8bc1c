"""How far predicted ratings are from true ones: the table, intervals and paired differences."""

from collections.abc import Callable, Mapping
from typing import Any

from personas_tune.evaluation.reading import title_of, verdict
from personas_tune.report.figure import HALF, WIDE, Absent, Figure, write_notes, write_panels, write_table
from personas_tune.report.markup import Child, count, join, number, percent, tag
from personas_tune.report.run import Pair, Row, Run, pair_of
from personas_tune.report.whiskers import CIRCLE, CROSS, DIAMOND, DOWN, PLUS, SQUARE, TRIANGLE, Whisker, draw_whiskers

_NAMES = {"rmse": "RMSE", "mae": "MAE"}
VERDICT_SHAPES = {"better": DOWN, "worse": CROSS, "not told apart": PLUS}
_PAPERS_OWN = "the paper’s published figure, of its own test rows and models"


def accuracy_figures(run: Run) -> list[Figure | Absent]:
    """Errors with intervals, the table, and differences."""
    return [
        _errors(run, "rmse"),
        _errors(run, "mae"),
        _table(run),
        _against_baseline(run),
        _best_against_all(run),
        _hybrids(run),
    ]


def _errors(run: Run, metric: str) -> Figure | Absent:
    name = _NAMES[metric]
    ranked_by = f"{metric}_filled" if run.has_gaps else metric
    rows = [row for row in run.predictors if row[metric] is not None and row[ranked_by] is not None]
    rows.sort(key=lambda row: float(row[ranked_by]))
    if not rows:
        return Absent(metric, name, "no predictor answered a single row")
    drawn = [_whisker(run, row, metric) for row in rows]
    paper = f" A cross marks {_PAPERS_OWN}." if any(row.published is not None for row in drawn) else ""
    kinds = "Circles are agents, squares baselines"
    kinds += ", triangles regressions that use an agent" if run.hybrids else ""
    kinds += ", the diamond the floor." if run.metrics.get("oracle") else "."
    gaps = f" Over rows with an answer; the order is that of {name} filled, over all rows." if run.has_gaps else ""
    return Figure(
        metric,
        f"{name}, lower is better",
        f"{_leader(run, rows)}{gaps} {kinds} Whiskers: {run.confidence} intervals over users.{paper}",
        draw_whiskers(drawn, name),
        told=f"{name} by predictor: " + "; ".join(f"{row.name} {number(row.value)}" for row in drawn),
        size=HALF,
    )


def _whisker(run: Run, row: Row, metric: str) -> Whisker:
    names = {agent["name"] for agent in run.agents}
    shape = CIRCLE if row["name"] in names else TRIANGLE if row["name"] in run.hybrids else SQUARE
    if row is run.metrics.get("oracle"):
        shape = DIAMOND
    low, high = row[f"{metric}_ci"]
    published = (row.get("published") or {}).get(metric)
    return Whisker(title_of(row), row[metric], low, high, shape, published, strong=shape == CIRCLE)


def _leader(run: Run, rows: list[Row]) -> str:
    first = next((row for row in rows if row is not run.metrics.get("oracle")), None)
    if first is None:
        return "No agent or baseline answered a single row."
    return f"{title_of(first)}, {_kind(run, first)}, comes first of agents and baselines."


def _kind(run: Run, row: Row) -> str:
    if any(row is agent for agent in run.agents):
        return "an agent"
    if row["name"] in run.hybrids:
        return "a hybrid (a regression that uses an agent)"
    return "a baseline"


Column = tuple[str, Callable[[Row], Child]]


def _table(run: Run) -> Figure:
    columns = _columns(run)
    rows = [[title_of(row), *(cell(row) for _, cell in columns)] for row in run.predictors]
    header = ["predictor", *(name for name, _ in columns)]
    n_text = header.index("RMSE")
    return Figure(
        "table",
        "The table",
        f"Every predictor on the same {count(run.settings['n_rows'], 'row')}. {_bold(run)}",
        join([write_table(header, rows, n_text=n_text), write_notes(_notes(run))]),
        size=WIDE,
    )


def _bold(run: Run) -> str:
    if run.has_gaps:
        return "The lowest filled error of agents and baselines is bold; the others are not of the same rows."
    return "The lowest error of agents and baselines in a column is bold."


def _columns(run: Run) -> list[Column]:
    filled = run.has_gaps
    calibrated = any(row.get("calibrated") for row in run.agents)
    several_bases = len({row["base"] for row in run.agents}) > 1
    return [
        *([_origin("base")] if several_bases else []),
        *(_origin(key) for key in ("adapters", "memories", "readout")),
        *([("calibrated", lambda row: "yes" if row.get("calibrated") else "\N{EN DASH}")] if calibrated else []),
        ("RMSE", _bold_lowest(run, "rmse")),
        ("RMSE interval", lambda row: _interval(row["rmse_ci"])),
        *_published(run, "rmse", "RMSE"),
        ("MAE", _bold_lowest(run, "mae")),
        ("MAE interval", lambda row: _interval(row["mae_ci"])),
        *_published(run, "mae", "MAE"),
        *([("no rating", lambda row: percent(row["urr"], 1))] if _some_unanswered(run) else []),
        *_published(run, "urr", "no rating"),
        *([(f"{name} filled", _bold_lowest(run, f"{key}_filled")) for key, name in _NAMES.items()] if filled else []),
        ("macro RMSE", _bold_lowest(run, "macro_rmse")),
    ]


def _origin(key: str) -> Column:
    return key, lambda row: str(row.get(key) or "\N{EN DASH}")


def _published(run: Run, key: str, name: str) -> list[Column]:
    def written(row: Row) -> str:
        value = (row.get("published") or {}).get(key)
        return percent(value, 1) if key == "urr" else number(value)

    return [(f"paper’s {name}", written)] if _some_published(run) else []


def _bold_lowest(run: Run, key: str) -> Callable[[Row], Child]:
    values = [row[key] for row in [*run.agents, *run.baselines] if row[key] is not None]
    is_of_same_rows = key.endswith("_filled") or not run.has_gaps
    lowest = min(values, default=None) if is_of_same_rows else None
    compared = {id(row) for row in [*run.agents, *run.baselines]}

    def cell(row: Row) -> Child:
        is_lowest = lowest is not None and row[key] == lowest and id(row) in compared
        return tag("b", number(row[key])) if is_lowest else number(row[key])

    return cell


def _interval(ends: list[float | None]) -> str:
    low, high = ends
    return "\N{EN DASH}" if low is None or high is None else f"{number(low)} to {number(high)}"


def _notes(run: Run) -> list[str]:
    settings = run.settings
    made_with = [
        f"{key.replace('_', ' ')}: {settings[key]}{leak(settings[key])}" for key in ("historical_average", "traits")
    ]
    unanswered = (
        " RMSE and MAE are over rows with an answer; “no rating” is the share of rows without one (the paper’s URR); "
        "filled: all rows, with the user’s train mean where there is none."
    )
    paper = ["The paper’s figures are of its own test rows and models."] if _some_published(run) else []
    return [
        f"Intervals: {run.confidence}, over {settings['n_resamples']:,} resamples of users, not widened for the number "
        "of comparisons.",
        f"Macro RMSE is the mean of the users’ RMSEs.{unanswered if _some_unanswered(run) else ''}",
        f"What prompts show was made with {', '.join(made_with)}.",
        *paper,
    ]


def leak(setting: str) -> str:
    """What to add to a setting that shows agents something of the test rows."""
    return " (leaky, the paper’s way)" if setting == "all" else ""


def _some_published(run: Run) -> bool:
    return any(row.get("published") for row in run.agents)


def _some_unanswered(run: Run) -> bool:
    return any(row["urr"] or row.get("published") for row in run.predictors)


def _against_baseline(run: Run) -> Figure | Absent:
    at, title = "paired-baseline", "Each agent against the best baseline"
    baseline = run.best_baseline
    if baseline is None:
        return Absent(at, title, "there is no baseline")
    pairs = {agent["name"]: pair_of(run, agent["name"], baseline["name"]) for agent in run.agents}
    says = (
        f"The agent’s figure minus that of {title_of(baseline)} on the same rows: left of the line the agent is better."
    )
    return _differences(run, at, title, says, pairs)


def _best_against_all(run: Run) -> Figure | Absent:
    at, title = "paired-best", "The best agent against all others"
    best = run.best_agent
    if best is None:
        return Absent(at, title, "there is no agent")
    name = best["name"]
    pairs = {title_of(row): pair_of(run, name, row["name"]) for row in run.predictors if row is not best}
    says = f"The figure of {name} minus that of the other on the same rows: left of the line {name} is better."
    return _differences(run, at, title, says, pairs)


def _hybrids(run: Run) -> Figure | Absent:
    at, title = "paired-hybrid", "What agents add to plain numbers"
    if not run.hybrids:
        return Absent(at, title, "evaluation.hybrids names no agent")
    pairs = {name: pair_of(run, name, without) for name, without in run.hybrids.items()}
    says = "A regression that sees an agent’s distribution minus the same without it: left of the line the agent helps."
    return _differences(run, at, title, says, pairs)


_PRINTED = {"rmse": ("RMSE", 3), "mae": ("MAE", 3), "js": ("JS, all ratings", 4)}  # with decimals


def _differences(run: Run, at: str, title: str, says: str, pairs: Mapping[str, Pair | None]) -> Figure | Absent:
    known = {name: pair for name, pair in pairs.items() if pair is not None and pair["difference"] is not None}
    if not known:
        return Absent(at, title, "nothing was compared")
    names = sorted(known, key=lambda name: float(known[name]["difference"]))
    panels = []
    for metric in _PRINTED:
        found = {name: known[name] if metric == "rmse" else known[name].get(metric) for name in names}
        rows = [_difference(name, ends) for name, ends in found.items() if ends and ends["difference"] is not None]
        if rows:
            name, digits = _PRINTED[metric]
            panels.append((name, draw_whiskers(rows, "difference", zero=True, digits=digits)))
    says += f" {run.confidence} intervals; triangle on its tip: better, cross: worse, tick: the interval holds 0."
    told = "; ".join(f"{name} {number(known[name]['difference'], sign=True)}, {verdict(known[name])}" for name in names)
    return Figure(at, title, says, write_panels(panels), told=f"Differences in RMSE: {told}", size=WIDE)


def _difference(name: str, ends: Mapping[str, Any]) -> Whisker:
    return Whisker(name, ends["difference"], ends["low"], ends["high"], VERDICT_SHAPES[verdict(ends)])
