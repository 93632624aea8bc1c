"""How many calls may be in flight and how fast they may follow each other, for all workers together."""

import asyncio
import heapq
import itertools
import math
import re
from collections.abc import Mapping

from personas_tune.errors import BudgetError
from personas_tune.llm.budget import Budget
from personas_tune.llm.failures import LONGEST_PAUSE_S
from personas_tune.llm.journal import Usage
from personas_tune.llm.settings import ServerSettings

BURST_S = 1.0  # how many seconds' worth of a limit may go out at once
LONGEST_RESET_S = 60.0  # limits are per minute; one per day that is reached tells by a 429 when to come back
_UNITS_S = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


class Closed(Exception):  # noqa: N818
    """Nothing more is to be sent."""


class Window:
    """How many calls may be in flight: one more a round of successes, half as many when the server is overrun.

    Args:
        most: Never more than this many.
    """

    def __init__(self, most: int) -> None:
        self.size = float(most)
        self._most = most
        self._shrunk_at = -math.inf

    def grow(self) -> None:
        """A call succeeded."""
        self.size = min(self._most, self.size + 1 / self.size)

    def shrink(self, sent_at: float, now: float) -> None:
        """A call that was sent at ``sent_at`` was turned away; calls sent before the last shrinking don't count."""
        if sent_at >= self._shrunk_at:
            self.size = max(1.0, self.size / 2)
            self._shrunk_at = now


