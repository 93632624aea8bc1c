"""Adapters in PEFT's form, and back, exactly.

Where Hugging Face fuses projections, an adapter on some of them is written as one adapter of the fused projection: the
A matrices stacked, the B matrices block-diagonal, zero rows for what isn't adapted. With m parts of rank r that is an
adapter of rank m r; alpha grows with it, so the scale alpha / r is unchanged and the product B A is exact.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from personas_tune.adapters.layouts import Layout, Place, has_bias, modules_in, place_of, rows_of, rows_to_hf
from personas_tune.adapters.peft_config import lora_config
from personas_tune.errors import AdapterError

BaseWeight = Callable[[str], Tensor]

# torchtune's ending of a parameter's name -> PEFT's
ENDINGS = {"lora_a.weight": "lora_A.weight", "lora_b.weight": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
_PREFIX = "base_model.model."
_PEFT_PARAMETER = re.compile(
    rf"{re.escape(_PREFIX)}(.+)\.({'|'.join(map(re.escape, ENDINGS.values()))})(?:(?<=vector)\.weight)?"
)
_PARAMETER = re.compile(rf"(.+)\.({'|'.join(map(re.escape, ENDINGS))})")


@dataclass(frozen=True)
class PeftAdapter:
    """A PEFT folder's content.

    Args:
        weights: By PEFT's names, such as ``base_model.model.lm_head.lora_A.weight`` of shape ``(rank, in)``,
            ``lora_B.weight`` of ``(out, rank)`` and ``lora_magnitude_vector`` of ``(out,)``.
        config: ``adapter_config.json``.
        about: What the weights' file says of where they come from.
    """

    weights: dict[str, Tensor]
    config: dict[str, Any]
    about: dict[str, Any] = field(default_factory=dict)


def hf_modules(weights: Iterable[str], where: str | None = None) -> dict[str, dict[str, str]]:
    """Names of a PEFT adapter's weights by Hugging Face module, and in it by ending (``lora_A.weight``, ...).

    Raises:
        AdapterError: If a weight is none of A, B and magnitude, or there twice under two names.
    """
    modules: dict[str, dict[str, str]] = {}
    for name in weights:
        match = _PEFT_PARAMETER.fullmatch(name)
        if match is None:
            raise AdapterError(
                f"weight {name[:100]!r} is neither A, B nor magnitude of a linear layer",
                where=where,
                remedy="train it as a plain LoRA on linear layers",
            )
        if match[2] in modules.setdefault(match[1], {}):  # a magnitude's name may end in .weight or not
            raise AdapterError(
                f"weight {name[:100]!r} is there twice, with and without .weight",
                where=where,
                remedy="save the adapter with PEFT again",
            )
        modules[match[1]][match[2]] = name
    return modules


def split_modules(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """An adapter's weights by torchtune module, and in it by ending (``lora_a.weight``, ...).

    Raises:
        AdapterError: If a weight is no part of a LoRA or DoRA adapter.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    for name, weight in weights.items():
        match = _PARAMETER.fullmatch(name)
        if match is None:
            raise AdapterError(f"weight {name} is no part of a LoRA or DoRA adapter", remedy="use torchtune's lora_*")
        modules.setdefault(match[1], {})[match[2]] = weight
    return modules


def why_no_peft_form(
    weights: Mapping[str, Tensor], layout: Layout, base_weight: BaseWeight | None = None, *, to_merge: bool = False
) -> str:
    """What keeps an adapter from having an exact PEFT form; empty if nothing does. Arguments as of :func:`to_peft`."""
    try:
        modules = split_modules(weights)
        places = {module: place_of(module, layout) for module in modules}
    except (AdapterError, KeyError, ValueError) as error:
        return f"it has modules that {layout.family} checkpoints lack ({error})"
    for module, parts in modules.items():
        if parts.keys() - {"magnitude"} != {"lora_a.weight", "lora_b.weight"}:
            return f"{module} has no A and B"
        if parts["lora_b.weight"].shape[0] != places[module].rows:
            return f"{module} has {parts['lora_b.weight'].shape[0]} rows, config.json says {places[module].rows}"
    is_dora = any("magnitude" in parts for parts in modules.values())
    if is_dora and not to_merge and any(has_bias(module, layout) for module in modules):
        return "torchtune's DoRA scales the biases of q, k and v too, PEFT's doesn't; the two can only be merged"
    partly = next((place for place in places.values() if not _is_whole(place, modules, layout)), None)
    if partly is not None and base_weight is None and is_dora:
        return f"DoRA on a part of {partly.module} needs the base's weights"
    return ""


