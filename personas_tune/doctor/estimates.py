"""How much memory training and evaluating take with given knobs; nothing is found twice."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from personas_tune import config
from personas_tune.doctor.bases import build_network
from personas_tune.doctor.knobs import Knobs
from personas_tune.errors import PersonasTuneError
from personas_tune.training.memory_estimate import (
    Memory,
    evaluation_passes,
    held_memory,
    optimizer_state_bytes,
    optimizer_step_bytes,
    training_passes,
)

if TYPE_CHECKING:
    from omegaconf import DictConfig

ADAMW_STATE = 8.0  # bytes a weight
_ONLY_OF_PASSES: dict[str, Any] = {"batch_size": 0, "recompute": False, "max_tokens": 0}
Found = TypeVar("Found")


@dataclass(frozen=True)
class Estimate:
    """How the memory of a stage is found.

    Args:
        stage: Its name.
        held: What lies on the device between passes; quickly found.
        passes: Bytes of its largest pass; found in a second or some.
    """

    stage: str
    held: Callable[[Knobs], Memory]
    passes: Callable[[Knobs], int]

    @classmethod
    def of_training(cls, cfg: "DictConfig") -> "Estimate":
        """Training with a config's optimizer."""
        state_bytes = _state_bytes(cfg)
        held = _found_once(lambda knobs: _held(knobs, state_bytes), **_ONLY_OF_PASSES)
        passes = _found_once(lambda knobs: _training_passes(knobs, cfg), offload=False, n_adapters=0)
        return cls("training", held, passes)

    @classmethod
    def of_evaluation(cls) -> "Estimate":
        """Evaluation of a set's adapters."""
        held = _found_once(lambda knobs: _held(knobs, None), **_ONLY_OF_PASSES)
        return cls("evaluation", held, _found_once(_evaluation_passes, n_adapters=0))

    def memory(self, knobs: Knobs) -> Memory:
        """All of it."""
        return replace(self.held(knobs), passes=self.passes(knobs))

    def fits(self, knobs: Knobs, allowed: float, least: int = 0) -> bool:
        """Whether it is no more than that.

        Args:
            knobs: With which.
            allowed: Bytes.
            least: What passes are known to take at least: with these too many, they are not run.
        """
        return self.held(knobs).total + least <= allowed and self.memory(knobs).total <= allowed


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


def _held(knobs: Knobs, state_bytes: float | None) -> Memory:
    """Between passes of a training with so many bytes of optimizer state a weight, or of an evaluation for None."""
    network = build_network(knobs.sections, knobs.dtype, recompute=False)
    is_training = state_bytes is not None
    n_adapters = 1 if is_training and knobs.offload else knobs.n_adapters
    return held_memory(network, n_adapters=n_adapters, state_bytes=state_bytes or 0.0, trains=is_training)


def _training_passes(knobs: Knobs, cfg: "DictConfig") -> int:
    """The most that a pass or the optimizer's step takes."""
    network = build_network(knobs.sections, knobs.dtype, recompute=knobs.recompute)
    passes = training_passes(
        network,
        batch_size=knobs.batch_size,
        rows_per_user=knobs.rows_per_user,
        n_tokens=knobs.n_tokens,
        share=knobs.share,
        loss_fn=nn.CrossEntropyLoss(),
    )
    return max(passes, _step_bytes(cfg, network, on_gpu=knobs.on_gpu))


def _evaluation_passes(knobs: Knobs) -> int:
    return evaluation_passes(
        build_network(knobs.sections, knobs.dtype, recompute=False),
        max_tokens=knobs.max_tokens,
        n_tokens=knobs.n_tokens,
        answers=knobs.answers,
    )


def _state_bytes(cfg: "DictConfig") -> float:
    """Of torch's own optimizers, what they keep in truth; others are taken for AdamW."""
    if not _is_torchs_own(cfg):
        return ADAMW_STATE
    try:
        return optimizer_state_bytes(lambda weights: _optimizer(cfg, weights))
    except (PersonasTuneError, RuntimeError, TypeError):  # some can't step on a CPU, or want to be given a loss
        return ADAMW_STATE


def _step_bytes(cfg: "DictConfig", network: nn.Module, *, on_gpu: bool) -> int:
    """Of torch's own optimizers, what a step takes in truth; of others nothing is known."""
    if not _is_torchs_own(cfg):
        return 0
    try:
        return optimizer_step_bytes(network, lambda weights: _optimizer(cfg, weights), on_gpu=on_gpu)
    except (PersonasTuneError, RuntimeError, TypeError, NotImplementedError):  # fused steps take nothing
        return 0


def _is_torchs_own(cfg: "DictConfig") -> bool:
    return cfg.optimizer is None or str(cfg.optimizer.get("_component_")).startswith("torch.optim.")


def _optimizer(cfg: "DictConfig", weights: list[nn.Parameter]) -> torch.optim.Optimizer:
    made: torch.optim.Optimizer = config.instantiate(cfg, "optimizer", weights, default="torch.optim.AdamW", lr=3e-4)
    return made
