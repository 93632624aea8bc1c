"""The evaluation as a table for people: ``eval/table.md``, readable in a terminal as it is."""

from collections.abc import Mapping, Sequence
from typing import Any

from personas_tune.evaluation.own_versus_other import own_versus_other_cells, own_versus_other_note
from personas_tune.evaluation.reading import best_compared, best_of, title_of, verdict

_LEAKY = "leaky (the paper's way)"
_NONE = "-"
_FIGURES = {
    "accuracy": "accuracy",
    "within 1": "within_1",
    "kappa": "kappa",
    "Pearson": "pearson",
    "Spearman": "spearman",
    "order": "pairwise_order",
    "NLL": "nll",
    "RPS": "rps",
    "ECE": "ece",
}
_MOST_PAIRS = 100
_DISTANCES = {"JS": "js", "W1": "wasserstein", "var.": "variance_ratio"}


def write_table(metrics: Mapping[str, Any]) -> str:
    """Write agents, baselines, floor and paired differences as Markdown.

    Args:
        metrics: What ``metrics.json`` holds. ``agents`` are what
            :func:`~personas_tune.evaluation.metrics.measure_agent` and
            :func:`~personas_tune.evaluation.faithfulness.measure_faithfulness` return plus name, base, adapters,
            memories, readout and published; ``baselines`` the same plus name and, where something was chosen, tuned;
            ``oracle`` the same for the best possible predictor, or None; ``paired`` what
            :func:`~personas_tune.evaluation.comparisons.compare_predictors` returns; ``settings`` has
            historical_average, traits, n_users, n_rows, seed, n_resamples and confidence.

    Returns:
        Markdown, ending in a newline.
    """
    settings = metrics["settings"]
    confidence = f"{100 * settings['confidence']:g}%"
    blocks = [
        "\n".join(_format_table(*_predictor_cells(metrics, confidence))),
        "\n".join(_format_table(*_faithfulness_cells(metrics))),
        *(["\n".join(_format_table(*_pair_cells(_shown_pairs(metrics), confidence)))] if metrics["paired"] else []),
        *(
            "\n".join(_format_table(*own_versus_other_cells(agent, measured)))
            for agent, measured in metrics.get("own_versus_other", {}).items()
        ),
        "\n".join(_notes(metrics, confidence)),
    ]
    return "\n\n".join(blocks) + "\n"


def _predictor_cells(metrics: Mapping[str, Any], confidence: str) -> tuple[list[str], list[list[str]]]:
    rows = _predictors(metrics)
    some_unparsed = any(row["n_parsed"] < row["n"] for row in rows)
    some_published = any(row.get("published") for row in rows)
    header = [
        "predictor",
        "base",
        "adapters",
        "memories",
        "readout",
        "n",
        f"RMSE [{confidence}]",
        f"MAE [{confidence}]",
    ]
    header += ["URR", *(["RMSE filled", "MAE filled"] if some_unparsed else []), "macro RMSE"]
    cells = [_predictor_row(row, some_unparsed) for row in rows]
    if some_published:
        header.append("paper RMSE / MAE / URR")
        cells = [[*row, _published(each.get("published"))] for row, each in zip(cells, rows, strict=True)]
    return header, cells


