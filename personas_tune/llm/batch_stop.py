"""Ends a long wait on SIGINT or SIGTERM."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

LONGEST_SLEEP_S = 86_400.0  # the operating system takes no number of seconds
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):  # as KeyboardInterrupt: nobody between here and there may swallow it
    """The user stops the run.

    Args:
        signal_number: By which signal.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


class Stop:
    """While it is open, the first signal ends the run where :meth:`allowed` says so; the next one at once."""

    def __init__(self) -> None:
        self._signal_number: int | None = None
        self._is_allowed = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            heeded = [number for number in _SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None)]
            self._before = {number: signal.signal(number, self._heed) for number in heeded}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._give_back()

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """What is done inside may be broken off anywhere.

        Raises:
            Stopped: If a signal came before, or comes meanwhile.
        """
        self._is_allowed = True
        try:
            if self._signal_number is not None:
                raise Stopped(self._signal_number)
            yield
        finally:
            self._is_allowed = False

    def check(self) -> None:
        """End here if a signal came."""
        with self.allowed():
            pass

    def sleep(self, seconds: float) -> None:
        """Wait, a day at most, unless a signal comes."""
        with self.allowed():
            time.sleep(min(max(0.0, seconds), LONGEST_SLEEP_S))

    def _heed(self, number: int, frame: FrameType | None) -> None:
        self._signal_number = number
        self._give_back()
        if self._is_allowed:
            raise Stopped(number)

    def _give_back(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())
