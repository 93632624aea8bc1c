"""PEFT's ``adapter_config.json``: written complete, and read only where nothing in it changes what an adapter does."""

import math
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from reprlib import Repr
from typing import Any

from personas_tune.errors import AdapterError, PersonasTuneError, raise_together

# Every key that PEFT 0.18 writes for LoRA, with the value that means nothing special.
PLAIN: dict[str, Any] = {
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None,
    "base_model_name_or_path": None, "bias": "none", "corda_config": None, "ensure_weight_tying": False,
    "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True,
    "init_lora_weights": True, "layer_replication": None, "layers_pattern": None, "layers_to_transform": None,
    "loftq_config": {}, "lora_alpha": 8, "lora_bias": False, "lora_dropout": 0.0, "megatron_config": None,
    "megatron_core": "megatron.core", "modules_to_save": None, "peft_type": "LORA", "peft_version": None,
    "qalora_group_size": 16, "r": 8, "rank_pattern": {}, "revision": None,
    "target_modules": None, "target_parameters": None, "task_type": "CAUSAL_LM", "trainable_token_indices": None,
    "use_dora": False, "use_qalora": False, "use_rslora": False,
}  # fmt: skip

# Keys whose value an import understands, or that change nothing in a finished adapter.
_UNDERSTOOD = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_alpha", "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_dora", "use_rslora",
}  # fmt: skip

# What the value of another key means, and what would help.
_REFUSED = {
    "bias": ("it trains biases too", "train it with bias none"),
    "lora_bias": ("it trains biases too", "train it with lora_bias false"),
    "modules_to_save": ("it has whole layers of its own", "train it without modules_to_save"),
    "fan_in_fan_out": ("its weights are transposed", "train it with fan_in_fan_out false"),
    "trainable_token_indices": ("it trains embeddings", "train it without trainable_token_indices"),
    "layer_replication": ("it repeats the base's layers", "train it without layer_replication"),
    "alora_invocation_tokens": ("it is an activated LoRA", "train it as a plain LoRA"),
    "target_parameters": ("it adapts single parameters", "train it on target_modules"),
    "arrow_config": ("it routes between adapters", "train it as a plain LoRA"),
    "megatron_config": ("it was made for Megatron layers", "train it as a plain LoRA"),
    "use_qalora": ("it is a QALoRA", "train it as a plain LoRA"),
}

# Ways to begin that leave the base as it is; the others (PiSSA, OLoRA, CorDA, LoftQ, ...) change it.
_HARMLESS_STARTS = ("gaussian", "eva", "orthogonal")
_LARGEST_RANK = 1 << 14
_ALPHAS = (1e-6, 1e12)  # far wider than what is in use; a scale beyond would only be a disguised 0 or infinity
_LONGEST_PATTERN = 200
_MOST_PATTERNS = 1024  # PEFT writes up to one a module; Llama's largest has 882
_MOST_TARGETS = 4096
_MOST_NAMED = 8

# Keys of rank_pattern and alpha_pattern that are understood: modules' names or their ends, and of regular expressions
# a dot, an escaped dot and ".*".
_PATTERN = re.compile(r"\^?(?:[\w-]|\\\.|\.\*?)+\$?", re.ASCII)

_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 60


def lora_config(
    ranks: Mapping[str, int], alphas: Mapping[str, float], *, dropout: float, base_model: str, use_dora: bool
) -> dict[str, Any]:
    """A complete ``adapter_config.json``.

    Args:
        ranks: Rank of each adapted Hugging Face module. The largest is ``r``, which servers reserve room for.
        alphas: Alpha of each.
        dropout: LoRA dropout in training.
        base_model: Name or folder of the base.
        use_dora: Whether it has magnitudes.
    """
    largest = max(ranks, key=lambda module: ranks[module])
    return {
        **PLAIN,
        "base_model_name_or_path": base_model,
        "target_modules": sorted({_last(module) for module in ranks}),
        "lora_dropout": dropout,
        "use_dora": use_dora,
        **rank_settings(ranks, alphas, default=largest),
    }


def rank_settings(ranks: Mapping[str, int], alphas: Mapping[str, float], default: str) -> dict[str, Any]:
    """Keys of a config that say each module's rank and alpha; those of the module ``default`` stand for most."""
    return {
        "r": ranks[default],
        "rank_pattern": _pattern(ranks, ranks[default]),
        "lora_alpha": _short(alphas[default]),
        "alpha_pattern": _pattern({module: _short(alpha) for module, alpha in alphas.items()}, _short(alphas[default])),
    }


def _pattern(values: Mapping[str, float], default: float) -> dict[str, float]:
    """Values other than the default, by the modules' last names where all of one name agree."""
    by_name: dict[str, set[float]] = {}
    for module, value in values.items():
        by_name.setdefault(_last(module), set()).add(value)
    alike = {name for name, found in by_name.items() if len(found) == 1}
    keyed = {_last(module) if _last(module) in alike else module: value for module, value in values.items()}
    return {key: value for key, value in sorted(keyed.items()) if value != default}


