"""Sends a request until there is an answer, or it is plain that there will be none; what is kept of it is the caller's.

Whatever asks a server shares this: how long to wait, when to give up, how hard the server may be pressed.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from personas_tune.llm.budget import usage_in
from personas_tune.llm.failures import Reply, Verdict, backoff_s, retry_after_s, verdict_on, words_of
from personas_tune.llm.journal import Usage
from personas_tune.llm.limits import Gate

NOTED_PAUSE_S = 5.0
MOST_LOST = 5  # of one request in a run: each may have been billed; one that is always lost is too long or too slow

Send = Callable[[], Awaitable[Reply]]
Keep = Callable[[Reply, Usage, float], Awaitable[None]]  # the usage, and when it was sent (Unix time)
Note = Callable[[str, str], object]  # words, and their kind


@dataclass(frozen=True)
class Unanswered:
    """A request that gets no answer.

    Args:
        reply: What came last.
        tries: How often it was sent.
        was_down: Whether no other request was answered in the meantime either.
    """

    reply: Reply
    tries: int
    was_down: bool

    @property
    def verdict(self) -> Verdict:
        """What the last reply meant."""
        return verdict_on(self.reply)

    @property
    def words(self) -> str:
        """What happened, in one line."""
        words = words_of(self.reply)
        return f"no answer in {self.tries} attempts, the last: {words}" if self.verdict == "again" else words


class Sender:
    """Sends requests through a gate, and again where that may help.

    Args:
        max_retries: Of one request.
        gate: Lets requests out.
        note: Is told what holds them up.

    Attributes:
        n_answered: How many were answered.
    """

    def __init__(self, max_retries: int, gate: Gate, note: Note) -> None:
        self.n_answered = 0
        self._max_retries = max_retries
        self._gate = gate
        self._note = note
        self._draw = random.Random()
        self._n_lost: Counter[str] = Counter()

    async def until_answered(self, name: str, estimate: Usage, send: Send, keep: Keep) -> Reply | Unanswered:
        """Get one answer.

        Args:
            name: Of the request; what is lost is counted by it.
            estimate: The tokens that it probably takes.
            send: Sends it once.
            keep: Is given what came of each attempt before anybody reads it.

        Raises:
            BudgetError: If the budget is spent.
            Closed: If the run is being stopped.
        """
        n_answered_before, tries = self.n_answered, 0
        while True:
            await self._gate.enter(estimate, tries)
            reply = await self._attempt(estimate, send, keep)
            if reply.status == "answered":
                self.n_answered += 1
                return reply
            tries += 1
            self._n_lost[name] += reply.status == "lost"
            is_last = tries > self._max_retries or self._n_lost[name] >= MOST_LOST
            if is_last or verdict_on(reply) != "again":
                return Unanswered(reply, tries, was_down=self.n_answered == n_answered_before)
            self._note(f"{words_of(reply)}; trying again", f"HTTP {reply.http_status}")
            if not _pause_asked(reply):  # a pause of 0 s is none
                await self._gate.nap(backoff_s(tries - 1, self._draw))

    async def _attempt(self, estimate: Usage, send: Send, keep: Keep) -> Reply:
        usage, sent_at, started = estimate, asyncio.get_running_loop().time(), time.time()
        try:
            reply = await send()
            usage = _usage_of(reply, estimate)
            self._heed(reply, sent_at)
            await keep(reply, usage, started)
        finally:
            self._gate.leave(estimate, usage)
        return reply

    def _heed(self, reply: Reply, sent_at: float) -> None:
        """Do as the server asks, and find out how many requests at a time it bears."""
        if reply.status == "answered":
            self._gate.window.grow()
        elif reply.is_throttled:
            self._gate.shrink(sent_at)
        pause_s = max(self._gate.heed(reply.headers), _pause_asked(reply) or 0.0)
        if pause_s and self._gate.pause(pause_s) and pause_s >= NOTED_PAUSE_S:
            self._note(f"the server asks for a pause of {pause_s:.0f} s", "pause")


def _pause_asked(reply: Reply) -> float | None:
    return None if reply.status == "answered" else retry_after_s(reply.headers, time.time())


def _usage_of(reply: Reply, estimate: Usage) -> Usage:
    if reply.status == "answered":
        return usage_in(reply.text) or estimate
    return estimate if reply.status == "lost" else Usage()
