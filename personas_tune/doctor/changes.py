"""Settings with which a stage may fit where it doesn't, what costs least first."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from personas_tune.doctor.bases import build_network
from personas_tune.doctor.estimates import Estimate
from personas_tune.doctor.knobs import Knobs
from personas_tune.errors import PersonasTuneError
from personas_tune.training.memory_estimate import Memory, gathered_bytes

LEAST_TOKENS_PER_FORWARD = 512
N_SHARDS = (2, 4, 8)
Change = tuple[str, Knobs]  # the setting, and the knobs with it
Family = list[Change]  # the last one takes least


def first_that_fits(estimate: Estimate, knobs: Knobs, allowed: float) -> Change | None:
    """The first change with which an estimate is no more than what is allowed.

    Passes of a large base take seconds to find, so a family is passed over if its last change doesn't fit, and what
    that takes is the least that the others do.

    Args:
        estimate: Of training or evaluation.
        knobs: As they are.
        allowed: Bytes.
    """
    for family in _FAMILIES[estimate.stage](knobs):
        try:
            _, smallest = family[-1]
            if not estimate.fits(smallest, allowed):
                continue
            least = estimate.passes(smallest)
            return next(change for change in family if estimate.fits(change[1], allowed, least))
        except PersonasTuneError:  # such as a builder that has no quantised base
            continue
    return None


def gpus_to_spread_over(memory: Memory, knobs: Knobs, allowed: float) -> int | None:
    """The fewest GPUs over which FSDP can spread a base; None if so many as are tried don't do.

    Args:
        memory: What the stage takes on one.
        knobs: A quantised base's parts are not counted here: None, too.
        allowed: Bytes on each.
    """
    if knobs.is_quantised:
        return None
    gathered = gathered_bytes(build_network(knobs.sections, knobs.dtype, recompute=False))
    rest = memory.total - memory.base
    return next((n for n in N_SHARDS if rest + min(memory.base, memory.base / n + gathered) <= allowed), None)


def _training_families(knobs: Knobs) -> Iterator[Family]:
    """Cheap changes, each alone and then together; the same with the base in 4 bits."""
    cheap: list[tuple[str, dict[str, Any]]] = []
    if knobs.batch_size > 1:
        accumulate = f"batch_size=1 gradient_accumulation_steps={knobs.rows_per_step}"
        cheap.append((accumulate, {"batch_size": 1}))
    if not knobs.recompute:
        cheap.append(("enable_activation_checkpointing=true", {"recompute": True}))
    if not knobs.offload and knobs.n_adapters > 1:
        cheap.append(("training.offload_waiting=true", {"offload": True}))
    if cheap:
        alone = [(setting, replace(knobs, **change)) for setting, change in cheap]
        yield [*alone, *_together(knobs, cheap)[1:]]
    if not knobs.is_quantised:
        yield _together(knobs, [_quantised(knobs), *cheap])


def _together(knobs: Knobs, changes: Sequence[tuple[str, dict[str, Any]]]) -> Family:
    """The first change, the first two, and so on."""
    family = []
    for n in range(1, len(changes) + 1):
        change = {key: value for _, each in changes[:n] for key, value in each.items()}
        family.append((" ".join(setting for setting, _ in changes[:n]), replace(knobs, **change)))
    return family


def _evaluation_families(knobs: Knobs) -> Iterator[Family]:
    """Fewer tokens a pass; the same with the base in 4 bits."""
    smaller = []
    size = knobs.max_tokens // 2
    while size >= LEAST_TOKENS_PER_FORWARD:
        smaller.append((f"evaluation.max_tokens_per_forward={size}", replace(knobs, max_tokens=size)))
        size //= 2
    if smaller:
        yield smaller
    if not knobs.is_quantised:
        setting, change = _quantised(knobs)
        yield [(setting, replace(knobs, **change))]
        if smaller:
            yield [(f"{setting} {more}", replace(each, **change)) for more, each in smaller]


def _quantised(knobs: Knobs) -> tuple[str, dict[str, Any]]:
    """QLoRA: the base in NF4, which takes bf16 beside it."""
    model = {**knobs.sections["model"], "quantize_base": True}
    dtype = "" if knobs.dtype == "bf16" else " dtype=bf16"
    changed = {"sections": {**knobs.sections, "model": model}, "dtype": "bf16"}
    return f"{knobs.prefix}model.quantize_base=true{dtype}", changed


_FAMILIES: dict[str, Callable[[Knobs], Iterator[Family]]] = {
    "training": _training_families,
    "evaluation": _evaluation_families,
}
