"""Ten test rows as the agents saw them, with their answers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from personas_tune.errors import DataError
from personas_tune.report.figure import WIDE, Absent, Figure, write_table
from personas_tune.report.markup import Markup, join, number, percent, tag
from personas_tune.report.run import Row, Run
from personas_tune.workspace import COLUMNS, read_table

if TYPE_CHECKING:
    from personas_tune.datasets.source import RatingSource, Sample

N_EXAMPLES = 10

_READ_FROM = {"expected": "expected", "argmax": "argmax", "generate": "parsed"}

Answers = Mapping[tuple[str, str], Mapping[str, Any]]  # by user and item


def example_figure(run: Run) -> Figure | Absent:
    """Prompts and answers of some test rows, folded.

    Raises:
        DataError: If the stages' files don't belong together.
    """
    best = run.best_agent
    answers = {row["name"]: _predictions(run, row) for row in run.agents if _file_of(run, row).is_file()}
    if best is None or best["name"] not in answers:
        return Absent("examples", "Prompts and answers", "there are no predictions in eval/")
    from personas_tune.datasets.source import RatingSource  # its package imports torch

    source = RatingSource(run.workspace.root)
    samples = source.samples("test")
    chosen = spread_over([sample.persona for sample in samples], N_EXAMPLES, run.settings["seed"])
    return Figure(
        "examples",
        f"{len(chosen)} ratings, prompt and answers",
        f"Drawn by the seed, spread over the personas. The prompt is that of {best['name']}, before it is shortened to "
        "the model’s context where it has to be. Columns of labels are percentages.",
        join(_write_example(run, source, samples[at], answers) for at in chosen),
        size=WIDE,
    )


def _write_example(run: Run, source: "RatingSource", sample: "Sample", answers: Mapping[str, Answers]) -> Markup:
    from personas_tune.prompts.render import render_prompt

    best = run.best_agent or {}
    parts = source.parts(sample, best["memories"])
    messages = render_prompt(source.template, parts)
    rated = {row["name"]: _rated(row, sample, answers[row["name"]]) for row in run.agents if row["name"] in answers}
    true = source.label(sample)
    summary = tag(
        "summary",
        tag("bdi", parts.item.title, class_="strong"),
        tag("small", f"user {sample.user_id}, persona {sample.persona}"),
        tag("span", f"true {true}, {best['name']} {rated[best['name']][1]}", class_="figures"),
    )
    prompt = (tag("div", tag("h4", each["role"]), tag("pre", each["content"], dir="auto")) for each in messages)
    return tag("details", summary, *prompt, tag("h4", "answers"), _answers(source.labels, true, rated))


def _answers(labels: Sequence[str], true: str, rated: Mapping[str, list[str]]) -> Markup:
    columns = [f"{label} (true)" if label == true else label for label in labels]
    said = any(cells[-1] for cells in rated.values())
    rows = [[name, *(cells if said else cells[:-1])] for name, cells in rated.items()]
    return write_table(["agent", "readout", "rating", *columns, *(["text"] if said else [])], rows, n_text=2)


def spread_over(groups: Sequence[int], n: int, seed: int) -> list[int]:
    """At most ``n`` places drawn at random, as many of each group as can be, ordered by group.

    Args:
        groups: The group of each place.
        n: How many are wanted.
        seed: Of the draw.
    """
    order = np.random.default_rng(seed).permutation(len(groups)).tolist()
    turns: dict[int, int] = {}
    ranked = []
    for place in order:
        turn = turns[groups[place]] = turns.get(groups[place], -1) + 1
        ranked.append((turn, groups[place], place))
    first = sorted(ranked)[:n]
    return [place for _, _, place in sorted(first, key=lambda entry: (entry[1], entry[0]))]


def _file_of(run: Run, row: Row) -> Path:
    return run.workspace.predictions(row["name"])


def _predictions(run: Run, row: Row) -> Answers:
    table = read_table(_file_of(run, row), COLUMNS["predictions"])
    return {(each["user_id"], each["item_id"]): each for each in table.to_pylist()}


def _rated(row: Row, sample: "Sample", answers: Answers) -> list[str]:
    """Readout, rating, the percentage of each label, and what was generated."""
    prediction = answers.get((sample.user_id, sample.item_id))
    if prediction is None:
        raise DataError(f"{row['name']} has no prediction", where=sample.name, remedy="run persona_eval again")
    value = prediction[_READ_FROM[row["readout"]]]
    shares = [percent(share).removesuffix("%") for share in prediction["p"]]
    return [row["readout"], number(value, 2), *shares, prediction["text"] or ""]
