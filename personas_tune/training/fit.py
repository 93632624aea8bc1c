"""Training the adapters of a bank: steps, epochs, validation."""

import math
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from personas_tune.adapters.bank import Adapter, AdapterBank
from personas_tune.adapters.sharding import in_lockstep
from personas_tune.datasets.tokens import TokenRow
from personas_tune.errors import AdapterError, ConfigError
from personas_tune.processes import Processes
from personas_tune.training.batches import plain_batch
from personas_tune.training.forward import answer_logits, answer_loss
from personas_tune.training.order import epoch_order
from personas_tune.training.schedule import Progress, move_training_state, next_in_turn
from personas_tune.training.self_check import SharingCheck, check_sharing
from personas_tune.training.shared_prefix import backward_rows
from personas_tune.training.teams import Team

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
        prefix_sharing: ``auto`` runs what a step's rows of one user have in common once; ``off`` never.
        schedule: In which order the adapters take their steps (see :func:`next_in_turn`); it changes no bit.
        offload_waiting: Keep weights and optimizer states of adapters that wait for their turn in CPU memory.
        seed: Seeds order and dropout.
    """

    epochs: int
    batch_size: int
    gradient_accumulation_steps: int
    rows_per_user: int = 1
    max_steps_per_epoch: int | None = None
    clip_grad_norm: float | None = None
    prefix_sharing: Literal["auto", "off"] = "off"
    schedule: str = "one_by_one"
    offload_waiting: bool = False
    seed: int = 0

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step."""
        return self.batch_size * self.gradient_accumulation_steps

    def steps_per_epoch(self, n_rows: int) -> int:
        """Optimizer steps of one epoch; a last, smaller step takes the rows that are left."""
        steps = -(-n_rows // self.rows_per_step)
        return steps if self.max_steps_per_epoch is None else min(steps, self.max_steps_per_epoch)

    def n_steps(self, n_rows: int) -> int:
        """Optimizer steps of a whole training."""
        return self.epochs * self.steps_per_epoch(n_rows)

    def progress(self, n_rows: int, steps_done: int) -> Progress:
        """How far an adapter with that many rows is after that many steps."""
        return Progress(steps_done, self.n_steps(n_rows), self.steps_per_epoch(n_rows))


@dataclass(frozen=True)
class StepFigures:
    """What is kept of a step, and is the same whenever the training is repeated; see :class:`StepReport`."""

    step: int
    loss: float
    learning_rate: float
    n_rows: int
    validation_loss: float | None


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
        steps_done: Optimizer steps taken so far; with the seed it says which rows come next.
        history: Figures of every step taken so far.
    """

    name: str
    rows: Sequence[TokenRow]
    prefixes: Sequence[str]
    optimizer: Optimizer
    lr_scheduler: Any | None = None
    validation_rows: Sequence[TokenRow] = ()
    steps_done: int = 0
    history: list[StepFigures] = field(default_factory=list)
    _order: tuple[int, list[int]] | None = field(default=None, repr=False)

    @property
    def adapter(self) -> str:
        """The adapter's name within its set."""
        return self.name.rpartition("/")[2]

    @property
    def record(self) -> dict[str, Any]:
        """What ``training.json`` says of it."""
        return {"rows": len(self.rows), "steps": self.steps_done, "validation_losses": self.validation_losses}

    @property
    def validation_losses(self) -> list[float]:
        """One per epoch that is done; none without validation rows."""
        return [step.validation_loss for step in self.history if step.validation_loss is not None]

    def next_rows(self, settings: TrainingSettings) -> tuple[int, list[int]]:
        """The epoch of the next step, and the indices of its rows."""
        epoch, step = divmod(self.steps_done, settings.steps_per_epoch(len(self.rows)))
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self.order_of(epoch, settings))
        size = settings.rows_per_step
        return epoch, self._order[1][step * size : (step + 1) * size]

    def order_of(self, epoch: int, settings: TrainingSettings) -> list[int]:
        """The order of all rows in an epoch, as indices."""
        return epoch_order(
            self.prefixes, epoch=epoch, rows_per_user=settings.rows_per_user, seed=settings.seed, adapter=self.name
        )

    def ends_epoch(self, settings: TrainingSettings) -> bool:
        """Whether the last step that was taken is the last of an epoch."""
        return self.steps_done % settings.steps_per_epoch(len(self.rows)) == 0


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did.

    Args:
        adapter: Whose step it was.
        step: 1-based, of this adapter.
        epoch: 0-based.
        n_rows: Rows that it took.
        loss: Mean per answer token of those rows, before the step.
        learning_rate: That of the step.
        grad_norm: Before clipping; None if nothing is clipped.
        seconds: Spent on the step, validation left out.
        validation_loss: Measured after it, if it ended an epoch and there are validation rows.
    """

    adapter: str
    step: int
    epoch: int
    n_rows: int
    loss: float
    learning_rate: float
    grad_norm: float | None
    seconds: float
    validation_loss: float | None = None

    @property
    def figures(self) -> StepFigures:
        """What a repeated training would report, too."""
        return StepFigures(self.step, self.loss, self.learning_rate, self.n_rows, self.validation_loss)


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


def train_steps(
    model: nn.Module,
    bank: AdapterBank,
    jobs: Sequence[AdapterJob],
    loss_fn: nn.Module,
    settings: TrainingSettings,
    pad_id: int,
    team: Team | None = None,
) -> Iterator[StepReport]:
    """Train every adapter from where its job stands to the end, a report per optimizer step.

    While a report is out nothing is half done: it is the moment to save a checkpoint, or to stop.

    Args:
        model: The base with the bank's working parameters.
        bank: Holds the adapters that the jobs name.
        jobs: One per adapter.
        loss_fn: A torchtune or torch loss.
        settings: The same for all adapters.
        pad_id: Token that fills up short rows.
        team: The processes that train these adapters together; None for this one alone.

    Raises:
        AdapterError: If a loss isn't finite; nothing of that step is kept.
    """
    team = team or Team()
    largest_first = _largest_first(jobs)
    n_steps = [settings.n_steps(len(job.rows)) for job in largest_first]
    at_work: AdapterJob | None = None
    while True:
        turn = next_in_turn([job.steps_done for job in largest_first], n_steps, settings.schedule)
        if turn is None:
            return
        job = largest_first[turn]
        if settings.offload_waiting and job is not at_work:
            _take_turns(bank, at_work, job)
            at_work = job
        report = _train_step(model, bank, job, loss_fn, settings, pad_id, team)
        if job.validation_rows and job.ends_epoch(settings):
            loss = validation_loss(model, bank, job, loss_fn, settings.batch_size, pad_id, team)
            report = replace(report, validation_loss=loss)
        job.history.append(report.figures)
        yield report


def settle_sharing(
    model: nn.Module,
    bank: AdapterBank,
    jobs: Sequence[AdapterJob],
    loss_fn: nn.Module,
    settings: TrainingSettings,
    pad_id: int,
    processes: Processes | None = None,
) -> TrainingSettings:
    """The settings, without shared prefixes if these turn out to give other gradients in one of the processes.

    Every process calls it; the first one warns.
    """
    if settings.prefix_sharing == "off":
        return settings
    processes = processes or Processes()
    check = check_first_group(model, bank, jobs, loss_fn, settings, pad_id)
    problems = [problem for problem in processes.gather(check.problem) if problem is not None]
    if not problems:
        return settings
    if processes.is_first:
        line = f"{problems[0]}; training goes on without sharing, at several times the cost"
        warnings.warn(line, stacklevel=1)
    return replace(settings, prefix_sharing="off")


def check_first_group(
    model: nn.Module,
    bank: AdapterBank,
    jobs: Sequence[AdapterJob],
    loss_fn: nn.Module,
    settings: TrainingSettings,
    pad_id: int,
) -> SharingCheck:
    """Compare sharing with separate rows on the first rows that share a prefix; see :func:`check_sharing`.

    On jobs that have taken no step it finds the same whenever it is called, so a resumed training
    goes the way of the unbroken one.
    """
    model.train()
    for job in _largest_first(jobs):
        order, size = job.order_of(0, settings), settings.rows_per_step
        for chosen in _chunks(order[: size * settings.steps_per_epoch(len(order))], size):
            rows, names = [job.rows[index] for index in chosen], [job.prefixes[index] for index in chosen]
            with bank.use(job.name):
                check = check_sharing(model, rows, names, loss_fn, pad_id=pad_id, branches_per_pass=settings.batch_size)
            if check.is_done:
                return check
    return SharingCheck()


def _largest_first(jobs: Sequence[AdapterJob]) -> list[AdapterJob]:
    return sorted(jobs, key=lambda job: -len(job.rows))


def put_to_wait(bank: AdapterBank, job: AdapterJob) -> None:
    """Move an adapter's weights and optimizer state to CPU memory."""
    move_training_state(bank[job.name].masters.values(), job.optimizer, torch.device("cpu"))


