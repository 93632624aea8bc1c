"""Whether training and evaluating an experiment fit a device, and which knob to turn if not."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from personas_tune import config
from personas_tune.datasets import RatingDataset, RatingSource
from personas_tune.datasets.tokens import ChatTokenizer
from personas_tune.doctor.bases import build_network
from personas_tune.doctor.findings import Finding, State
from personas_tune.doctor.machine import GB, Device
from personas_tune.errors import PersonasTuneError
from personas_tune.training.memory_estimate import (
    CUDA_BYTES,
    Memory,
    evaluation_passes,
    held_memory,
    optimizer_state_bytes,
    training_passes,
)
from personas_tune.workspace import Workspace, read_table

if TYPE_CHECKING:
    from omegaconf import DictConfig

COMMON_GPUS_GB = (16, 24, 40, 80)
ASSUMED_TOKENS = 1024  # of a row, where no samples are there: the paper's rows have some 800
N_LOOKED_AT = 32  # rows of samples
LEAST_TOKENS_PER_FORWARD = 512
ADAMW_STATE = 8.0  # bytes a weight
N_SHARDS = (2, 4, 8)
_ONLY_OF_PASSES: dict[str, Any] = {"batch_size": 0, "recompute": False, "max_tokens": 0}
Found = TypeVar("Found")


@dataclass(frozen=True)
class Knobs:
    """What of a config decides how much memory one of its bases takes.

    Args:
        sections: The base's ``model``, ``tokenizer`` and ``checkpointer``.
        prefix: Of their keys: empty, or ``bases.NAME.``.
        dtype: Of its weights.
        recompute: ``enable_activation_checkpointing``.
        batch_size: Rows of a training pass.
        rows_per_step: Of an optimizer step.
        rows_per_user: Of a step.
        share: Whether rows share prefixes.
        offload: Whether adapters that wait do so in CPU memory.
        max_tokens: Of an evaluation pass.
        n_adapters: Of the largest set.
        n_tokens: Of a row.
        answers: The labels' answers in tokens.
    """

    sections: Mapping[str, Any]
    prefix: str
    dtype: str
    recompute: bool
    batch_size: int
    rows_per_step: int
    rows_per_user: int
    share: bool
    offload: bool
    max_tokens: int
    n_adapters: int
    n_tokens: int
    answers: Sequence[Sequence[int]]


def knobs_of(
    cfg: "DictConfig", name: str | None, chat: ChatTokenizer | None, labels: Sequence[str]
) -> tuple[Knobs, str]:
    """The knobs of a base in a config, and where the length of its rows comes from.

    Args:
        cfg: The experiment.
        name: Of the base; None for the default one.
        chat: Its tokenizer; None if it isn't there.
        labels: The rating labels.
    """
    sections = config.base_sections(cfg, name)
    n_tokens, source = _row_length(cfg, name, chat, sections["tokenizer"].get("max_seq_len"))
    knobs = Knobs(
        sections=sections,
        prefix="" if name is None else f"bases.{name}.",
        dtype=cfg.dtype,
        recompute=cfg.enable_activation_checkpointing,
        batch_size=cfg.batch_size,
        rows_per_step=cfg.batch_size * cfg.gradient_accumulation_steps,
        rows_per_user=cfg.rows_per_user,
        share=cfg.training.prefix_sharing == "auto",
        offload=cfg.training.offload_waiting,
        max_tokens=cfg.evaluation.max_tokens_per_forward,
        n_adapters=n_adapters_of(cfg, name),
        n_tokens=n_tokens,
        answers=[[n, 0] for n, _ in enumerate(labels)] if chat is None else [chat.answer_tokens(x) for x in labels],
    )
    return knobs, source


def check_memory(
    cfg: "DictConfig", name: str | None, knobs: Knobs, source: str, devices: Sequence[Device]
) -> list[Finding]:
    """How much training and evaluating on a base take, and whether that fits.

    Args:
        cfg: The experiment.
        name: Of the base; None for the default one.
        knobs: The base's.
        source: Where the length of its rows comes from.
        devices: What it may run on; empty for GPUs of common sizes.
    """
    findings: list[Finding] = []
    if any(adapter_set.base == name for adapter_set in cfg.adapter_sets.values()):
        told = f"rows of {knobs.n_tokens} tokens ({source}), batch_size {knobs.batch_size}"
        findings += _verdicts(Estimate.of_training(cfg), knobs, devices, cfg.device, told)
    if any(base_of(cfg, agent) == name for agent in cfg.agents.values()):
        told = f"{knobs.max_tokens} tokens a pass"
        findings += _verdicts(Estimate.of_evaluation(), knobs, devices, cfg.device, told)
    return findings


def base_of(cfg: "DictConfig", agent: Any) -> str | None:
    """The base of an agent: its own, or that of its adapter set."""
    name = agent.base if agent.adapters is None else cfg.adapter_sets[agent.adapters].base
    return None if name is None else str(name)


@dataclass(frozen=True)
class Estimate:
    """How the memory of a stage is found.

    Args:
        stage: Its name.
        held: What lies on the device between passes; quickly found.
        passes: Bytes of its largest pass; found in a second or some.
        changes: Settings that may make it smaller, and the knobs with them.
    """

    stage: str
    held: Callable[[Knobs], Memory]
    passes: Callable[[Knobs], int]
    changes: Callable[[Knobs], Iterator[tuple[str, Knobs]]]

    @classmethod
    def of_training(cls, cfg: "DictConfig") -> "Estimate":
        """Training with a config's optimizer."""
        state_bytes = _state_bytes(cfg)
        held = _found_once(lambda knobs: _held(knobs, state_bytes), **_ONLY_OF_PASSES)
        return cls("training", held, _found_once(_training_passes, offload=False, n_adapters=0), _training_changes)

    @classmethod
    def of_evaluation(cls) -> "Estimate":
        """Evaluation of a set's adapters."""
        held = _found_once(lambda knobs: _held(knobs, None), **_ONLY_OF_PASSES)
        return cls("evaluation", held, _found_once(_evaluation_passes, n_adapters=0), _evaluation_changes)

    def memory(self, knobs: Knobs) -> Memory:
        """All of it."""
        return replace(self.held(knobs), passes=self.passes(knobs))

    def fits(self, knobs: Knobs, allowed: float) -> bool:
        """Whether it is no more than that."""
        return self.held(knobs).total <= allowed and self.memory(knobs).total <= allowed


