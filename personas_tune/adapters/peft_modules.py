"""The modules of a PEFT adapter, checked against the base that it is to be used on."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from personas_tune.adapters.layouts import Layout, Place, columns_of, modules_in, place_of, rows_from_hf, rows_of
from personas_tune.adapters.peft_config import cut, match_pattern, scale_of
from personas_tune.adapters.peft_form import PeftAdapter, hf_modules
from personas_tune.errors import AdapterError

# What of a base's name on the Hub tells its family.
_FAMILY_NAMES = {
    "phi3": r"(?<![a-z])phi-?\d", "llama": "llama", "qwen2": "qwen", "mistral": "mistral", "gemma": "gemma",
}  # fmt: skip
_CONFIG = "adapter_config.json"
_AGAIN = "save the adapter with PEFT again"
_OTHER_BASE = "import it with the base that it was trained on"


@dataclass(frozen=True)
class PeftModule:
    """One Hugging Face module of a PEFT adapter, fp32: A ``(rank, in)``, B ``(out, rank)``, a magnitude if DoRA."""

    module: str
    a: Tensor
    b: Tensor
    magnitude: Tensor | None
    dtype: torch.dtype
    scale: float
    places: dict[str, Place]  # of torchtune's modules in it, starts counted within it

    def rows(self, part: str, weight: Tensor) -> Tensor:
        """A part's rows of a weight of this module, in torchtune's order."""
        place = self.places[part]
        return rows_from_hf(weight[place.start : place.start + place.rows], place)


def read_modules(peft: PeftAdapter, layout: Layout, where: str) -> list[PeftModule]:
    """The modules of a PEFT adapter.

    Args:
        peft: Its config is one that :func:`require_plain_lora` took.
        layout: Of the base that it is to be used on.
        where: The folder, for errors.

    Raises:
        AdapterError: If it is of another base, or not complete.
    """
    _require_this_base(peft, layout, where)
    modules = [_module(module, names, peft, layout, where) for module, names in hf_modules(peft.weights, where).items()]
    _require_parts_once(modules, where)
    return modules


def _module(module: str, names: Mapping[str, str], peft: PeftAdapter, layout: Layout, where: str) -> PeftModule:
    """One module of the file, its shapes checked against the base's."""
    expected = {"lora_A.weight", "lora_B.weight"} | (
        {"lora_magnitude_vector"} if peft.config.get("use_dora") else set()
    )
    if names.keys() != expected:
        odd = sorted(names.keys() ^ expected)[0]
        what = "has no" if odd in expected else "has, without use_dora, a"
        raise AdapterError(f"{module} {what} {odd}", where=where, remedy=_AGAIN)
    found = {ending: peft.weights[name] for ending, name in names.items()}
    _require_shapes(module, found, peft, layout, where)
    broken = next((ending for ending, weight in found.items() if not torch.isfinite(weight).all()), None)
    if broken is not None:
        raise AdapterError(
            f"weight {module}.{broken} is not finite", where=where, remedy="take a sound copy of the adapter"
        )
    a, b, magnitude = found["lora_A.weight"], found["lora_B.weight"], found.get("lora_magnitude_vector")
    parts = modules_in(module, layout)
    places = [place_of(part, layout) for part in parts]
    first = min(place.start for place in places)  # of an unfused name, the part's own rows
    return PeftModule(
        module=module,
        a=a.float(),
        b=b.float(),
        magnitude=None if magnitude is None else magnitude.float().reshape(-1),
        dtype=a.dtype if magnitude is None else magnitude.dtype,
        scale=scale_of(module, a.shape[0], peft.config),
        places={part: replace(place, start=place.start - first) for part, place in zip(parts, places, strict=True)},
    )