def _predictors(metrics: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Agents, baselines and, where there is one, the floor."""
    return [*metrics["agents"], *metrics["baselines"], *([metrics["oracle"]] if metrics["oracle"] else [])]


def _predictor_row(row: Mapping[str, Any], some_unparsed: bool) -> list[str]:
    origin = [str(row.get(key) or _NONE) for key in ("base", "adapters", "memories", "readout")]
    errors = [_with_interval(row["rmse"], row["rmse_ci"]), _with_interval(row["mae"], row["mae_ci"])]
    filled = [_number(row["rmse_filled"]), _number(row["mae_filled"])] if some_unparsed else []
    return [
        title_of(row),
        *origin,
        str(row["n"]),
        *errors,
        _percent(row["urr"]),
        *filled,
        _number(row["macro_rmse"]),
    ]


def _published(figures: Mapping[str, Any] | None) -> str:
    if figures is None:
        return _NONE
    return f"{_number(figures['rmse'])} / {_number(figures['mae'])} / {_percent(figures['urr'])}"


def _faithfulness_cells(metrics: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = _predictors(metrics)
    conventions = {"": "overall", " pts": "points"} if any(map(_draws, rows)) else {"": "overall"}
    cells = []
    for row in rows:
        distances = [row["distribution"][each][key] for each in conventions.values() for key in _DISTANCES.values()]
        cells.append([title_of(row), *map(_number, [*(row[key] for key in _FIGURES.values()), *distances])])
    return ["faithfulness", *_FIGURES, *(f"{name}{ending}" for ending in conventions for name in _DISTANCES)], cells


def _draws(row: Mapping[str, Any]) -> bool:
    """Whether a predictor's ratings are simulated by drawing from its probabilities."""
    return bool(row["distribution"]["overall"] != row["distribution"]["points"])


def _shown_pairs(metrics: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The comparisons; of very many, those of the best agent, with the best baseline and user+item bias, of hybrids."""
    paired, agents = metrics["paired"], {agent["name"] for agent in metrics["agents"]}
    if len(paired) <= _MOST_PAIRS:
        return list(paired)
    best = [row["name"] for row in (best_of(metrics["agents"]), best_compared(metrics)) if row is not None]
    shown = {*best, "user_item_bias"}
    return [pair for pair in paired if pair["a"] not in agents or {pair["a"], pair["b"]} & shown]


def _pair_cells(paired: Sequence[Mapping[str, Any]], confidence: str) -> tuple[list[str], list[list[str]]]:
    header = ["agent", "against", f"RMSE difference [{confidence}]", "agent is", f"MAE difference [{confidence}]"]
    rows = []
    for pair in paired:
        rows.append([pair["a"], pair["b"], _difference(pair), verdict(pair), _difference(pair["mae"])])
    return header, rows


def _difference(found: Mapping[str, Any]) -> str:
    return _with_interval(found["difference"], [found["low"], found["high"]], "+")


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def _number(value: float | None, sign: str = "") -> str:
    return _NONE if value is None else f"{value:{sign}.3f}"


def _with_interval(value: float | None, ends: Sequence[float | None], sign: str = "") -> str:
    if value is None:
        return _NONE
    low, high = (_number(end, sign) for end in ends)
    return f"{_number(value, sign)} [{low}, {high}]"


def _format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A pipe table with columns of even width; columns that begin with a digit or sign in every row align right."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in [header, *rows]]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(header))]
    right = [column for column in range(len(header)) if all(row[column][:1] in "+-0123456789" for row in cells[1:])]
    rule = ["-" * (width - 1) + (":" if column in right else "-") for column, width in enumerate(widths)]
    lines = []
    for row in [cells[0], rule, *cells[1:]]:
        padded = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(padded)} |")
    return lines


def _notes(metrics: Mapping[str, Any], confidence: str) -> list[str]:
    settings = metrics["settings"]
    average, traits = settings["historical_average"], settings["traits"]
    notes = [
        f"{settings['n_rows']} test rows of {settings['n_users']} users, the same rows for every predictor; "
        f"seed {settings['seed']}.",
        f"Items' averages: historical_average: {average}{_leak(average)}; traits: {traits}{_leak(traits)}.",
        f"[{confidence}]: percentile interval over {settings['n_resamples']} resamples of users (not rows). "
        "Intervals are not widened for the number of comparisons.",
        "RMSE and MAE are over all rows that have an answer; URR is the share of rows without one; "
        "macro RMSE is the mean of the users' RMSEs.",
    ]
    if any(row["n_parsed"] < row["n"] for row in metrics["agents"]):
        notes.append("Filled: all rows, with the user's train mean where there is no answer; differences use these.")
    notes.append(
        "Differences are the agent's RMSE (MAE) minus the other's on the same rows: negative is better; "
        '"agent is" goes by the RMSE.'
    )
    if len(shown := _shown_pairs(metrics)) < len(metrics["paired"]):
        notes.append(
            f"{len(shown)} of {len(metrics['paired'])} differences are shown: the best agent's, those with the best "
            "baseline and with user_item_bias, and those of hybrids; metrics.json has all."
        )
    notes += _conventions_of_faithfulness(metrics)
    notes += [*_fitted(metrics["baselines"]), *_calibrated(metrics["agents"])]
    crosswise = metrics.get("own_versus_other", {})
    notes += [own_versus_other_note(agent, measured) for agent, measured in crosswise.items()]
    if any(row["name"] in crosswise and _is_measured_otherwise(row) for row in metrics["agents"]):
        notes.append(
            "Own against other adapters: an agent with readout generate is measured by its expected rating, a "
            "calibrated one before calibration."
        )
    return [f"- {note}" for note in notes]


def _is_measured_otherwise(agent: Mapping[str, Any]) -> bool:
    """Whether an agent's figures with every adapter are of other ratings than its own figures."""
    return agent["readout"] == "generate" or bool(agent.get("calibrated"))


def _fitted(baselines: Sequence[Mapping[str, Any]]) -> list[str]:
    """What baselines and hybrids were fitted on, and what tuning chose."""
    told = {False: "Baselines are fitted on train and outside rows and tuned on train rows"}
    told[True] = "Hybrids are fitted on the latest train rows of each user and tuned by cross-validation on these"
    notes = []
    for is_hybrid, said in told.items():
        rows = [row for row in baselines if row.get("tuned") and row["name"].startswith("hybrid_") == is_hybrid]
        tuned = [f"{row['name']} ({_tuned(row['tuned'])})" for row in rows]
        notes += [f"{said}: {'; '.join(tuned)}."] if tuned else []
    return notes


def _calibrated(agents: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which agents' calibration knows its rows too well."""
    notes = []
    if known := [agent["name"] for agent in agents if agent.get("calibrated_on_trained_rows")]:
        notes.append(
            f"Calibrated, or used by a hybrid, on rows that the adapters were trained on: {', '.join(known)}. There "
            "they are surer and better than on test rows."
        )
    if known := [agent["name"] for agent in agents if agent.get("calibrated_on_final_profiles")]:
        notes.append(
            f"Calibrated, or used by a hybrid, on train prompts whose profiles knew their ratings (prompt.profile: "
            f"final): {', '.join(known)}."
        )
    return notes


def _conventions_of_faithfulness(metrics: Mapping[str, Any]) -> list[str]:
    """What the second table's figures mean, a line each."""
    notes = [
        "Faithfulness, over rows with an answer. Accuracy, within 1 and kappa (quadratic) are of the label nearest the "
        "prediction.",
        "Order: share of pairs of a user's rows with different true ratings that are ordered right, ties one half.",
        "NLL (nats), RPS (0 to 1) and ECE are of the label probabilities, of predictors that have them; a baseline's "
        "are a normal distribution round its prediction, as wide as its errors on held-out train rows.",
        "JS (nats, at most 0.693) and W1 (units of rating): distances between the labels' shares among true and among "
        "simulated ratings; 0 is best. Var.: variance of simulated over that of true ratings; 1 is best.",
    ]
    if any(map(_draws, _predictors(metrics))):
        notes.append(
            "JS, W1, var.: an agent with readout expected and a baseline simulate by drawing from their probabilities, "
            "all others answer the label nearest their prediction. Pts: every predictor answers that label."
        )
    if any(row.get("published") for row in metrics["agents"]):
        notes.append("Paper: figures published for the row that an agent reproduces, on that paper's own test rows.")
    return notes


def _leak(setting: str) -> str:
    return f", {_LEAKY}" if setting == "all" else ""


def _tuned(tuned: Mapping[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in tuned.items())
