"""What of a config decides how much memory one of its bases takes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from personas_tune import config
from personas_tune.datasets import RatingDataset, RatingSource
from personas_tune.datasets.tokens import ChatTokenizer
from personas_tune.errors import PersonasTuneError
from personas_tune.training.sets import ALL_USERS
from personas_tune.workspace import Workspace, read_table

if TYPE_CHECKING:
    from omegaconf import DictConfig

ASSUMED_TOKENS = 1024  # of a row, where no samples are there: the paper's rows have some 800
N_LOOKED_AT = 32  # rows of samples


@dataclass(frozen=True)
class Knobs:
    """What of a config decides how much memory a stage takes on one of its bases.

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
        on_gpu: Whether ``device`` is one.
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
    on_gpu: bool

    @property
    def is_quantised(self) -> bool:
        """Whether the base is in NF4."""
        model = self.sections["model"]
        return bool(model.get("quantize_base")) or ".qlora_" in str(model["_component_"])


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
    n_tokens, source = _row_length(cfg, chat, sections["tokenizer"].get("max_seq_len"))
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
        n_adapters=most_adapters(cfg, sets_of(cfg, name)),
        n_tokens=n_tokens,
        answers=[[n, 0] for n, _ in enumerate(labels)] if chat is None else [chat.answer_tokens(x) for x in labels],
        on_gpu=cfg.device.startswith("cuda"),
    )
    return knobs, source


def sets_of(cfg: "DictConfig", name: str | None) -> dict[str, Any]:
    """The adapter sets of a base, imported ones too."""
    return {key: each for key, each in cfg.adapter_sets.items() if each.base == name}


def trained_sets_of(cfg: "DictConfig", name: str | None) -> dict[str, Any]:
    """The adapter sets of a base that are trained, not imported."""
    return {key: each for key, each in sets_of(cfg, name).items() if each.peft is None}


def most_adapters(cfg: "DictConfig", sets: Mapping[str, Any]) -> int:
    """Adapters of the largest of some sets."""
    return max((len(adapters_of(cfg, each)) for each in sets.values()), default=0)


def adapters_of(cfg: "DictConfig", adapter_set: Any) -> list[str]:
    """The names of a set's adapters: one per persona, of those that were found or else are asked for."""
    if adapter_set.per == "all":
        return [ALL_USERS]
    try:
        found = read_table(Workspace.at(cfg.output_dir).personas, ("persona",))
        return [str(persona) for persona in sorted(set(found.column("persona").to_pylist()))]
    except PersonasTuneError:
        return [str(n) for n in range(cfg.personas.k_max if cfg.personas.k == "elbow" else cfg.personas.k)]


def _row_length(cfg: "DictConfig", chat: ChatTokenizer | None, budget: int | None) -> tuple[int, str]:
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
