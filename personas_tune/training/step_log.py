"""Showing, logging and keeping the steps of a training."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import torch
from torchtune import training
from tqdm import tqdm

from personas_tune.training.fit import StepFigures, StepReport
from personas_tune.training.schedule import Progress


def losses_table(histories: Mapping[str, Sequence[StepFigures]]) -> pa.Table:
    """``losses.parquet``: a row for each step of each adapter, in the order given."""
    steps = [(adapter, figures) for adapter, history in histories.items() for figures in history]
    return pa.table(
        {
            "adapter": pa.array([adapter for adapter, _ in steps], pa.string()),
            "step": pa.array([figures.step for _, figures in steps], pa.int32()),
            "loss": pa.array([figures.loss for _, figures in steps], pa.float64()),
            "learning_rate": pa.array([figures.learning_rate for _, figures in steps], pa.float64()),
            "n_rows": pa.array([figures.n_rows for _, figures in steps], pa.int32()),
            "validation_loss": pa.array([figures.validation_loss for _, figures in steps], pa.float64()),
        }
    )


def profiled(steps: Iterator[StepReport], profiler: Any) -> Iterator[StepReport]:
    """The same steps; a torchtune profiler is told of each."""
    for report in steps:
        profiler.step()
        yield report


class StepLog:
    """Shows the steps of every process on the screen, and logs them; in the first process.

    Args:
        title: What is trained.
        course: How far each team is when the run begins.
        logger: A torchtune metric logger, which is closed at the end; None in the other processes.
        every: Every how many steps their figures are logged; validation losses always are.
        memory_of: The GPU whose memory is logged, too; None for none.
    """

    def __init__(
        self,
        title: str,
        course: Sequence[Sequence[Progress]],
        logger: Any | None,
        *,
        every: int = 1,
        memory_of: torch.device | None = None,
    ) -> None:
        adapters = [progress for of_team in course for progress in of_team]
        n_steps = sum(progress.n_steps for progress in adapters)
        self._n_done = sum(progress.steps_done for progress in adapters)
        self._title, self._logger, self._every, self._memory_of = title, logger, every, memory_of
        self._rows: Counter[str] = Counter()
        self._seconds: Counter[str] = Counter()
        self._started = time.perf_counter()
        self._bar = tqdm(
            total=n_steps, initial=self._n_done, desc=f"train {title}", unit="step", disable=logger is None
        )

    def __enter__(self) -> "StepLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self._logger is not None:
            self._logger.close()

    def add(self, report: StepReport) -> None:
        """Take up a step."""
        self._n_done += 1
        self._rows[report.adapter] += report.n_rows
        self._seconds[report.adapter] += report.seconds  # type: ignore[assignment]
        self._log(report)
        self._bar.update(1)
        self._bar.set_postfix_str(f"{report.adapter} loss {report.loss:.3f}")
        if report.validation_loss is not None:
            self._bar.write(f"{report.adapter} epoch {report.epoch + 1}: validation loss {report.validation_loss:.4f}")

    def summary(self) -> str:
        """Rows per second of all processes, and each adapter's seconds, validation left out of these."""
        if not self._seconds:  # resumed after the last step
            return "no step was left"
        rate = self._rows.total() / (time.perf_counter() - self._started)
        each = ", ".join(f"{adapter.rpartition('/')[2]} {spent:.1f} s" for adapter, spent in self._seconds.items())
        return f"{rate:.1f} rows/s; {each}"

    def _log(self, report: StepReport) -> None:
        assert self._logger is not None
        if report.validation_loss is not None:
            self._logger.log(f"validation_loss/{report.adapter}", report.validation_loss, step=self._n_done)
        if self._n_done % self._every:
            return
        metrics: dict[str, float] = {
            f"loss/{report.adapter}": report.loss,
            "lr": report.learning_rate,
            "rows_per_second": report.n_rows / report.seconds,
        }
        if report.grad_norm is not None:
            metrics["grad_norm"] = report.grad_norm
        if self._memory_of is not None:
            metrics.update(training.get_memory_stats(device=self._memory_of))
        self._logger.log_dict(metrics, step=self._n_done)