def _found_once(find: Callable[[Knobs], Found], **without_effect: Any) -> Callable[[Knobs], Found]:
    """The same function, which finds nothing twice where knobs differ only in what has no effect on it."""
    known: list[tuple[Knobs, Found]] = []

    def look_up(knobs: Knobs) -> Found:
        key = replace(knobs, **without_effect)
        for each, found in known:
            if each == key:
                return found
        known.append((key, find(knobs)))
        return known[-1][1]

    return look_up


def _verdicts(estimate: Estimate, knobs: Knobs, devices: Sequence[Device], device: str, told: str) -> Iterator[Finding]:
    is_gpu, memory, stage = device.startswith("cuda"), estimate.memory(knobs), estimate.stage
    yield Finding("ok", f"{stage}: {_told(memory, is_gpu)}; {told}, {knobs.n_adapters} adapters")
    # A GPU that isn't here is not missed: the sizes are there to choose one.
    rooms = devices or [Device(f"a GPU of {size} GB", size * GB, True) for size in COMMON_GPUS_GB]
    fitting = [room for room in rooms if memory.total <= _allowed(room)]
    for room in rooms:
        if room not in fitting:
            state: State = "missing" if devices else "note"
            mend = _what_fits(estimate, knobs, room, may_shard=is_gpu)
            yield Finding(state, f"{stage} does not fit {_named(room)}", mend)
    if fitting:
        larger = "" if devices or len(fitting) == 1 else " and larger ones"
        yield Finding("ok", f"{stage} fits {_named(fitting[0])}{larger}")


