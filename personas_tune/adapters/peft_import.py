"""PEFT adapters, ours and ones trained elsewhere, as adapters of a torchtune model: exactly, or not at all."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from personas_tune.adapters.layouts import Layout, columns_of, has_bias, place_of
from personas_tune.adapters.peft_config import require_plain_lora
from personas_tune.adapters.peft_form import BaseWeight, PeftAdapter, row_norms, split_modules
from personas_tune.adapters.peft_modules import PeftModule, read_modules
from personas_tune.errors import AdapterError, ConfigError


def from_peft(
    peft: PeftAdapter,
    layout: Layout,
    *,
    fresh: Mapping[str, Tensor],
    alpha: float,
    where: str,
    base_weight: BaseWeight | None = None,
) -> dict[str, Tensor]:
    """A PEFT adapter's weights under a model's torchtune names, with the same effect.

    A fused projection's adapter is cut into its parts: a block-diagonal B (our own export) gives back what it was made
    of, of a dense one each part takes its rows of B and shares A. A lower rank is filled up with zero columns of B, and
    zero columns are dropped where the rank is too high. A scale other than the model's alpha / rank is multiplied into
    B: exact if they differ by a power of two, else rounded once in fp32. Modules that the file lacks stay fresh.

    Args:
        peft: The adapter.
        layout: Of the base's checkpoint.
        fresh: A new adapter of the model, by torchtune name: what to fill, and with what; its B is zero.
        alpha: The model's LoRA alpha.
        where: The folder, for errors.
        base_weight: Gives a weight of the base's checkpoint by Hugging Face's name. Needed for DoRA on a fused
            projection of which the model adapts a part: to see that the rest is as in the base.

    Raises:
        AdapterError: If there is no exact way; names the setting that would give one.
        ConfigError: If the model isn't one of the base's sizes.
        SeveralErrors: If the config asks for several things that can't be had.
    """
    require_plain_lora(peft.config, where)
    ours = split_modules(fresh)
    _require_sizes_of_base(ours, layout)
    modules = read_modules(peft, layout, where)
    _require_same_kind(peft, modules, ours, layout, where)
    _require_adapted(modules, ours, layout, where)
    rank = next(iter(ours.values()))["lora_a.weight"].shape[0]
    cut = {part: pair for whole in modules for part, pair in _cut_up(whole, ours, rank).items()}
    _require_rank({part: a.shape[0] for part, (a, _) in cut.items()}, rank, where)
    weights = {name: weight.clone() for name, weight in fresh.items()}
    for whole in modules:
        _require_rest_as_in_base(whole, ours, base_weight, where)
        for part in (part for part in whole.places if part in ours):
            a, b = cut[part]
            weights[f"{part}.lora_a.weight"][: a.shape[0]] = a
            weights[f"{part}.lora_b.weight"].zero_()[:, : a.shape[0]] = _folded(b, whole.scale * rank / alpha, where)
            if whole.magnitude is not None:
                weights[f"{part}.magnitude"].copy_(whole.rows(part, whole.magnitude))
    _require_finite(weights, where)
    return weights


def _cut_up(whole: PeftModule, ours: Mapping[str, object], rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each part that the model adapts, of as low a rank as need be."""
    mine = [part for part in whole.places if part in ours]
    blocks = {part: slice(number * rank, (number + 1) * rank) for number, part in enumerate(mine)}
    if whole.a.shape[0] == rank * len(mine) and all(
        _is_zero_beside(whole.rows(part, whole.b), block) for part, block in blocks.items()
    ):
        return {part: (whole.a[block], whole.rows(part, whole.b)[:, block]) for part, block in blocks.items()}
    return {part: _without_zeros(whole.a, whole.rows(part, whole.b), rank) for part in mine}


def _is_zero_beside(b: Tensor, block: slice) -> bool:
    return not b[:, : block.start].any() and not b[:, block.stop :].any()