class Bucket:
    """A limit per minute. Amounts above the burst may be taken from a full bucket, which then stays shut longer."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._level = self._size
        self._at = now

    @property
    def _size(self) -> float:
        return max(1.0, self.per_minute * BURST_S / 60)

    def wait_s(self, amount: float, now: float) -> float:
        """How long until that much may be taken."""
        self._level = min(self._size, self._level + (now - self._at) * self.per_minute / 60)
        self._at = now
        lacking = min(amount, self._size) - self._level
        return lacking * 60 / self.per_minute if lacking > 1e-6 else 0.0

    def take(self, amount: float) -> None:
        """Take that much, or give it back if it is negative."""
        self._level -= amount


class Gate:
    """Where every call waits until it may be sent. Those that were turned away most often go first.

    Args:
        server: Has the limits.
        budget: A call that it doesn't allow waits for those in flight, which may take less than was estimated.
        kept_in: Where answers are kept, for the message that the budget is spent.
    """

    def __init__(self, server: ServerSettings, budget: Budget, kept_in: str) -> None:
        self.window = Window(server.concurrency)
        self.in_flight = 0
        self.is_closed = False
        self._budget = budget
        self._kept_in = kept_in
        self._loop = asyncio.get_running_loop()
        self._configured = {"requests": server.requests_per_minute, "tokens": server.tokens_per_minute}
        self._buckets = {kind: Bucket(n, self._loop.time()) for kind, n in self._configured.items() if n is not None}
        self._paused_until = 0.0
        self._waiting: list[tuple[int, int, Usage, asyncio.Future[None]]] = []
        self._arrivals = itertools.count()
        self._timer: asyncio.TimerHandle | None = None
        self._naps: set[asyncio.Future[None]] = set()

    async def enter(self, estimate: Usage, tries: int = 0) -> None:
        """Wait until a call may be sent; :meth:`leave` must follow.

        Args:
            estimate: The tokens that it probably takes.
            tries: How often it was turned away.

        Raises:
            Closed: If nothing more is to be sent.
            BudgetError: If the call would exceed the budget, and nothing is in flight that may cost less.
        """
        if self.is_closed:
            raise Closed
        if not self._waiting and self._wait_s(estimate) == 0.0:
            self._let_in(estimate)
            return
        turn = self._loop.create_future()
        heapq.heappush(self._waiting, (-tries, next(self._arrivals), estimate, turn))
        self._let_in_waiting()
        await turn

    def leave(self, estimate: Usage, usage: Usage) -> None:
        """A call that entered with ``estimate`` is over and took ``usage``."""
        self.in_flight -= 1
        self._budget.settle(estimate, usage)
        if "tokens" in self._buckets:
            self._buckets["tokens"].take(usage.tokens - estimate.tokens)
        self._let_in_waiting()

    def pause(self, seconds: float) -> bool:
        """Let nobody in for so long; tells whether there was no pause yet."""
        now = self._loop.time()
        is_new = self._paused_until <= now
        self._paused_until = max(self._paused_until, now + seconds)
        return is_new

    def shrink(self, sent_at: float) -> None:
        """The server was overrun by a call sent at ``sent_at``, by the loop's clock."""
        self.window.shrink(sent_at, self._loop.time())

    def heed(self, headers: Mapping[str, str]) -> float:
        """Keep the limits that the server tells, unless the settings have some.

        Returns:
            How long to pause, for a limit is reached.
        """
        pause_s = 0.0
        for kind, configured in self._configured.items():
            limit = _whole_number(headers.get(f"x-ratelimit-limit-{kind}"))
            if limit and configured is None:
                self._buckets.setdefault(kind, Bucket(limit, self._loop.time())).per_minute = limit
            if _whole_number(headers.get(f"x-ratelimit-remaining-{kind}")) == 0:
                reset_s = duration_s(headers.get(f"x-ratelimit-reset-{kind}", "")) or 0.0
                pause_s = max(pause_s, min(reset_s, LONGEST_RESET_S))
        return pause_s

    async def nap(self, seconds: float) -> None:
        """Sleep, but not when the gate is closed.

        Raises:
            Closed: If nothing more is to be sent.
        """
        if self.is_closed:
            raise Closed
        nap = self._loop.create_future()
        self._naps.add(nap)
        alarm = self._loop.call_later(seconds, _wake, nap)
        try:
            await nap
        finally:
            alarm.cancel()
            self._naps.discard(nap)

    def close(self) -> None:
        """Let nobody in any more; whoever waits or sleeps gets :class:`Closed`."""
        self.is_closed = True
        for sleeper in [*self._naps, *(turn for *_, turn in self._waiting)]:
            if not sleeper.done():
                sleeper.set_exception(Closed())
        self._waiting.clear()

    def _let_in(self, estimate: Usage) -> None:
        self.in_flight += 1
        self._budget.reserve(estimate)
        for kind, bucket in self._buckets.items():
            bucket.take(_amount(kind, estimate))

    def _let_in_waiting(self) -> None:
        while self._waiting:
            _, _, estimate, turn = self._waiting[0]
            wait_s = 0.0 if turn.done() else self._wait_s(estimate)
            if wait_s > 0.0 and self._is_spent(estimate):
                turn.set_exception(self._budget_error(estimate))
            elif wait_s > 0.0:
                self._look_again_in(wait_s)
                return
            heapq.heappop(self._waiting)
            if not turn.done():
                self._let_in(estimate)
                turn.set_result(None)

    def _wait_s(self, estimate: Usage) -> float:
        """How long until the call may be sent; infinite if another one has to come back first."""
        if self.in_flight >= int(self.window.size) or not self._budget.allows(estimate):
            return math.inf
        now = self._loop.time()
        waits = [bucket.wait_s(_amount(kind, estimate), now) for kind, bucket in self._buckets.items()]
        return max(0.0, self._paused_until - now, *waits)

    def _is_spent(self, estimate: Usage) -> bool:
        return self.in_flight == 0 and not self._budget.allows(estimate)

    def _budget_error(self, estimate: Usage) -> BudgetError:
        return self._budget.error(estimate, self._kept_in)

    def _look_again_in(self, wait_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if math.isinf(wait_s) else self._loop.call_later(wait_s, self._let_in_waiting)


def duration_s(text: str) -> float | None:
    """Seconds in a duration such as ``6m0s``, ``120ms`` or ``1.5`` (seconds); None if it is none."""
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)", text)
    if parts and "".join(map("".join, parts)) == text:
        return min(sum(float(number) * _UNITS_S[unit] for number, unit in parts), LONGEST_PAUSE_S)
    return min(float(text), LONGEST_PAUSE_S) if re.fullmatch(r"\d+(\.\d+)?", text) else None


def _amount(kind: str, estimate: Usage) -> int:
    return 1 if kind == "requests" else estimate.tokens


def _whole_number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() and len(text) < 16 else None


def _wake(nap: "asyncio.Future[None]") -> None:
    if not nap.done():
        nap.set_result(None)