def _allowed(room: Device) -> float:
    return room.free - (CUDA_BYTES if room.is_gpu else 0)


def _named(room: Device) -> str:
    return room.name if room.name.startswith("a GPU of ") else f"{room.name}, {_size(room.free)} free"


def _told(memory: Memory, is_gpu: bool) -> str:
    parts = {
        "base": memory.base,
        "adapters": memory.adapters,
        "optimizer": memory.optimizer,
        "working copy": memory.working,
        "passes": memory.passes,
        "CUDA itself": CUDA_BYTES if is_gpu else 0,
    }
    total = memory.total + parts["CUDA itself"]
    return f"{_size(total)} = " + " + ".join(f"{name} {_size(size)}" for name, size in parts.items() if size)


def _size(n_bytes: float) -> str:
    if n_bytes < GB / 10:
        return f"{n_bytes / 1e6:.1f} MB"
    return f"{n_bytes / GB:.{1 if n_bytes >= 10 * GB else 2}f} GB"


def _what_fits(estimate: Estimate, knobs: Knobs, room: Device, *, may_shard: bool) -> str:
    """The first change with which the estimate fits."""
    cuda = CUDA_BYTES if room.is_gpu else 0
    for setting, changed in estimate.changes(knobs):
        try:
            if estimate.fits(changed, _allowed(room)):
                return f"set {setting}: {_size(estimate.memory(changed).total + cuda)}"
        except PersonasTuneError:  # such as a builder that has no quantised base
            continue
    memory = estimate.memory(knobs)
    for n in N_SHARDS if may_shard else ():
        if memory.total - memory.base + memory.base / n <= _allowed(room):
            return f"spread the base over {n} GPUs: tune run --nproc_per_node {n} ... parallel=fsdp"
    return "take a smaller base"


def _training_changes(knobs: Knobs) -> Iterator[tuple[str, Knobs]]:
    """Changes to try, what costs least first, then all of these together, then with the base in 4 bits."""
    cheap: list[tuple[str, dict[str, Any]]] = []
    if knobs.batch_size > 1:
        accumulate = f"batch_size=1 gradient_accumulation_steps={knobs.rows_per_step}"
        cheap.append((accumulate, {"batch_size": 1}))
    if not knobs.recompute:
        cheap.append(("enable_activation_checkpointing=true", {"recompute": True}))
    if not knobs.offload and knobs.n_adapters > 1:
        cheap.append(("training.offload_waiting=true", {"offload": True}))
    yield from _tried(knobs, cheap)
    if not _is_quantised(knobs):
        yield from _tried(knobs, [_quantised(knobs), *cheap])


def _tried(knobs: Knobs, changes: Sequence[tuple[str, dict[str, Any]]]) -> Iterator[tuple[str, Knobs]]:
    """Each change alone, then the first two, three, ... together."""
    first_is_needed = bool(changes) and "sections" in changes[0][1]
    for change in changes[:1] if first_is_needed else changes:
        yield change[0], replace(knobs, **change[1])
    for n in range(2, len(changes) + 1):
        together = {key: value for _, each in changes[:n] for key, value in each.items()}
        yield " ".join(setting for setting, _ in changes[:n]), replace(knobs, **together)


def _evaluation_changes(knobs: Knobs) -> Iterator[tuple[str, Knobs]]:
    smaller = []
    size = knobs.max_tokens // 2
    while size >= LEAST_TOKENS_PER_FORWARD:
        smaller.append((f"evaluation.max_tokens_per_forward={size}", replace(knobs, max_tokens=size)))
        size //= 2
    yield from smaller
    if not _is_quantised(knobs):
        setting, change = _quantised(knobs)
        for more, changed in [("", knobs), *smaller]:
            yield f"{setting} {more}".strip(), replace(changed, **change)


