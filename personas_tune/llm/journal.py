"""Keeps the raw answer of every attempt at a call in SQLite, before anybody reads it.

An attempt is on the disk when :meth:`Journal.record` returns. Attempts that are recorded at the same
time are committed together, by a thread of their own, so that the disk never holds up the calls.
"""

import asyncio
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias

from personas_tune.errors import JournalError
from personas_tune.llm.journal_file import Row, connect, insert, insert_at_once, open_locked, told, transaction

Status: TypeAlias = Literal["answered", "failed", "lost"]
Via: TypeAlias = Literal["online", "batch"]


@dataclass(frozen=True)
class Usage:
    """Tokens as servers count them; cached ones are among the input."""

    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Input and output."""
        return self.input_tokens + self.output_tokens

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.input_tokens + other.input_tokens,
            self.cached_tokens + other.cached_tokens,
            self.output_tokens + other.output_tokens,
        )

    def __sub__(self, other: "Usage") -> "Usage":
        return Usage(
            self.input_tokens - other.input_tokens,
            self.cached_tokens - other.cached_tokens,
            self.output_tokens - other.output_tokens,
        )


@dataclass(frozen=True)
class Attempt:
    """One request that was sent, and what came of it.

    Args:
        request: The request's sha256, see :class:`personas_tune.llm.calls.Request`.
        status: ``answered``: HTTP success with a whole body. ``failed``: an HTTP error, or nothing was sent.
            ``lost``: sent, but no whole answer came; it may have been billed.
        http_status: None if no answer came.
        response: The raw body, or what went wrong.
        usage: As told by the server; the client's own estimate for ``lost``.
        request_id: The server's name for it.
        model: The model asked for.
        via: Which way it went.
        started: Unix time in seconds.
        ended: Unix time in seconds.
        parts: Names (hex sha256) of what the answer is made of, in its order.
    """

    request: str
    status: Status
    http_status: int | None
    response: str | None
    usage: Usage
    request_id: str | None
    model: str
    via: Via
    started: float
    ended: float
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Total:
    """Sums over the attempts that went one way and ended alike."""

    via: Via
    status: Status
    n: int
    usage: Usage


class Journal:
    """The attempts at calls, on disk; get one from :meth:`open`.

    To be used by one thread and one event loop at a time.
    """

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock
        self._waiting: list[tuple[Attempt, asyncio.Future[None] | None]] = []
        self._flushing: asyncio.Task[None] | None = None
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal")
        self._writer = connect(path)
        self._connection = connect(path)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open the journal at ``path``, or begin one; nobody else can until it is closed.

        Raises:
            JournalError: If another process has it open, if the file is something else or damaged, or can't be
                written.
        """
        return cls(path, open_locked(path))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Commit whatever waits, and let others open the file."""
        self._executor.shutdown()
        waiting, self._waiting = self._waiting, []
        try:
            with told(self.path):
                self._commit([attempt for attempt, _ in waiting])
        finally:
            self._writer.close()
            self._connection.close()
            os.close(self._lock)

    def answers(self, request: str) -> list[str]:
        """Bodies of the delivered answers to the request of that sha256, oldest first."""
        rows = self.execute(
            "SELECT response FROM attempts WHERE request = ? AND status = 'answered' ORDER BY attempt", (request,)
        )
        return [response for (response,) in rows]

    def totals(self, model: str) -> list[Total]:
        """Sums over all attempts with that model, by way and status."""
        rows = self.execute(
            "SELECT via, status, count(*), sum(input_tokens), sum(cached_tokens), sum(output_tokens) FROM attempts "
            "WHERE model = ? GROUP BY via, status ORDER BY via, status",
            (model,),
        )
        return [Total(via, status, n, Usage(*tokens)) for via, status, n, *tokens in rows]

    async def record(self, attempt: Attempt) -> None:
        """Keep an attempt; it is on the disk when this returns.

        An attempt that was handed over is kept even if the wait for it is cancelled.

        Raises:
            JournalError: If the disk is full or the file was damaged.
        """
        kept = asyncio.get_running_loop().create_future()
        self._hand_over(attempt, kept)
        await kept

    def record_soon(self, attempt: Attempt) -> None:
        """Keep an attempt that nobody waits for; :meth:`settle` does."""
        self._hand_over(attempt, None)

    async def settle(self) -> None:
        """Wait until all attempts that were handed over are on the disk."""
        while self._flushing is not None:
            await asyncio.wait([self._flushing])

    def record_all(self, attempts: Iterable[Attempt]) -> None:
        """Keep attempts, all of them or none; they are on the disk on return, or when the transaction around ends."""
        with self.transaction():
            for attempt in attempts:
                _insert(self._connection, attempt)

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> list[Any]:
        """Run one statement and return all rows."""
        with told(self.path):
            return self._connection.execute(sql, parameters).fetchall()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """What is executed inside is kept together, or not at all; inside another one, a part of that."""
        if self._connection.in_transaction:
            yield
            return
        with told(self.path), transaction(self._connection):
            yield

    def _hand_over(self, attempt: Attempt, kept: "asyncio.Future[None] | None") -> None:
        self._waiting.append((attempt, kept))
        if self._flushing is None:
            self._flushing = asyncio.create_task(self._flush())

    async def _flush(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._waiting:
                waiting, self._waiting = self._waiting, []
                outcome = await loop.run_in_executor(self._executor, self._try_commit, [row for row, _ in waiting])
                for _, kept in waiting:
                    if kept is not None:
                        _resolve(kept, outcome)
        finally:
            self._flushing = None

    def _try_commit(self, attempts: Sequence[Attempt]) -> JournalError | None:
        try:
            with told(self.path):
                self._commit(attempts)
        except JournalError as error:
            return error
        except Exception as error:  # each of them is waited for, whatever went wrong
            return JournalError(f"{len(attempts)} answers can't be kept: {error!r}", where=str(self.path))
        return None

    def _commit(self, attempts: Sequence[Attempt]) -> None:
        are_plain = not any(attempt.parts for attempt in attempts)
        if are_plain and len({attempt.request for attempt in attempts}) == len(attempts):
            insert_at_once(self._writer, [_row_of(attempt) for attempt in attempts])
            return
        with transaction(self._writer):
            for attempt in attempts:
                _insert(self._writer, attempt)


def _insert(connection: sqlite3.Connection, attempt: Attempt) -> None:
    insert(connection, _row_of(attempt), attempt.parts if attempt.status == "answered" else ())


def _resolve(kept: "asyncio.Future[None]", error: JournalError | None) -> None:
    if kept.cancelled():
        return
    if error is None:
        kept.set_result(None)
    else:
        kept.set_exception(error)


def _row_of(attempt: Attempt) -> Row:
    """As :data:`personas_tune.llm.journal_file.COLUMNS` has it."""
    usage = attempt.usage
    return (
        attempt.request, attempt.status, attempt.http_status,
        usage.input_tokens, usage.cached_tokens, usage.output_tokens,
        attempt.request_id, attempt.model, attempt.via, attempt.started, attempt.ended, attempt.response,
    )  # fmt: skip