def _take_turns(bank: AdapterBank, last: AdapterJob | None, following: AdapterJob) -> None:
    if last is not None:
        put_to_wait(bank, last)
    move_training_state(bank[following.name].masters.values(), following.optimizer, bank.device)


def _train_step(
    model: nn.Module,
    bank: AdapterBank,
    job: AdapterJob,
    loss_fn: nn.Module,
    settings: TrainingSettings,
    pad_id: int,
    team: Team,
) -> StepReport:
    """Take one optimizer step.

    Its loss is the mean over the answer tokens of all its rows, however they are cut into forward passes
    and shared out among processes.
    The optimizer steps within the adapter's own random stream, too: some round at random.
    """
    started = time.perf_counter()
    epoch, chosen = job.next_rows(settings)
    n_tokens = sum(len(job.rows[index].answer) for index in chosen)
    mine = team.share(chosen)
    model.train()
    with bank.use(job.name) as adapter:
        total = backward_rows(
            model,
            [job.rows[index] for index in mine],
            [job.prefixes[index] for index in mine],
            loss_fn,
            pad_id=pad_id,
            sharing=settings.prefix_sharing,
            branches_per_pass=settings.batch_size,
            on_gradients=lambda: bank.take_gradients(1 / n_tokens),
            agree=team.agree,
        )
        loss = team.add_up(adapter.masters.values(), total) / n_tokens
        if not math.isfinite(loss):
            job.optimizer.zero_grad(set_to_none=True)
            raise AdapterError(
                f"loss is {loss} at step {job.steps_done + 1}", where=f"adapter {job.name}", remedy="lower optimizer.lr"
            )
        learning_rate, grad_norm = _optimize(job, adapter, settings) if team.leads else (0.0, None)
        team.spread(adapter.masters.values())
    job.optimizer.zero_grad(set_to_none=True)
    job.steps_done += 1
    seconds = time.perf_counter() - started
    return StepReport(job.name, job.steps_done, epoch, len(chosen), loss, learning_rate, grad_norm, seconds)


