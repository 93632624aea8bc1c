"""Training the adapters of a bank: steps, epochs, validation."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from personas_tune.adapters.bank import AdapterBank
from personas_tune.datasets.tokens import TokenRow
from personas_tune.errors import AdapterError, ConfigError
from personas_tune.training.forward import AnswerBatch, answer_logits, answer_loss, plain_batch, shared_batch
from personas_tune.training.order import epoch_order

Row = TypeVar("Row")


@dataclass(frozen=True)
class TrainingSettings:
    """How every adapter of a run is trained; names and meanings are torchtune's.

    Args:
        epochs: Passes over an adapter's rows.
        batch_size: Rows of one forward pass.
        gradient_accumulation_steps: Forward passes of one optimizer step.
        rows_per_user: Length of the runs of one user's rows (see :func:`epoch_order`).
        max_steps_per_epoch: Optimizer steps after which an epoch ends; None for all rows.
        clip_grad_norm: Largest gradient norm; None for no limit.
        share_prefixes: Run what a batch's rows of one user have in common once.
        seed: Seeds order and dropout.
    """

    epochs: int
    batch_size: int
    gradient_accumulation_steps: int
    rows_per_user: int = 1
    max_steps_per_epoch: int | None = None
    clip_grad_norm: float | None = None
    share_prefixes: bool = False
    seed: int = 0

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step."""
        return self.batch_size * self.gradient_accumulation_steps

    def steps_per_epoch(self, n_rows: int) -> int:
        """Optimizer steps of one epoch; a last, smaller step takes the rows that are left."""
        steps = -(-n_rows // self.rows_per_step)
        return steps if self.max_steps_per_epoch is None else min(steps, self.max_steps_per_epoch)


@dataclass
class AdapterJob:
    """One adapter of the bank with all that its training needs.

    Args:
        name: The adapter's name in the bank.
        rows: Its training rows.
        prefixes: Names what each row begins with (user and profile); rows of equal names may share it.
        optimizer: Steps its master weights.
        lr_scheduler: Advanced after each step; None for a constant rate.
        validation_rows: Rows whose loss is measured after each epoch.
    """

    name: str
    rows: Sequence[TokenRow]
    prefixes: Sequence[str]
    optimizer: Optimizer
    lr_scheduler: Any | None = None
    validation_rows: Sequence[TokenRow] = ()
    steps_done: int = 0
    validation_losses: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did."""

    adapter: str
    step: int
    epoch: int
    n_rows: int
    loss: float
    learning_rate: float
    grad_norm: float | None


def require_token_loss(loss_fn: nn.Module) -> None:
    """Try a loss on two tokens.

    Raises:
        ConfigError: If it doesn't take logits and target tokens, or doesn't give their mean.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            is_mean = answer_loss(loss_fn, torch.zeros(2, 3), torch.tensor([0, 1])).dim() == 0
    except Exception as error:  # any loss may be named
        is_mean = False
        reason = " ".join(str(error).split())
    else:
        reason = "it gives a value per token"
    if not is_mean:
        raise ConfigError(
            f"{type(loss_fn).__name__} is no loss of tokens ({reason})",
            where="loss",
            remedy="use torch.nn.CrossEntropyLoss or a torchtune loss",
        )


def train_epoch(
    model: nn.Module,
    bank: AdapterBank,
    job: AdapterJob,
    epoch: int,
    loss_fn: nn.Module,
    settings: TrainingSettings,
    pad_id: int,
) -> Iterator[StepReport]:
    """Train one adapter for one epoch, a report per optimizer step.

    The loss of a step is the mean over the answer tokens of all its rows, however they are cut
    into forward passes.

    Raises:
        AdapterError: If the loss isn't finite; nothing of that step is kept.
    """
    order = epoch_order(
        job.prefixes, epoch=epoch, rows_per_user=settings.rows_per_user, seed=settings.seed, adapter=job.name
    )
    size = settings.rows_per_step
    model.train()
    for step in range(settings.steps_per_epoch(len(order))):
        chosen = order[step * size : (step + 1) * size]
        yield _train_step(model, bank, job, chosen, epoch, loss_fn, settings, pad_id)


def _train_step(
    model: nn.Module,
    bank: AdapterBank,
    job: AdapterJob,
    chosen: Sequence[int],
    epoch: int,
    loss_fn: nn.Module,
    settings: TrainingSettings,
    pad_id: int,
) -> StepReport:
    n_tokens = sum(len(job.rows[index].answer) for index in chosen)
    with bank.use(job.name) as adapter:
        total = 0.0
        for part in _chunks(chosen, settings.batch_size):
            rows = [job.rows[index] for index in part]
            names = [job.prefixes[index] for index in part]
            batch = _batch_by_prefix(rows, names, pad_id) if settings.share_prefixes else plain_batch(rows, pad_id)
            total += _backward(model, batch.to(_device_of(model)), loss_fn)
            bank.take_gradients(1 / n_tokens)
    loss = total / n_tokens
    if not math.isfinite(loss):
        job.optimizer.zero_grad(set_to_none=True)
        raise AdapterError(
            f"loss is {loss} at step {job.steps_done + 1}", where=f"adapter {job.name}", remedy="lower optimizer.lr"
        )
    grad_norm = None
    if settings.clip_grad_norm is not None:
        grad_norm = float(nn.utils.clip_grad_norm_(adapter.masters.values(), settings.clip_grad_norm))
    learning_rate = float(job.optimizer.param_groups[0]["lr"])
    job.optimizer.step()
    job.optimizer.zero_grad(set_to_none=True)
    if job.lr_scheduler is not None:
        job.lr_scheduler.step()
    job.steps_done += 1
    return StepReport(job.name, job.steps_done, epoch, len(chosen), loss, learning_rate, grad_norm)


def _batch_by_prefix(rows: Sequence[TokenRow], prefixes: Sequence[str], pad_id: int) -> AnswerBatch:
    groups: dict[str, list[list[TokenRow]]] = {}
    for row, prefix in zip(rows, prefixes, strict=True):
        groups.setdefault(prefix, []).append([row])
    return shared_batch(list(groups.values()), pad_id)


def _backward(model: nn.Module, batch: AnswerBatch, loss_fn: nn.Module) -> float:
    """Add the gradients of a batch's summed loss; give that sum."""
    loss = answer_loss(loss_fn, answer_logits(model, batch), batch.targets) * len(batch.targets)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item()


@torch.no_grad()
def validation_loss(
    model: nn.Module, bank: AdapterBank, job: AdapterJob, loss_fn: nn.Module, batch_size: int, pad_id: int
) -> float:
    """Mean loss per answer token on the job's validation rows, dropout off."""
    model.eval()
    total, n_tokens = 0.0, 0
    with bank.use(job.name):
        for rows in _chunks(job.validation_rows, batch_size):
            batch = plain_batch(rows, pad_id).to(_device_of(model))
            total += answer_loss(loss_fn, answer_logits(model, batch), batch.targets).item() * len(batch.targets)
            n_tokens += len(batch.targets)
    return total / n_tokens


def train_bank(
    model: nn.Module,
    bank: AdapterBank,
    jobs: Sequence[AdapterJob],
    loss_fn: nn.Module,
    settings: TrainingSettings,
    pad_id: int,
    on_step: Callable[[StepReport], None] = lambda report: None,
    on_epoch: Callable[[AdapterJob, int], None] = lambda job, epoch: None,
) -> None:
    """Train every adapter for all epochs, one after another within an epoch, largest first.

    Args:
        model: The base with the bank's working parameters.
        bank: Holds the adapters that the jobs name.
        jobs: One per adapter.
        loss_fn: A torchtune or torch loss.
        settings: The same for all adapters.
        pad_id: Token that fills up short rows.
        on_step: Called after every optimizer step.
        on_epoch: Called after an adapter's epoch; its validation loss has been measured.
    """
    for epoch in range(settings.epochs):
        for job in sorted(jobs, key=lambda job: -len(job.rows)):
            for report in train_epoch(model, bank, job, epoch, loss_fn, settings, pad_id):
                on_step(report)
            if job.validation_rows:
                loss = validation_loss(model, bank, job, loss_fn, settings.batch_size, pad_id)
                job.validation_losses.append(loss)
            on_epoch(job, epoch)


def _chunks(rows: Sequence[Row], size: int) -> Iterable[Sequence[Row]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