def _without_zeros(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same product without what adds nothing to it, if the rank is too high."""
    if a.shape[0] <= rank:
        return a, b
    kept = a.any(dim=1) & b.any(dim=0)
    return a[kept], b[:, kept]


def _folded(b: Tensor, factor: float, where: str) -> Tensor:
    """B with a difference of scales; a factor that is 1 but for its own rounding is left out.

    Raises:
        AdapterError: If what that leaves is so small that fp32 rounds it more coarsely than other numbers, or to 0.
    """
    if math.isclose(factor, 1, rel_tol=1e-12):
        return b
    folded = (b.double() * factor).float()
    limits = torch.finfo(folded.dtype)
    if b.any() and folded.abs().max() < limits.tiny / limits.eps:
        raise AdapterError(
            f"with its scale, lora_alpha / r, fp32 can't hold its B (factor {factor:g})",
            where=where,
            remedy="check lora_alpha and alpha_pattern",
        )
    return folded


# What can't be imported


def _require_sizes_of_base(ours: Mapping[str, Mapping[str, Tensor]], layout: Layout) -> None:
    for module, parts in ours.items():
        try:
            place = place_of(module, layout)
            expected = (columns_of(place.module, layout), place.rows)
        except KeyError:
            expected = None
        found = (parts["lora_a.weight"].shape[1], parts["lora_b.weight"].shape[0])
        if found != expected:
            raise ConfigError(
                f"{module} has {found[0]} inputs and {found[1]} outputs, which no module of the base has",
                where="model",
                remedy="match the model section to the base's config.json",
            )


def _require_same_kind(
    peft: PeftAdapter,
    modules: Sequence[PeftModule],
    ours: Mapping[str, Mapping[str, Tensor]],
    layout: Layout,
    where: str,
) -> None:
    is_dora = bool(peft.config.get("use_dora"))
    if is_dora and any(has_bias(part, layout) for module in modules for part in module.places):
        raise AdapterError(
            "a DoRA adapter on q, k or v, whose biases torchtune's DoRA scales too and PEFT's doesn't",
            where=where,
            remedy="train it as LoRA",
        )
    if is_dora != any("magnitude" in parts for parts in ours.values()):
        kinds = "a DoRA adapter, the model's are LoRA" if is_dora else "a LoRA adapter, the model's are DoRA"
        raise AdapterError(f"it is {kinds}", where=where, remedy=f"set model.use_dora={str(is_dora).lower()}")


def _require_adapted(modules: Sequence[PeftModule], ours: Mapping[str, object], layout: Layout, where: str) -> None:
    """Refuse an adapter with an effect on modules that the model doesn't adapt."""
    foreign = {
        part.rpartition(".")[2]
        for whole in modules
        for part in whole.places
        if part not in ours and (whole.rows(part, whole.b)).any()
    }
    if not foreign:
        return
    attention = sorted(name for name in foreign if name.endswith("_proj"))
    settings = [f"add {', '.join(attention)} to model.lora_attn_modules"] if attention else []
    settings += ["set model.apply_lora_to_mlp=true"] if foreign & {"w1", "w2", "w3"} else []
    if "output" in foreign:
        settings.append("train it without lm_head" if layout.tied else "set model.apply_lora_to_output=true")
    names = ", ".join(sorted(foreign))
    raise AdapterError(f"it adapts {names}, the model does not", where=where, remedy=" and ".join(settings))


def _require_rank(ranks: Mapping[str, int], rank: int, where: str) -> None:
    highest = max(ranks, key=lambda part: ranks[part], default=None)
    if highest is not None and ranks[highest] > rank:
        raise AdapterError(
            f"{highest} has rank {ranks[highest]}, the model's adapters have {rank}",
            where=where,
            remedy=f"set model.lora_rank={ranks[highest]}",
        )


def _require_rest_as_in_base(
    whole: PeftModule, ours: Mapping[str, object], base_weight: BaseWeight | None, where: str
) -> None:
    """Refuse DoRA magnitudes of parts that the model doesn't adapt, unless they are the base's."""
    rest = [part for part in whole.places if part not in ours]
    if whole.magnitude is None or not rest:
        return
    names = ", ".join(part.rpartition(".")[2] for part in rest)
    remedy = f"add {names} to model.lora_attn_modules"
    if base_weight is None:
        raise AdapterError(f"magnitudes of {names} can't be told from the base's", where=where, remedy=remedy)
    norms = row_norms(base_weight(f"{whole.module}.weight"))
    for part in rest:
        found, expected = whole.rows(part, whole.magnitude), whole.rows(part, norms)
        if not torch.allclose(found, expected, rtol=4 * torch.finfo(whole.dtype).eps, atol=0):
            raise AdapterError(f"it adapts {names}, the model does not", where=where, remedy=remedy)


def _require_finite(weights: Mapping[str, Tensor], where: str) -> None:
    broken = next((name for name, weight in weights.items() if not torch.isfinite(weight).all()), None)
    if broken is not None:
        raise AdapterError(f"weight {broken} is not finite", where=where, remedy="take a sound copy of the adapter")