def _optimize(job: AdapterJob, adapter: Adapter, settings: TrainingSettings) -> tuple[float, float | None]:
    """Let the optimizer and the schedule take a step; gives its learning rate, and the gradients' norm if clipped."""
    grad_norm = None
    if settings.clip_grad_norm is not None:
        grad_norm = float(nn.utils.clip_grad_norm_(adapter.masters.values(), settings.clip_grad_norm))
    learning_rate = float(job.optimizer.param_groups[0]["lr"])
    job.optimizer.step()
    if job.lr_scheduler is not None:
        job.lr_scheduler.step()
    return learning_rate, grad_norm


@torch.no_grad()
def validation_loss(
    model: nn.Module,
    bank: AdapterBank,
    job: AdapterJob,
    loss_fn: nn.Module,
    batch_size: int,
    pad_id: int,
    team: Team | None = None,
) -> float:
    """Mean loss per answer token on the job's validation rows, dropout off."""
    team = team or Team()
    model.eval()
    total, n_tokens = 0.0, 0
    with bank.use(job.name), in_lockstep(model):
        for rows in _chunks(team.share(job.validation_rows), batch_size):
            batch = plain_batch(rows, pad_id).to(bank.device)
            total += answer_loss(loss_fn, answer_logits(model, batch), batch.targets).item() * len(batch.targets)
            n_tokens += len(batch.targets)
    total, n_all = team.sums([total, n_tokens])
    return total / n_all


def _chunks(rows: Sequence[Row], size: int) -> Iterable[Sequence[Row]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))
