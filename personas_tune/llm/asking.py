"""Sends a call until there is an answer, or it is plain that there will be none."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from personas_tune.errors import ServerError
from personas_tune.llm.budget import estimated_usage, usage_in
from personas_tune.llm.calls import Call
from personas_tune.llm.client import Client
from personas_tune.llm.failures import Reply, backoff_s, remedy_for, retry_after_s, verdict_on, words_of
from personas_tune.llm.journal import Attempt, Journal, Usage
from personas_tune.llm.limits import Closed, Gate
from personas_tune.llm.progress import Progress
from personas_tune.llm.settings import ServerSettings, access_to
from personas_tune.llm.shutdown import shutdown_warning

NOTED_PAUSE_S = 5.0
MOST_LOST = 5  # of one call in a run: each may have been billed, and a call that is always lost is too long or too slow


class Incomplete(Exception):  # noqa: N818
    """A user that can't be finished; the text says why."""


class Refused(Incomplete):
    """The server won't take this request.

    Args:
        error: What to tell if it takes none at all.
    """

    def __init__(self, error: ServerError) -> None:
        super().__init__(error.what)
        self.error = error


class Spoilt(Incomplete):
    """All answers to a call were rejected.

    Args:
        n: How many.
        complaint: What was wrong with the last.
    """

    def __init__(self, n: int, complaint: str) -> None:
        super().__init__(f"{n} answers rejected, the last: {complaint}")
        self.complaint = complaint


class Asker:
    """Sends calls to one server, and again where that may help, and journals every attempt.

    Args:
        server: The server and its bounds.
        journal: Keeps the attempts.
        gate: Lets calls out.
        progress: Tells what holds them up.

    Attributes:
        n_answered: How many were answered.
        where: The server and the model, for messages.
    """

    def __init__(self, server: ServerSettings, journal: Journal, gate: Gate, progress: Progress) -> None:
        self.n_answered = 0
        self._server = server
        self._journal = journal
        self._gate = gate
        self._progress = progress
        self._client: Client | None = None
        self._connecting = asyncio.Lock()
        self.where = server.model
        self._draw = random.Random()
        self._n_lost: Counter[str] = Counter()

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.close()

    async def ask(self, call: Call, complaint: str | None) -> str:
        """Get one answer to a call and return its body.

        Args:
            call: The call.
            complaint: What was wrong with the answer before.

        Raises:
            Incomplete: If the server won't answer this call.
            ServerError: If it won't answer any.
            BudgetError: If the budget is spent.
            Closed: If the run is being stopped.
        """
        client = self._client or await self._connect()
        body = call.request.body_after(complaint)
        estimate = estimated_usage(body, call.expected_output_tokens)
        n_answered_before, tries = self.n_answered, 0
        while True:
            await self._gate.enter(estimate, tries)
            reply = await self._attempt(client, call, body, estimate)
            if reply.status == "answered":
                self.n_answered += 1
                return reply.text
            tries += 1
            self._n_lost[call.request.sha256] += reply.status == "lost"
            was_down = self.n_answered == n_answered_before
            is_last = tries > self._server.max_retries or self._n_lost[call.request.sha256] >= MOST_LOST
            self._raise_if_final(reply, tries, is_last=is_last, was_down=was_down)
            self._progress.note(f"{words_of(reply)}; trying again", kind=f"HTTP {reply.http_status}")
            if not _pause_asked(reply):  # a pause of 0 s is none
                await self._gate.nap(backoff_s(tries - 1, self._draw))

    def _raise_if_final(self, reply: Reply, tries: int, *, is_last: bool, was_down: bool) -> None:
        verdict, words = verdict_on(reply), words_of(reply)
        if verdict == "stop":
            raise ServerError(words, where=self.where, remedy=remedy_for(reply))
        if verdict == "unfit":
            raise Incomplete(words)
        if verdict == "refused":
            raise Refused(ServerError(words, where=self.where, remedy=remedy_for(reply)))
        if is_last and was_down:
            within = f"{self._server.timeout_s:g}"
            remedy = f"see whether it is up and answers within timeout_s={within}, then run the same command to go on"
            raise ServerError(f"no answer in {tries} attempts, the last: {words}", where=self.where, remedy=remedy)
        if is_last:
            raise Incomplete(f"no answer in {tries} attempts, the last: {words}")

    async def _attempt(self, client: Client, call: Call, body: Mapping[str, Any], estimate: Usage) -> Reply:
        """Send a call once and keep what came of it before anybody reads it."""
        usage, sent_at, started = estimate, asyncio.get_running_loop().time(), time.time()
        try:
            reply = await self._send(client, call, body, estimate)
            usage = _usage_of(reply, estimate)
            self._heed(reply, sent_at)
            await self._journal.record(_as_attempt(call, reply, usage, started))
        finally:
            self._gate.leave(estimate, usage)
        return reply

    async def _send(self, client: Client, call: Call, body: Mapping[str, Any], estimate: Usage) -> Reply:
        started = time.time()
        try:
            return await client.send(call.request.path, body)
        except asyncio.CancelledError:
            lost = Reply("lost", None, "stopped before the answer came")
            self._journal.record_soon(_as_attempt(call, lost, estimate, started))
            raise

    def _heed(self, reply: Reply, sent_at: float) -> None:
        """Do as the server asks, and find out how many calls at a time it bears."""
        if reply.status == "answered":
            self._gate.window.grow()
        elif reply.is_throttled:
            self._gate.shrink(sent_at)
        pause_s = max(self._gate.heed(reply.headers), _pause_asked(reply) or 0.0)
        if pause_s and self._gate.pause(pause_s) and pause_s >= NOTED_PAUSE_S:
            self._progress.note(f"the server asks for a pause of {pause_s:.0f} s", kind="pause")

    async def _connect(self) -> Client:
        async with self._connecting:
            if self._gate.is_closed:
                raise Closed
            if self._client is None:
                access = access_to(self._server)
                self.where = f"{access.shown_url}, model {self._server.model}"
                client = Client(self._server, access)
                try:
                    await self._look_at_model(client)
                except BaseException:
                    await client.close()
                    raise
                self._client = client
            return self._client

    async def _look_at_model(self, client: Client) -> None:
        """Warn of a model that is about to go; many servers don't tell, and that is no failure."""
        reply = await client.look_at_model(self._server.model)
        if reply.http_status == 401:  # 403: some keys may chat and not look
            raise ServerError(words_of(reply), where=self.where, remedy=remedy_for(reply))
        warning = shutdown_warning(self._server.model, reply.text)
        if warning is not None:
            self._progress.note(warning)


def _pause_asked(reply: Reply) -> float | None:
    return None if reply.status == "answered" else retry_after_s(reply.headers, time.time())


def _usage_of(reply: Reply, estimate: Usage) -> Usage:
    if reply.status == "answered":
        return usage_in(reply.text) or estimate
    return estimate if reply.status == "lost" else Usage()


def _as_attempt(call: Call, reply: Reply, usage: Usage, started: float) -> Attempt:
    return Attempt(
        request=call.request.sha256,
        status=reply.status,
        http_status=reply.http_status,
        response=reply.text,
        usage=usage,
        request_id=reply.headers.get("x-request-id"),
        model=call.request.body["model"],
        via="online",
        started=started,
        ended=time.time(),
        parts=call.parts,
    )
