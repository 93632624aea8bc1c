"""One adapter written as a PEFT folder or a merged checkpoint, with its model card."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from personas_tune.adapters.layouts import Layout
from personas_tune.adapters.peft_files import save_peft
from personas_tune.export.base_weights import weight_reader
from personas_tune.export.card import CardSubject, write_card
from personas_tune.export.facts import Facts
from personas_tune.export.forms import DTYPES, Converted, cast, convert
from personas_tune.export.merging import merge_checkpoint
from personas_tune.export.origin import License, Origin
from personas_tune.export.serving import Exported, merged_command, vllm_command

CARD = "README.md"
NF4_MERGED = (
    "The adapter was trained on this base in 4 bits (NF4, QLoRA), and is merged here into its full-precision weights: "
    "these differ from what it was trained on, and so do its answers, a little."
)
NF4_ADAPTER = (
    "It was trained on the base in 4 bits (NF4, QLoRA). On the full-precision base it loads and runs, but that base "
    "differs from what it was trained on, and so do its answers, a little."
)


@dataclass(frozen=True)
class Form:
    """In what form adapters leave.

    Args:
        kind: ``peft`` or ``merged``.
        dtype: ``fp32``, ``bf16`` or ``fp16``; None for an adapter's own, or the base's where it is merged.
        max_rank: Cut larger ranks; None for no bound.
        license: In the place of the base's.
        dataset: What kind of log they were trained on.
    """

    kind: str
    dtype: str | None
    max_rank: int | None
    license: str | None
    dataset: str

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
) -> tuple[list[str], Exported]:
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
    exported = Exported(
        set_name=trained.parent.name,
        adapter=trained.name,
        path=Path("PATH"),
        rank=None if is_merged else int(converted.peft.config["r"]),
        is_dora=bool(converted.peft.config["use_dora"]),
        errors=tuple(converted.errors.values()),
    )
    if is_merged:
        names = merge_checkpoint(folder, base_files, converted.peft, dtype=dtype, is_tied=layout.tied)
    else:
        peft = converted.peft if dtype is None else cast(converted.peft, dtype)
        names = save_peft(folder, peft, _about(exported, origin, facts, converted))
    card = write_card(_subject(form, origin, converted, exported), facts)
    (folder / CARD).write_text(card, encoding="utf-8")
    return [*names, CARD], exported


def _about(exported: Exported, origin: Origin, facts: Facts, converted: Converted) -> dict[str, Any]:
    return {
        "set": exported.set_name,
        "adapter": exported.adapter,
        "base": origin.name,
        "base_weights": converted.base_weights,
        "data_sha256": facts.data_sha256,
    }


def _subject(form: Form, origin: Origin, converted: Converted, exported: Exported) -> CardSubject:
    is_merged = form.kind == "merged"
    return CardSubject(
        name=exported.name,
        form=form.kind,
        base=origin.name,
        dataset=form.dataset,
        license=origin.license if form.license is None else License(form.license),
        rank=exported.rank,
        scale=converted.scale,
        dtype=form.dtype_in_words,
        is_dora=exported.is_dora,
        command=merged_command(exported) if is_merged else vllm_command(origin.name, [exported]),
        notes=_notes(form, origin, converted, exported),
    )


def _notes(form: Form, origin: Origin, converted: Converted, exported: Exported) -> list[str]:
    notes = []
    if origin.is_quantised:
        notes.append(NF4_MERGED if form.kind == "merged" else NF4_ADAPTER)
    if exported.errors:
        notes.append(
            f"Its rank was cut from {converted.full_rank} to {exported.rank}, which is lossy: {exported.truncation}."
        )
    if form.kind != "merged" and exported.why_not_served:
        notes.append(f"{exported.why_not_served[0].upper()}{exported.why_not_served[1:]}.")
    return notes
