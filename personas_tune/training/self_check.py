"""A look before a run: do shared prefixes give the gradients of separate rows here?

Wrong sharing is silent: the loss falls all the same, towards something else. What could break it lies
outside of this package: a model with attention of its own, a kernel, a compiler.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from personas_tune.datasets.tokens import TokenRow
from personas_tune.training.batches import Plan, bundles, group_rows, plain_batch, plan_round
from personas_tune.training.shared_prefix import backward_passes, obstacle

# Of the gradients' norm. In fp32 the two ways differ by 1e-6, from adding in another order. In bf16 every
# activation is rounded to 2^-9 of itself: they differ by 0.6 % at 2 layers and 1 % at 12, and trained models
# may enlarge it. A position off by one makes 15 %, a lost gradient 50 %; smaller faults need the fp32 tests.
TOLERANCE, HALF_TOLERANCE = 1e-5, 5e-2


@dataclass(frozen=True)
class SharingCheck:
    """What a check found.

    Args:
        n_rows: How many rows were compared; 0 if none of them share anything.
        difference: The larger one of loss and gradients, relative to the plain path's.
        tolerance: What rounding may do.
        obstacle: Why this model's prefixes can't be shared; None if they can.
    """

    n_rows: int = 0
    difference: float = 0.0
    tolerance: float = 0.0
    obstacle: str | None = None

    @property
    def is_done(self) -> bool:
        """Whether there was anything to compare, or to find in the way."""
        return self.n_rows > 0 or self.obstacle is not None

    @property
    def problem(self) -> str | None:
        """Why prefixes must not be shared; None if they may."""
        if self.obstacle is not None:
            return f"the model's prefixes can't be shared: {self.obstacle}"
        if self.difference <= self.tolerance:
            return None
        return (
            f"with shared prefixes, loss or gradients of {self.n_rows} rows differ from those of separate rows "
            f"by {self.difference:.1e}; rounding explains {self.tolerance:.0e}"
        )


def check_sharing(
    model: nn.Module,
    rows: Sequence[TokenRow],
    names: Sequence[str],
    loss_fn: nn.Module,
    *,
    pad_id: int,
    branches_per_pass: int,
) -> SharingCheck:
    """Compare loss and gradients of the first rows that share a prefix, dropout off, with and without sharing.

    It leaves random states, gradients (which must be None) and the model as they were.

    Args:
        model: The base with the working copy of an adapter.
        rows: Of one optimizer step.
        names: As for :func:`backward_rows`.
        loss_fn: As for :func:`backward_rows`.
        pad_id: Token that fills up short rows.
        branches_per_pass: As in training; some more rows are compared, so that there is a second pass.
    """
    if (reason := obstacle(model)) is not None:
        return SharingCheck(obstacle=reason)
    groups, _ = group_rows(rows, names)
    if not groups:
        return SharingCheck()
    together = next(bundles([len(group) for group in groups], branches_per_pass))
    compared = [group[: branches_per_pass + 1] for group in groups[together.start : together.stop]]
    shared = plan_round(compared, branches_per_pass, pad_id)
    plain = [plain_batch([row], pad_id) for group in compared for row in group]
    with _dropout_off(model):
        expected, found = _measure(model, [*plain], loss_fn), _measure(model, [shared], loss_fn)
    difference = max(_difference(a, b) for a, b in zip(found, expected, strict=True))
    tolerance = TOLERANCE if next(model.parameters()).dtype == torch.float32 else HALF_TOLERANCE
    return SharingCheck(len(plain), difference, tolerance)


def _measure(model: nn.Module, plan: Plan, loss_fn: nn.Module) -> tuple[Tensor, Tensor]:
    """Loss, and all gradients in one vector; summed over the passes in fp32, as training does."""
    sums: dict[nn.Parameter, Tensor] = {}

    def take() -> None:
        for weight in model.parameters():
            if weight.grad is not None:
                sums[weight] = sums.get(weight, torch.zeros(())) + _whole(weight.grad).flatten().float().cpu()
                weight.grad = None

    loss = backward_passes(model, plan, loss_fn, take)
    return torch.tensor(loss), torch.cat([sums[weight] for weight in model.parameters() if weight in sums])


def _whole(gradient: Tensor) -> Tensor:
    return torch.as_tensor(gradient.full_tensor()) if isinstance(gradient, DTensor) else gradient


def _difference(found: Tensor, expected: Tensor) -> float:
    apart = torch.linalg.vector_norm(found.double() - expected.double())
    return float(apart / torch.linalg.vector_norm(expected.double()).clamp_min(1e-30))


@contextmanager
def _dropout_off(model: nn.Module) -> Iterator[None]:
    """Nothing is drawn at random, so no random state moves."""
    layers = [module for module in model.modules() if isinstance(module, nn.Dropout) and module.training]
    for layer in layers:
        layer.eval()
    try:
        yield
    finally:
        for layer in layers:
            layer.train()