def _is_quantised(knobs: Knobs) -> bool:
    model = knobs.sections["model"]
    return bool(model.get("quantize_base")) or ".qlora_" in str(model["_component_"])


def _quantised(knobs: Knobs) -> tuple[str, dict[str, Any]]:
    """QLoRA: the base in NF4, which takes bf16 beside it."""
    model = {**knobs.sections["model"], "quantize_base": True}
    dtype = "" if knobs.dtype == "bf16" else " dtype=bf16"
    changed = {"sections": {**knobs.sections, "model": model}, "dtype": "bf16"}
    return f"{knobs.prefix}model.quantize_base=true{dtype}", changed


def _held(knobs: Knobs, state_bytes: float | None) -> Memory:
    """Between passes of a training with so many bytes of optimizer state a weight, or of an evaluation for None."""
    network = build_network(knobs.sections, knobs.dtype, recompute=False)
    is_training = state_bytes is not None
    n_adapters = 1 if is_training and knobs.offload else knobs.n_adapters
    return held_memory(network, n_adapters=n_adapters, state_bytes=state_bytes or 0.0, trains=is_training)


def _training_passes(knobs: Knobs) -> int:
    from torch import nn

    return training_passes(
        build_network(knobs.sections, knobs.dtype, recompute=knobs.recompute),
        batch_size=knobs.batch_size,
        rows_per_user=knobs.rows_per_user,
        n_tokens=knobs.n_tokens,
        share=knobs.share,
        loss_fn=nn.CrossEntropyLoss(),
    )


def _evaluation_passes(knobs: Knobs) -> int:
    return evaluation_passes(
        build_network(knobs.sections, knobs.dtype, recompute=False),
        max_tokens=knobs.max_tokens,
        n_tokens=knobs.n_tokens,
        answers=knobs.answers,
    )


def _state_bytes(cfg: "DictConfig") -> float:
    """Of torch's own optimizers, what they keep in truth; others are taken for AdamW."""
    if cfg.optimizer is not None and not str(cfg.optimizer.get("_component_")).startswith("torch.optim."):
        return ADAMW_STATE
    try:
        return optimizer_state_bytes(
            lambda weights: config.instantiate(cfg, "optimizer", weights, default="torch.optim.AdamW", lr=3e-4)
        )
    except (PersonasTuneError, RuntimeError, TypeError):  # some can't step on a CPU, or want to be given a loss
        return ADAMW_STATE


def n_adapters_of(cfg: "DictConfig", name: str | None) -> int:
    """Adapters of the largest set of a base; as many as there are personas, if these are found already."""
    of_base = [each for each in cfg.adapter_sets.values() if each.base == name]
    if not any(each.per == "persona" for each in of_base):
        return 1 if of_base else 0
    try:
        found = read_table(Workspace.at(cfg.output_dir).personas, ("persona",))
        return len(set(found.column("persona").to_pylist()))
    except PersonasTuneError:
        return int(cfg.personas.k_max if cfg.personas.k == "elbow" else cfg.personas.k)


def _row_length(cfg: "DictConfig", name: str | None, chat: ChatTokenizer | None, budget: int | None) -> tuple[int, str]:
    """How many tokens a row has, and how that is known."""
    if chat is not None:
        try:
            source = RatingSource(Workspace.at(cfg.output_dir).root)
            samples = source.samples("train")
            chosen = samples[:: max(1, len(samples) // N_LOOKED_AT)][:N_LOOKED_AT]
            rows = RatingDataset(chat, source, chosen, "both").rows
            return max(len(row.tokens) for row in rows), f"the longest of {len(rows)}"
        except (PersonasTuneError, ValueError):  # no samples yet
            pass
    longest = min(each for each in (ASSUMED_TOKENS, budget) if each)
    return longest, "assumed, no samples yet" if longest == ASSUMED_TOKENS else "tokenizer.max_seq_len"
