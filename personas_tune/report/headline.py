"""What was simulated and how it came out, in a line and a few figures."""

from personas_tune.evaluation.reading import title_of, verdict
from personas_tune.report.faithful_table import value_at
from personas_tune.report.markup import Markup, count, number, percent, tag
from personas_tune.report.run import Row, Run, pair_of


def write_headline(run: Run) -> Markup:
    """The top of the page."""
    return tag(
        "header",
        tag("p", "User simulation report", class_="eyebrow"),
        tag("h1", outcome(run)),
        tag("p", sentence(run), class_="deck"),
        tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in facts(run)), class_="facts"),
    )


def outcome(run: Run) -> str:
    """Who predicts better, the best agent or the best baseline."""
    agent, baseline = run.best_agent, run.best_baseline
    if agent is None:
        return "No agent was measured"
    if baseline is None:
        return f"{agent['name']} is the best agent"
    pair = pair_of(run, agent["name"], baseline["name"])
    said = "not told apart" if pair is None else verdict(pair)
    if said == "not told apart":
        both = f"The best agent, {agent['name']}, and the best baseline, {title_of(baseline)}"
        return f"{both}, can’t be told apart"
    winner, loser = ("agent", "baseline") if said == "better" else ("baseline", "agent")
    names = {"agent": agent["name"], "baseline": title_of(baseline)}
    return f"The best {winner}, {names[winner]}, predicts ratings better than the best {loser}, {names[loser]}"


def sentence(run: Run) -> str:
    """The same in figures, from the paired interval."""
    agent, baseline = run.best_agent, run.best_baseline
    if agent is None or baseline is None:
        return "There is nothing to compare."
    scale = f"on a scale of {run.labels[0]} to {run.labels[-1]}"
    mine, theirs = number(agent["rmse_filled"]), number(baseline["rmse_filled"])
    errors = f"Over all rows, {scale}, the RMSE of the agent is {mine} and that of the baseline {theirs}"
    pair = pair_of(run, agent["name"], baseline["name"])
    if pair is None or pair["low"] is None or pair["high"] is None:
        return f"{errors}; there is no interval of the difference.{_spread(agent, baseline)}"
    side = {"better": "lies below 0", "worse": "lies above 0", "not told apart": "holds 0"}[verdict(pair)]
    ends = f"{number(pair['low'], sign=True)} to {number(pair['high'], sign=True)}"
    interval = f"the {run.confidence} interval of the difference, {ends}, {side}"
    return f"{errors}; {interval}.{_picked(run)}{_spread(agent, baseline)}"


def _picked(run: Run) -> str:
    n = len(run.agents)
    if n < 2:
        return ""
    return f" The agent is the best of {n}, picked on these very test rows; the interval isn’t widened for that."


def _spread(agent: Row, baseline: Row) -> str:
    mine, theirs = (value_at(row, ("distribution", "overall", "variance_ratio")) for row in (agent, baseline))
    if mine is None or theirs is None:
        return ""
    simulated = (
        "Ratings drawn from the agent’s distribution" if agent["readout"] == "expected" else "The agent’s answers"
    )
    others = "ratings drawn for the baseline" if baseline.get("residual_sd") else "the baseline’s answers"
    return f" {simulated} have {percent(mine)} of the true variance, {others} {percent(theirs)}."


def _measured(run: Run) -> str:
    hybrids = [count(len(run.hybrids), "hybrid")] if run.hybrids else []
    return ", ".join([count(len(run.agents), "agent"), count(len(run.plain_baselines), "baseline"), *hybrids])


def facts(run: Run) -> list[tuple[str, str]]:
    """What was simulated."""
    settings = run.settings
    personas = [] if run.clustering is None else [("personas", f"{run.clustering['k']}")]
    scale = f"{run.labels[0]} to {run.labels[-1]}"
    return [
        ("simulated", count(settings["n_users"], "user")),
        ("to predict", count(settings["n_rows"], "rating")),
        ("rating scale", f"{scale}, {count(len(run.labels), 'label')}"),
        *personas,
        ("measured", _measured(run)),
        ("seed", str(settings["seed"])),
    ]
