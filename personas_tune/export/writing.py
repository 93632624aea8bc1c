"""One adapter written as a PEFT folder or a merged checkpoint, with its model card."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from personas_tune.adapters.base_weights import weight_reader
from personas_tune.adapters.layouts import Layout
from personas_tune.adapters.peft_files import save_peft
from personas_tune.export.card import CardSubject, loadable, write_card
from personas_tune.export.facts import Facts
from personas_tune.export.forms import DTYPES, Converted, cast, convert
from personas_tune.export.merging import merge_checkpoint
from personas_tune.export.origin import License, Origin
from personas_tune.export.serving import NO_ADAPTED_OUTPUT, Written, merged_command, served_name, vllm_command

CARD = "README.md"
NF4_MERGED = (
    "The adapter was trained on this base in 4 bits (NF4, QLoRA), and is merged here into its full-precision weights: "
    "these differ from what it was trained on, and so do its answers, a little."
)
NF4_ADAPTER = (
    "It was trained on the base in 4 bits (NF4, QLoRA). On the full-precision base it loads and runs, but that base "
    "differs from what it was trained on, and so do its answers, a little."
)
WINDOW = (
    "The base's config.json has a sliding window of {window} tokens, which transformers applies and the training "
    "didn't; rows of the training may have {longest} tokens. Prompts above the window are answered otherwise here."
)


@dataclass(frozen=True)
class Form:
    """In what form adapters leave.

    Args:
        kind: ``peft`` or ``merged``.
        dtype: ``fp32``, ``bf16`` or ``fp16``; None for an adapter's own, or the base's where it is merged.
        max_rank: Cut larger ranks; None for no bound.
        license: In the place of the base's.
        words: Whether cards tell the words of personas.
    """

    kind: str
    dtype: str | None
    max_rank: int | None
    license: str | None
    words: bool = True

    @property
    def dtype_in_words(self) -> str:
        """What dtype is written."""
        return self.dtype or ("the base's dtype" if self.kind == "merged" else "fp32")


def write_adapter(
    folder: Path,
    trained: Path,
    form: Form,
    origin: Origin,
    layout: Layout,
    facts: Facts,
    base_files: Sequence[Path] = (),
) -> tuple[list[str], Written]:
    """Write one adapter.

    Args:
        folder: Where to.
        trained: ``adapters/<set>/<adapter>``.
        form: In which.
        origin: Its base.
        layout: Of the base's checkpoint.
        facts: For the card.
        base_files: The base's weight files: to merge into, and DoRA may need some of them.

    Returns:
        Names of the files written, and what a server has to know of it.

    Raises:
        CheckpointError: If the adapter or the base is damaged, or they don't fit.
        AdapterError: If it can't take this form.
    """
    folder.mkdir(parents=True, exist_ok=True)
    reader = weight_reader(base_files) if base_files else None
    dtype = None if form.dtype is None else DTYPES[form.dtype]
    is_merged = form.kind == "merged"
    converted = convert(
        trained, layout, base_name=origin.name, base_weight=reader, max_rank=form.max_rank, to_merge=is_merged
    )
    written = Written(
        rank=None if is_merged else int(converted.peft.config["r"]),
        is_dora=bool(converted.peft.config["use_dora"]),
        no_output=layout.family in NO_ADAPTED_OUTPUT and any(".lm_head." in name for name in converted.peft.weights),
        errors=tuple(converted.errors.values()),
    )
    if is_merged:
        names = merge_checkpoint(folder, base_files, converted.peft, dtype=dtype, is_tied=layout.tied)
    else:
        peft = converted.peft if dtype is None else cast(converted.peft, dtype)
        names = save_peft(folder, peft, _about(trained, origin, facts, converted))
    subject = _subject(served_name(trained.parent.name, trained.name), form, origin, converted, written, facts)
    (folder / CARD).write_text(write_card(subject, _told(facts, form)), encoding="utf-8")
    return [*names, CARD], written


def _about(trained: Path, origin: Origin, facts: Facts, converted: Converted) -> dict[str, Any]:
    return {
        "set": trained.parent.name,
        "adapter": trained.name,
        "base": origin.name,
        "base_weights": converted.base_weights,
        "data_sha256": facts.data_sha256,
    }


def _told(facts: Facts, form: Form) -> Facts:
    if form.words or facts.persona is None:
        return facts
    return replace(facts, persona=replace(facts.persona, words=()))


def _subject(
    name: str, form: Form, origin: Origin, converted: Converted, written: Written, facts: Facts
) -> CardSubject:
    own = None if facts.is_imported else origin.license  # whose an imported adapter is, nobody here knows
    return CardSubject(
        name=name,
        form=form.kind,
        base=origin.name,
        license=own if form.license is None else License(form.license),
        rank=written.rank,
        scale=converted.scale,
        dtype=form.dtype_in_words,
        is_dora=written.is_dora,
        command=_command(name, origin, written),
        measured_as=_measured_as(form, facts, written),
        notes=_notes(form, origin, converted, written, facts),
    )


def _command(name: str, origin: Origin, written: Written) -> str | None:
    if written.rank is None:
        return merged_command(name, "PATH")
    return None if written.why_not_served else vllm_command(loadable(origin.name), {name: "PATH"}, written.rank)


def _measured_as(form: Form, facts: Facts, written: Written) -> list[str]:
    """In what an agent that was measured differs from what is written."""
    differences = ["before its rank was cut"] if written.errors else []
    if facts.is_quantised:
        differences.append("on the base in 4 bits")
    if form.dtype_in_words != "fp32":
        differences.append(f"before it was rounded to {form.dtype_in_words}")
    return differences


def _notes(form: Form, origin: Origin, converted: Converted, written: Written, facts: Facts) -> list[str]:
    notes = []
    if facts.is_quantised:
        notes.append(NF4_MERGED if form.kind == "merged" else NF4_ADAPTER)
    if written.errors:
        notes.append(
            f"Its rank was cut from {converted.full_rank} to {written.rank}, which is lossy: {written.truncation}."
        )
    if written.why_not_served:
        notes.append(f"{written.why_not_served[0].upper()}{written.why_not_served[1:]}.".replace("VLLM", "vLLM"))
    if origin.window is not None and (facts.max_seq_len is None or origin.window < facts.max_seq_len):
        notes.append(WINDOW.format(window=origin.window, longest=facts.max_seq_len or "any number of"))
    return notes