def _is_whole(place: Place, modules: Mapping[str, Any], layout: Layout) -> bool:
    return all(part in modules for part in modules_in(place.module, layout))


def to_peft(
    weights: Mapping[str, Tensor],
    layout: Layout,
    *,
    alpha: float,
    dropout: float,
    base_model: str,
    base_weight: BaseWeight | None = None,
    to_merge: bool = False,
) -> PeftAdapter:
    """An adapter in PEFT's form, exactly.

    Args:
        weights: By torchtune name; LoRA or DoRA, one rank.
        layout: Of the base's checkpoint.
        alpha: LoRA alpha of each torchtune module.
        dropout: LoRA dropout in training.
        base_model: Name or folder of the base, for ``adapter_config.json``.
        base_weight: Gives a weight of the base's checkpoint by Hugging Face's name. Needed for DoRA on a part of a
            fused projection only: the magnitude of the other rows is their norm.
        to_merge: It is merged into the base, not written. torchtune's DoRA scales a module's bias with its rows,
            PEFT's doesn't: where modules have biases (Qwen 2's q, k and v) such an adapter can be merged, bias
            included, but not loaded in PEFT.

    Raises:
        AdapterError: If it has no such form.
    """
    problem = why_no_peft_form(weights, layout, base_weight, to_merge=to_merge)
    if problem:
        raise AdapterError(f"no PEFT form: {problem}")
    grouped: dict[str, list[tuple[Place, dict[str, Tensor]]]] = {}
    for module, parts in split_modules(weights).items():
        place = place_of(module, layout)
        grouped.setdefault(place.module, []).append((place, parts))
    converted, ranks, alphas = {}, {}, {}
    for module, held in grouped.items():
        held.sort(key=lambda entry: entry[0].start)
        whole = _one_module(module, held, layout, base_weight)
        converted.update({f"{_PREFIX}{module}.{ending}": weight.contiguous() for ending, weight in whole.items()})
        ranks[module] = whole["lora_A.weight"].shape[0]
        alphas[module] = alpha * len(held)
    use_dora = any("magnitude" in name for name in weights)
    config = lora_config(ranks, alphas, dropout=dropout, base_model=base_model, use_dora=use_dora)
    return PeftAdapter(converted, config)


def _one_module(
    module: str, held: list[tuple[Place, dict[str, Tensor]]], layout: Layout, base_weight: BaseWeight | None
) -> dict[str, Tensor]:
    """One Hugging Face module's A, B and magnitude: A stacked, B block-diagonal over the parts that it holds."""
    ranks = [parts["lora_a.weight"].shape[0] for _, parts in held]
    some = held[0][1]["lora_b.weight"]
    stacked = some.new_zeros(rows_of(module, layout), sum(ranks))
    for number, (place, parts) in enumerate(held):
        column = sum(ranks[:number])
        rows = slice(place.start, place.start + place.rows)
        stacked[rows, column : column + ranks[number]] = rows_to_hf(parts["lora_b.weight"], place)
    whole = {
        ENDINGS["lora_a.weight"]: torch.cat([parts["lora_a.weight"] for _, parts in held]),
        ENDINGS["lora_b.weight"]: stacked,
    }
    if "magnitude" in held[0][1]:
        whole[ENDINGS["magnitude"]] = _magnitude(module, held, layout, base_weight)
    return whole


def _magnitude(
    module: str, held: list[tuple[Place, dict[str, Tensor]]], layout: Layout, base_weight: BaseWeight | None
) -> Tensor:
    some = held[0][1]["magnitude"]
    if len(held) < len(modules_in(module, layout)) and base_weight is not None:
        magnitude = row_norms(base_weight(f"{module}.weight")).to(some.dtype)
    else:
        magnitude = some.new_zeros(rows_of(module, layout))
    for place, parts in held:
        magnitude[place.start : place.start + place.rows] = rows_to_hf(parts["magnitude"], place)
    return magnitude


def row_norms(weight: Tensor) -> Tensor:
    """Norm of each row in fp32: the magnitude with which DoRA changes nothing."""
    norms: Tensor = torch.linalg.norm(weight.float(), dim=1)
    return norms