def _require_shapes(module: str, found: Mapping[str, Tensor], peft: PeftAdapter, layout: Layout, where: str) -> None:
    """Refuse shapes other than the base's and the config's; no weight is read for it."""
    a, b, magnitude = found["lora_A.weight"], found["lora_B.weight"], found.get("lora_magnitude_vector")
    n_rows, n_columns = rows_of(module, layout), columns_of(module, layout)
    rank = a.shape[0] if a.dim() == 2 else 0
    if a.shape != (rank, n_columns) or b.shape != (n_rows, rank):
        raise AdapterError(
            f"{module} has A of {_size(a)} and B of {_size(b)}, this base takes rank x {n_columns} and {n_rows} x rank",
            where=where,
            remedy=_OTHER_BASE,
        )
    if magnitude is not None and magnitude.numel() != n_rows:
        what = f"{module} has a magnitude of {_size(magnitude)}, this base takes {n_rows}"
        raise AdapterError(what, where=where, remedy=_OTHER_BASE)
    stated = match_pattern(peft.config.get("rank_pattern") or {}, module, peft.config["r"])
    if rank != stated:
        raise AdapterError(f"{module} has rank {rank}, {_CONFIG} says {stated}", where=where, remedy=_AGAIN)


def _require_this_base(peft: PeftAdapter, layout: Layout, where: str) -> None:
    """Refuse an adapter of a base with other modules, other layers or a name of another family."""
    found = list(hf_modules(peft.weights, where))
    if not found:
        raise AdapterError("no adapter weights in it", where=where, remedy=_AGAIN)
    unknown = next((module for module in found if not modules_in(module, layout)), None)
    if unknown is not None:
        raise AdapterError(f"this base has no module {unknown[:100]!r}", where=where, remedy=_OTHER_BASE)
    name = str(peft.config.get("base_model_name_or_path") or "")
    of = [family for family, pattern in _FAMILY_NAMES.items() if re.search(pattern, name.lower())]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and of and layout.family not in of:
        raise AdapterError(
            f"it was trained on {cut(name)}, the base here is a {layout.family}", where=where, remedy=_OTHER_BASE
        )
    layers = _layers_by_name(found)
    beyond = max((max(numbers) for numbers in layers.values()), default=0)
    if beyond >= layout.n_layers:
        raise AdapterError(f"it has a layer {beyond}, this base has {layout.n_layers}", where=where, remedy=_OTHER_BASE)
    _require_complete(peft, found, layout, where)


def _require_complete(peft: PeftAdapter, found: Sequence[str], layout: Layout, where: str) -> None:
    """Refuse a file that lacks modules which its own config names."""
    targets = peft.config.get("target_modules")
    if not isinstance(targets, list):  # a pattern: the weights tell
        return
    unnamed = next((module for module in found if not any(f".{module}".endswith(f".{name}") for name in targets)), None)
    lacking = next((name for name in targets if not any(f".{module}".endswith(f".{name}") for module in found)), None)
    if unnamed is not None or lacking is not None:
        what = f"lacks weights of {cut(lacking)}" if unnamed is None else f"has weights of {unnamed}"
        raise AdapterError(
            f"it {what}, {_CONFIG} has target_modules {cut(sorted(targets))}", where=where, remedy=_AGAIN
        )
    chosen = any(peft.config.get(key) for key in ("layers_to_transform", "exclude_modules"))
    if chosen or any("." in name for name in targets):
        return
    for name, numbers in _layers_by_name(found).items():
        gap = min(set(range(layout.n_layers)) - numbers, default=None)
        if gap is not None:
            what = f"it lacks {name} of layer {gap}, this base has {layout.n_layers} layers"
            raise AdapterError(what, where=where, remedy=_OTHER_BASE)


def _layers_by_name(found: Sequence[str]) -> dict[str, set[int]]:
    layers: dict[str, set[int]] = {}
    for module in found:
        words = module.split(".")
        if len(words) > 2:
            layers.setdefault(words[-1], set()).add(int(words[2]))
    return layers


def _require_parts_once(modules: Sequence[PeftModule], where: str) -> None:
    seen: set[str] = set()
    for each in modules:
        if again := seen & each.places.keys():
            raise AdapterError(f"it adapts {sorted(again)[0]} twice, fused and not", where=where, remedy=_AGAIN)
        seen |= each.places.keys()


def _size(weight: Tensor) -> str:
    return " x ".join(map(str, weight.shape)) or "one number"
