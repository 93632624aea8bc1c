"""The model card of an exported adapter: what it is, what it was trained on, how good it is, how it is loaded."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from personas_tune.export.facts import Facts, Measured
from personas_tune.export.origin import License

TASK = "rating prediction"
_METRICS = {"rmse": "RMSE", "mae": "MAE", "urr": "share of answers without a rating"}
_LIMITS = """\
It predicts how a group of users of one recommender rates items; it speaks for no single person, and neither for users
nor for items unlike those of the log. It expects the prompts that it was trained with (personas-tune's templates, as
chat messages): with others its ratings mean little. What the log is biased to, it repeats."""
_NO_LICENSE = "The base states no licence, so none is stated here."
_DATA_LICENSE = """\
It was trained on ratings, and on texts that a program or a language model wrote from them. The log's own terms say
whether what was trained on it may be passed on: some, MovieLens among them, forbid redistribution or commercial use
without permission. The terms of the model that wrote the texts, if one did, count too. The base's licence holds beside
these."""


@dataclass(frozen=True)
class CardSubject:
    """What a card is about, beside what the experiment's files say.

    Args:
        name: The adapter's, as servers call it.
        form: ``peft`` or ``merged``.
        base: The base's name: of the Hub (with its owner), or of its folder.
        license: ``export.license``, else the base's; None if neither is known.
        rank: Largest rank in it; None if it is merged.
        scale: What B A is multiplied with.
        dtype: Of what was written.
        is_dora: Whether it has DoRA magnitudes.
        command: The shell line that serves it, paths left out; None if vLLM doesn't.
        measured_as: What the figures are of, where it isn't what was written: such as "before its rank was cut".
        notes: What else the reader must know, a sentence each.
    """

    name: str
    form: str
    base: str
    license: License | None
    rank: int | None
    scale: float
    dtype: str
    is_dora: bool
    command: str | None
    measured_as: Sequence[str] = field(default_factory=tuple)
    notes: Sequence[str] = field(default_factory=tuple)


def write_card(subject: CardSubject, facts: Facts) -> str:
    """The text of ``README.md``: metadata for the Hub, words for people. It names no path of this machine."""
    data = _metadata(subject, facts)
    sections = [
        f"# {subject.name}",
        _introduction(subject, facts),
        *(f"**Note.** {note}" for note in subject.notes),
        _section("Persona", _persona(facts)),
        _section("Figures", _figures(facts.measured, subject.measured_as)),
        _section("How to load it", _loading(subject)),
        _section("Training", _training(subject, facts)),
        _section("Limits", _LIMITS),
        _section("Licence", _license(subject.license, facts.is_imported)),
    ]
    body = "\n\n".join(section for section in sections if section)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n").content)


def _metadata(subject: CardSubject, facts: Facts) -> ModelCardData:
    is_merged = subject.form == "merged"
    license = subject.license or License("other", "unstated")
    dataset = facts.dataset or "ratings"
    results = [] if subject.measured_as else [each for row in facts.measured for each in _eval_results(dataset, row)]
    is_of_hub = "/" in subject.base  # a name without an owner would be somebody else's model there
    return ModelCardData(
        base_model=subject.base if is_of_hub else None,
        base_model_relation=("finetune" if is_merged else "adapter") if is_of_hub else None,
        library_name="transformers" if is_merged else "peft",
        pipeline_tag="text-generation",
        tags=[
            "personas-tune",
            "torchtune",
            "recommender-systems",
            "user-simulation",
            "dora" if subject.is_dora else "lora",
        ],
        license=license.id,
        license_name=license.title,
        license_link=license.link,
        model_name=subject.name,
        eval_results=results or None,
    )


def _eval_results(dataset: str, row: Measured) -> Iterator[EvalResult]:
    who = "all personas" if row.persona is None else f"persona {row.persona}"
    for key, label in _METRICS.items():
        value = getattr(row, key)
        if value is not None:
            yield EvalResult(
                task_type="other",
                task_name=TASK,
                dataset_type=dataset,
                dataset_name=f"{dataset}: {row.n} test rows, {who}",
                dataset_config=who,
                dataset_split="test",
                metric_type=key,
                metric_name=f"{label} of agent {row.agent} ({row.readout})",
                metric_value=round(value, 4),
            )


def _section(heading: str, text: str) -> str:
    return f"## {heading}\n\n{text}" if text else ""


def _introduction(subject: CardSubject, facts: Facts) -> str:
    kind = "DoRA" if subject.is_dora else "LoRA"
    what = f"{subject.base} with a {kind} adapter merged into it" if subject.form == "merged" else f"A {kind} adapter"
    whose = "of one persona" if facts.persona is not None else "of users"
    on = "" if subject.form == "merged" else f" on {subject.base}"
    how = (
        "imported into"
        if facts.is_imported
        else "trained by [torchtune](https://github.com/meta-pytorch/torchtune) and"
    )
    return f"{what}{on}, {how} personas-tune to rate items as users of a recommender do: an agent {whose}."


def _persona(facts: Facts) -> str:
    if facts.persona is None:
        return ""
    text = f"{facts.persona.n_users} users, grouped by the likeness of their taste profiles."
    if facts.persona.words:
        words = ", ".join(f"`{word}`" for word in facts.persona.words)
        text += f" Words that set their profiles apart (`+` liked, `-` disliked): {words}."
    return text


def _figures(measured: Sequence[Measured], measured_as: Sequence[str]) -> str:
    if not measured:
        return "None: no agent with this adapter has been measured since it was trained."
    rows = ["| agent | readout | test rows of | n | RMSE | MAE | without a rating |", "|---|---|---|---|---|---|---|"]
    for row in measured:
        who = "all personas" if row.persona is None else f"persona {row.persona}"
        figures = [_figure(row.rmse), _figure(row.mae), f"{row.urr:.1%}"]
        rows.append("| " + " | ".join([row.agent, row.readout, who, str(row.n), *figures]) + " |")
    if measured_as:
        rows = [f"**Measured {', '.join(measured_as)}**; what is here was not measured.", "", *rows]
    return "\n".join([*rows, "", "RMSE and MAE are of the rows whose answer held a rating."])


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _loading(subject: CardSubject) -> str:
    if subject.form == "merged":
        lines = [
            "from transformers import AutoModelForCausalLM",
            "",
            'model = AutoModelForCausalLM.from_pretrained("PATH")',
        ]
    else:
        lines = [
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM",
            "",
            f'base = AutoModelForCausalLM.from_pretrained("{loadable(subject.base)}")',
            'model = PeftModel.from_pretrained(base, "PATH")',
        ]
    places = "`PATH` is this repository's name or folder."
    if subject.form != "merged" and loadable(subject.base) != subject.base:
        places += f" `{loadable(subject.base)}` is the folder of {subject.base}."
    text = f"{places}\n\n```python\n" + "\n".join(lines) + "\n```"
    if subject.command is None:
        return f"{text}\n\nvLLM doesn't serve it in this form."
    return f"{text}\n\nWith vLLM:\n\n```sh\n{subject.command}\n```"


def loadable(base: str) -> str:
    """What stands for a base in commands: its name on the Hub, else a word for its folder."""
    return base if "/" in base else "BASE"


def _training(subject: CardSubject, facts: Facts) -> str:
    form = {"form": subject.form, "dtype of this file": subject.dtype, "scale of B A": f"{subject.scale:g}"}
    if subject.rank is not None:
        form["largest rank of a module"] = str(subject.rank)
    if facts.data_sha256 is not None:
        form["sha256 over those of the files that prompts are made of"] = f"`{facts.data_sha256}`"
    rows = [f"| {label} | {value} |" for label, value in {**facts.training, **form}.items()]
    return "\n".join(["| | |", "|---|---|", *rows])


def _license(license: License | None, is_imported: bool) -> str:
    if is_imported:
        return "It was trained elsewhere: the terms under which it came hold, beside those of the base."
    return _DATA_LICENSE if license is not None else f"{_NO_LICENSE}\n\n{_DATA_LICENSE}"
