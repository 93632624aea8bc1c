"""Stopping when the process is told to end: at once, or between two steps of a training."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from personas_tune.errors import Interrupted

_SAME_REQUEST = 2.0  # seconds


class _Terminated(BaseException):
    """Passes by whatever handles errors, as KeyboardInterrupt does."""


@dataclass
class StopRequest:
    """Whether the process was told to end, and by which signal."""

    signal_number: int | None = None


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Note SIGTERM and SIGINT (Ctrl-C) instead of ending there and then, so that a step can be finished and saved.

    A later signal ends the process as it would without this; one that follows at once is the same request, which a
    cluster may send to each process, and torchrun again. Only the main thread may use it.
    """
    request = StopRequest()
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    came = 0.0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        if request.signal_number is None:
            request.signal_number, came = number, time.monotonic()
        elif time.monotonic() - came > _SAME_REQUEST:
            restore()
            os.kill(os.getpid(), number)

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