def _short(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def _last(module: str) -> str:
    return module.rpartition(".")[2]


def require_plain_lora(config: Mapping[str, Any], where: str) -> None:
    """Refuse a config by which an adapter would be more than A, B and magnitudes beside an unchanged base.

    Raises:
        AdapterError: For one thing in it; names what would help.
        SeveralErrors: For several.
    """
    problems = [*_wrong_kind(config, where), *_wrong_numbers(config, where), *_unclear_patterns(config, where)]
    unknown = []
    for key, value in config.items():
        if key in _UNDERSTOOD or value == PLAIN.get(key) or value in (None, False, "none", [], {}):
            continue
        if key in _REFUSED:
            why, remedy = _REFUSED[key]
            problems.append(_problem(f"{key} is {cut(value)}: {why}", where, remedy))
        else:
            unknown.append(key)
    if unknown:
        names = ", ".join(map(cut, unknown[:_MOST_NAMED]))
        more = f" and {len(unknown) - _MOST_NAMED} more" if len(unknown) > _MOST_NAMED else ""
        remedy = "remove them if the adapter means the same without"
        problems.append(_problem(f"settings unknown here: {names}{more}", where, remedy))
    raise_together(problems)


def _wrong_kind(config: Mapping[str, Any], where: str) -> list[PersonasTuneError]:
    problems: list[PersonasTuneError] = []
    if config.get("peft_type") != "LORA":
        kind = cut(config.get("peft_type"))
        problems.append(_problem(f"peft_type is {kind}", where, "only LORA adapters (DoRA ones too) can be imported"))
    start = config.get("init_lora_weights", True)
    if not isinstance(start, bool | None) and not (isinstance(start, str) and start.lower() in _HARMLESS_STARTS):
        remedy = "save it with PEFT's path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        problems.append(_problem(f"init_lora_weights is {cut(start)}: it changed the base", where, remedy))
    return problems


def _wrong_numbers(config: Mapping[str, Any], where: str) -> list[PersonasTuneError]:
    checks: list[tuple[str, Callable[[Any], bool], str]] = [
        ("r", _is_rank, f"a whole number from 1 to {_LARGEST_RANK}"),
        ("lora_alpha", _is_alpha, "a number from 1e-6 on, below 1e12"),
        ("rank_pattern", lambda value: _is_pattern(value, _is_rank), "an object of ranks by module"),
        ("alpha_pattern", lambda value: _is_pattern(value, _is_alpha), "an object of alphas by module"),
        ("use_rslora", lambda value: isinstance(value, bool | None), "true or false"),
        ("use_dora", lambda value: isinstance(value, bool | None), "true or false"),
        ("base_model_name_or_path", lambda value: isinstance(value, str | None), "a text"),
        ("target_modules", _is_targets, "a text or a list of names"),
    ]
    return [
        _problem(f"{key} is {cut(config.get(key))}", where, f"it should be {expected}")
        for key, fits, expected in checks
        if not fits(config.get(key))
    ]


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _LARGEST_RANK


def _is_alpha(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and _ALPHAS[0] <= value < _ALPHAS[1]


def _is_pattern(value: object, fits: Callable[[object], bool]) -> bool:
    if value is None:
        return True
    return isinstance(value, dict) and len(value) <= _MOST_PATTERNS and all(map(fits, value.values()))


def _is_targets(value: object) -> bool:
    if not isinstance(value, list):
        return isinstance(value, str | None)
    return len(value) <= _MOST_TARGETS and all(isinstance(name, str) for name in value)


def _unclear_patterns(config: Mapping[str, Any], where: str) -> list[PersonasTuneError]:
    problems: list[PersonasTuneError] = []
    for setting in ("rank_pattern", "alpha_pattern"):
        keys = config.get(setting)
        for key in keys if isinstance(keys, dict) else ():
            if len(key) > _LONGEST_PATTERN or not _PATTERN.fullmatch(key):
                remedy = "write modules' names in its place, such as model.layers.0.self_attn.q_proj"
                problems.append(_problem(f"{setting} has a pattern that isn't understood, {cut(key)}", where, remedy))
                break
    return problems


def scale_of(module: str, rank: int, config: Mapping[str, Any]) -> float:
    """What PEFT multiplies B A with.

    Args:
        module: Hugging Face's name.
        rank: Its rank.
        config: One that :func:`require_plain_lora` took.
    """
    alpha = match_pattern(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def match_pattern(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first key that is, as a regular expression, the end of a module's name (PEFT's rule)."""
    for key, value in pattern.items():
        if _compiled(key).match(module):
            return value
    return default


@lru_cache(maxsize=2 * _MOST_PATTERNS)
def _compiled(key: str) -> re.Pattern[str]:
    """``(.*\\.)?(key)$`` so that it is matched in a time quadratic in the name's length at worst.

    Between repetitions ``.*`` a key has texts of a fixed length. Where one of them is found first does as well as any
    later place, so no other place is tried (the atomic groups): the last one only has to be the end.
    """
    first, *others = key.split(".*")
    if not others:
        return re.compile(rf"(?:.*\.)?{first}$")
    middle = "".join(f"(?>.*?{text})" for text in others[:-1])
    return re.compile(rf"(?>(?:|.*?\.){first}){middle}.*{others[-1]}$")


def _problem(what: str, where: str, remedy: str) -> AdapterError:
    return AdapterError(what, where=where, remedy=remedy)


def cut(value: object) -> str:
    """A value from a file as a short text in one line."""
    text = _SHORT.repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
