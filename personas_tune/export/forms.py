"""A trained adapter in the form in which it leaves: converted, cut to a rank, cast; every value must survive it."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from personas_tune.adapters.files import NATIVE_FILE, load_about, load_native
from personas_tune.adapters.layouts import Layout
from personas_tune.adapters.peft_form import BaseWeight, PeftAdapter, to_peft
from personas_tune.adapters.truncation import truncate_peft
from personas_tune.errors import AdapterError, CheckpointError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Converted:
    """An adapter in PEFT's form.

    Args:
        peft: The adapter.
        scale: What B A is multiplied with, in every module.
        full_rank: Largest rank before it was cut.
        errors: Of each module, the relative Frobenius error of B A; empty if nothing was cut.
        base_weights: sha256 of the weight files that it was trained on, by which an import refuses another base.
    """

    peft: PeftAdapter
    scale: float
    full_rank: int
    errors: dict[str, float]
    base_weights: list[str]


def is_dora(folder: Path) -> bool:
    """Whether a trained adapter has DoRA's magnitudes."""
    return any("magnitude" in name for name in load_native(folder))


def convert(
    folder: Path,
    layout: Layout,
    *,
    base_name: str,
    base_weight: BaseWeight | None = None,
    max_rank: int | None = None,
    to_merge: bool = False,
) -> Converted:
    """Read a trained adapter and put it into PEFT's form.

    Args:
        folder: ``adapters/<set>/<adapter>``.
        layout: Of the base's checkpoint.
        base_name: Goes into the adapter's config.
        base_weight: Reads a weight of the base by name; DoRA on a part of a fused projection needs it.
        max_rank: Cut modules of a larger rank, by the SVD of B A.
        to_merge: It is to be merged, not written: then DoRA on modules with biases will do, which PEFT can't hold.

    Raises:
        MissingInputError: If it hasn't been trained.
        CheckpointError: If it is damaged.
        AdapterError: If it has no such form, or a weight isn't finite.
    """
    weights, about = load_native(folder), load_about(folder)
    broken = next((name for name, weight in weights.items() if not torch.isfinite(weight).all()), None)
    if broken is not None:
        raise AdapterError(
            f"weight {broken} is not finite", where=str(folder / NATIVE_FILE), remedy="train the adapter again"
        )
    try:
        rank, alpha, dropout = int(about["rank"]), float(about["alpha"]), float(about.get("dropout", 0.0))
        base_weights = list(about.get("base_weights", []))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"it doesn't say its rank and alpha ({error})",
            where=str(folder / NATIVE_FILE),
            remedy="train the adapter again",
        ) from error
    lora = {"alpha": alpha, "dropout": dropout}
    peft = to_peft(weights, layout, **lora, base_model=base_name, base_weight=base_weight, to_merge=to_merge)
    full_rank, errors = int(peft.config["r"]), dict[str, float]()
    if max_rank is not None and full_rank > max_rank:
        peft, errors = truncate_peft(peft, max_rank)
    return Converted(peft, alpha / rank, full_rank, errors, base_weights)


def cast(peft: PeftAdapter, dtype: torch.dtype) -> PeftAdapter:
    """The same adapter in another dtype.

    Raises:
        AdapterError: If a value doesn't fit.
    """
    weights = {name: weight.to(dtype) for name, weight in peft.weights.items()}
    lost = next((name for name, weight in weights.items() if not torch.isfinite(weight).all()), None)
    if lost is not None:
        raise AdapterError(
            f"{lost} has values that {str(dtype).removeprefix('torch.')} can't hold",
            remedy="set export.dtype=bf16, or fp32",
        )
    return replace(peft, weights=weights)
