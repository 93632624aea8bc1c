"""Tells on standard error how far a run is and what holds it up."""

import sys
import time
from types import TracebackType
from typing import Self, TextIO

from tqdm import tqdm

from personas_tune.llm.budget import Budget

REFRESH_S = 0.5
LINE_EVERY_S = 60.0  # where no terminal redraws a bar
SAME_NOTE_EVERY_S = 60.0


class Progress:
    """A bar of calls done, or now and then a line if nobody watches.

    Args:
        what: Names the work.
        n_calls: How many calls there are to do, if that is known.
        budget: Tells what is spent and what remains.
        out: Where to write.
    """

    def __init__(self, what: str, n_calls: int | None, budget: Budget, out: TextIO | None = None) -> None:
        self.n_done = 0
        self._what = what
        self._n_calls = n_calls
        self._budget = budget
        self._out = sys.stderr if out is None else out
        is_watched = self._out.isatty()
        self._every_s = REFRESH_S if is_watched else LINE_EVERY_S
        self._begun, self._n_before = time.monotonic(), 0  # when the last line was written, and the calls done then
        self._next = self._begun + self._every_s
        self._noted: dict[str, float] = {}
        self._bar = tqdm(
            total=n_calls, desc=what, unit="call", file=self._out, disable=not is_watched, dynamic_ncols=True,
            smoothing=0.1,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.set_postfix_str(str(self._budget))
        self._bar.close()

    @property
    def share(self) -> str:
        """How many calls are done, and of how many."""
        return f"{self.n_done} calls" if self._n_calls is None else f"{self.n_done} of {self._n_calls} calls"

    def call_done(self) -> None:
        """A call has a usable answer."""
        self.n_done += 1
        if self._n_calls is not None and self.n_done > self._n_calls:  # there are calls that nobody can foresee
            self._n_calls = self._bar.total = self.n_done
        self._bar.update()
        now = time.monotonic()
        if now >= self._next:
            self._next = now + self._every_s
            self._refresh(now)

    def note(self, text: str, kind: str | None = None) -> None:
        """Write a line, unless one of the same kind was written within the last minute."""
        now = time.monotonic()
        if kind is not None and now < self._noted.get(kind, 0.0):
            return
        if kind is not None:
            self._noted[kind] = now + SAME_NOTE_EVERY_S
        with tqdm.external_write_mode(file=self._out):
            print(f"{self._what}: {text}", file=self._out, flush=True)

    def _refresh(self, now: float) -> None:
        if self._bar.disable:
            print(f"{self._what}: {self.share} done{self._time_left(now)}, {self._budget}", file=self._out, flush=True)
            self._begun, self._n_before = now, self.n_done
        else:
            self._bar.set_postfix_str(str(self._budget), refresh=False)

    def _time_left(self, now: float) -> str:
        """At the pace since the last line: answers in the journal, which come first, are read in no time."""
        if self._n_calls is None:
            return ""
        left_s = (now - self._begun) / (self.n_done - self._n_before) * (self._n_calls - self.n_done)
        return f", {tqdm.format_interval(left_s)} to go"
