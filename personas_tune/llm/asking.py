"""Sends calls and journals every attempt; tells of one that gets no answer whether others may."""

import asyncio
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from personas_tune.errors import ServerError
from personas_tune.llm.budget import estimated_usage
from personas_tune.llm.calls import Call
from personas_tune.llm.client import Client
from personas_tune.llm.failures import Reply, remedy_for, words_of
from personas_tune.llm.journal import Attempt, Journal, Usage
from personas_tune.llm.limits import Closed, Gate
from personas_tune.llm.progress import Progress
from personas_tune.llm.sending import Sender, Unanswered
from personas_tune.llm.settings import ServerSettings, access_to
from personas_tune.llm.shutdown import shutdown_warning


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
        where: The server and the model, for messages.
    """

    def __init__(self, server: ServerSettings, journal: Journal, gate: Gate, progress: Progress) -> None:
        self._server = server
        self._journal = journal
        self._gate = gate
        self._progress = progress
        self._client: Client | None = None
        self._connecting = asyncio.Lock()
        self.where = server.model
        self._sender = Sender(server.max_retries, gate, lambda words, kind: progress.note(words, kind=kind))

    @property
    def n_answered(self) -> int:
        """How many calls were answered."""
        return self._sender.n_answered

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
        send = partial(self._send, client, call, body, estimate)
        reply = await self._sender.until_answered(call.request.sha256, estimate, send, partial(self._keep, call))
        if isinstance(reply, Unanswered):
            raise self._error_of(reply)
        return reply.text

    def _error_of(self, failed: Unanswered) -> Exception:
        error = ServerError(failed.words, where=self.where, remedy=remedy_for(failed.reply))
        if failed.verdict == "stop":
            return error
        if failed.verdict == "refused":
            return Refused(error)
        if failed.verdict == "again" and failed.was_down:
            within = f"{self._server.timeout_s:g}"
            remedy = f"see whether it is up and answers within timeout_s={within}, then run the same command to go on"
            return ServerError(failed.words, where=self.where, remedy=remedy)
        return Incomplete(failed.words)

    async def _keep(self, call: Call, reply: Reply, usage: Usage, started: float) -> None:
        await self._journal.record(_as_attempt(call, reply, usage, started))

    async def _send(self, client: Client, call: Call, body: Mapping[str, Any], estimate: Usage) -> Reply:
        started = time.time()
        try:
            return await client.send(call.request.path, body)
        except asyncio.CancelledError:
            lost = Reply("lost", None, "stopped before the answer came")
            self._journal.record_soon(_as_attempt(call, lost, estimate, started))
            raise

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
