"""Stopping when the process is told to end: at once, or between two steps of a training."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from personas_tune.errors import Interrupted


class _Terminated(BaseException):
    """Passes by whatever handles errors, as KeyboardInterrupt does."""


@dataclass
class StopRequest:
    """Whether the process was told to end, and by which signal."""

    signal_number: int | None = None


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Note SIGTERM and SIGINT (Ctrl-C) instead of ending there and then, so that a step can be finished and saved.

    A second signal ends the process as it would without this. Only the main thread may use it.
    """
    request = StopRequest()
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        request.signal_number = number
        restore()

    for number in numbers:
        signal.signal(number, note)
    try:
        yield request
    finally:
        restore()


@contextmanager
def sigterm_in_a_line() -> Iterator[None]:
    """End on SIGTERM as on a mistake: temporary files are removed, a line is printed.

    Raises:
        Interrupted: On SIGTERM.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except _Terminated:
        raise Interrupted(signal.SIGTERM, "no step of a training was lost") from None
    finally:
        signal.signal(signal.SIGTERM, before)
