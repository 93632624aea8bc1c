"""What was sent to the Batch API, kept in the journal's database before and after every step.

A *shard* is one input file and the batch made of it. It goes through the states

    intended -> uploading -> uploaded -> creating -> created -> collected

or the server turns it away as a whole, or loses it. Until its batch is being created nothing of it was asked, so an
interrupted job drops it and makes it anew.
"""

import json
import secrets
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from personas_tune.errors import JournalError
from personas_tune.llm.journal import Journal, Usage

State: TypeAlias = Literal[
    "intended", "uploading", "uploaded", "creating", "created", "collected", "turned away", "gone"
]

_TABLES = (
    "CREATE TABLE IF NOT EXISTS batch_job (id TEXT NOT NULL)",
    """CREATE TABLE IF NOT EXISTS batch_shards (
        id INTEGER PRIMARY KEY,
        wave INTEGER NOT NULL,
        sha256 TEXT NOT NULL,
        try INTEGER NOT NULL,
        state TEXT NOT NULL,
        changed REAL NOT NULL,
        path TEXT NOT NULL,
        model TEXT NOT NULL,
        n_requests INTEGER NOT NULL,
        n_bytes INTEGER NOT NULL,
        input_tokens INTEGER NOT NULL,
        output_tokens INTEGER NOT NULL,
        file_id TEXT,
        batch_id TEXT,
        made_with TEXT,
        UNIQUE (sha256, try)
    )""",
    """CREATE TABLE IF NOT EXISTS batch_requests (
        request TEXT PRIMARY KEY,
        shard INTEGER NOT NULL REFERENCES batch_shards (id)
    ) WITHOUT ROWID""",
    "CREATE INDEX IF NOT EXISTS batch_requests_by_shard ON batch_requests (shard)",
)
_COLUMNS = "id, wave, sha256, try, state, changed, path, model, n_requests, n_bytes, input_tokens, output_tokens"


@dataclass(frozen=True)
class Contents:
    """An input file of the Batch API.

    Args:
        sha256: Of its bytes; also its name.
        path: The endpoint of all its requests, below the base URL.
        model: The model that all of them ask.
        n_bytes: Its size.
        requests: Names of its requests.
        estimate: What its answers probably take.
    """

    sha256: str
    path: str
    model: str
    n_bytes: int
    requests: Collection[str]
    estimate: Usage


@dataclass(frozen=True)
class Shard:
    """A row of the ledger.

    Args:
        id: Its number in the ledger.
        wave: Which wave of the job it belongs to, from 1.
        sha256: Of its input file's bytes.
        number: How many batches of these very bytes the job has asked for, this one included.
        state: How far it has come.
        changed: When it got there, Unix time in seconds.
        path: The endpoint of all its requests.
        model: The model that all of them ask.
        n_requests: How many there are.
        n_bytes: Size of its input file.
        estimate: What its answers probably take.
        file_id: The server's name of its input file.
        batch_id: The server's name of its batch.
        made_with: Address and key that its batch is found with, as the server's ``made_with`` tells them.
    """

    id: int
    wave: int
    sha256: str
    number: int
    state: State
    changed: float
    path: str
    model: str
    n_requests: int
    n_bytes: int
    estimate: Usage
    file_id: str | None
    batch_id: str | None
    made_with: str | None

    @property
    def file_name(self) -> str:
        """Name of its input file, here and at the server."""
        return f"{self.sha256}.jsonl"


class Ledger:
    """The shards of one job; each change is on the disk when its method returns.

    Attributes:
        job: A random name that tells this job's batches from those of others on the same account.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        with journal.transaction():
            for statement in _TABLES:
                journal.execute(statement)
            if not journal.execute("SELECT id FROM batch_job"):
                journal.execute("INSERT INTO batch_job VALUES (?)", (secrets.token_hex(16),))
        self.job: str = journal.execute("SELECT id FROM batch_job")[0][0]

    @property
    def wave(self) -> int:
        """The number of the newest wave; 0 before there is any."""
        return int(self._journal.execute("SELECT coalesce(max(wave), 0) FROM batch_shards")[0][0])

    def add(self, wave: int, contents: Contents) -> None:
        """Intend a shard, with the names of all its requests."""
        usage = contents.estimate
        with self._journal.transaction():
            ((shard,),) = self._journal.execute(
                "INSERT INTO batch_shards (wave, sha256, try, state, changed, path, model, n_requests, n_bytes, "
                "input_tokens, output_tokens) VALUES "
                "(?1, ?2, (SELECT coalesce(max(try), 0) + 1 FROM batch_shards WHERE sha256 = ?2), 'intended', "
                "?3, ?4, ?5, ?6, ?7, ?8, ?9) RETURNING id",
                (wave, contents.sha256, time.time(), contents.path, contents.model, len(contents.requests),
                 contents.n_bytes, usage.input_tokens, usage.output_tokens),
            )  # fmt: skip
            for request in contents.requests:
                self._journal.execute("INSERT INTO batch_requests VALUES (?, ?)", (request, shard))

    def shards(self, *states: State) -> list[Shard]:
        """The shards in one of these states, oldest first."""
        rows = self._journal.execute(
            f"SELECT {_COLUMNS}, file_id, batch_id, made_with FROM batch_shards "
            "WHERE state IN (SELECT value FROM json_each(?)) ORDER BY id",
            (json.dumps(states),),
        )
        return [_shard_of(row) for row in rows]

    def holds(self, request: str) -> bool:
        """Whether an answer to the request of that sha256 is on its way."""
        return bool(self._journal.execute("SELECT 1 FROM batch_requests WHERE request = ?", (request,)))

    def take(self, shard: Shard, request: str) -> bool:
        """An answer of the shard is being kept; False if the shard waits for no such answer (any more)."""
        delete = "DELETE FROM batch_requests WHERE request = ? AND shard = ? RETURNING 1"
        return bool(self._journal.execute(delete, (request, shard.id)))

    def unanswered(self, shard: Shard) -> list[str]:
        """Names of the requests that the shard still waits for."""
        rows = self._journal.execute("SELECT request FROM batch_requests WHERE shard = ?", (shard.id,))
        return [name for (name,) in rows]

    def uploading(self, shard: Shard) -> None:
        """Its input file is about to be sent."""
        self._move(shard, "uploading")

    def uploaded(self, shard: Shard, file_id: str) -> None:
        """Its input file is at the server."""
        self._move(shard, "uploaded", file_id=file_id)

    def creating(self, shard: Shard, made_with: str) -> None:
        """Its batch is about to be asked for."""
        self._move(shard, "creating", made_with=made_with)

    def created(self, shard: Shard, batch_id: str, made_with: str) -> None:
        """Its batch is at the server."""
        self._move(shard, "created", batch_id=batch_id, made_with=made_with)

    def collected(self, shard: Shard) -> None:
        """Whatever it answered is in the journal; nothing else is waited for."""
        self._close(shard, "collected")

    def turned_away(self, shard: Shard) -> None:
        """Its batch failed as a whole; the next of the same bytes gets the next number."""
        self._close(shard, "turned away")

    def gone(self, shard: Shard) -> None:
        """Its batch, or a file of answers, is not at the server any more."""
        self._close(shard, "gone")

    def ask_anew(self, shard: Shard) -> None:
        """Its batch failed as a whole, and is to be made again under the next number."""
        with self._journal.transaction():
            self._journal.execute(
                "UPDATE batch_shards SET try = (SELECT max(try) + 1 FROM batch_shards WHERE sha256 = ?) WHERE id = ?",
                (shard.sha256, shard.id),
            )
            self._move(shard, "uploaded", batch_id=None)

    def forget(self, shard: Shard) -> None:
        """Nothing of it was asked."""
        with self._journal.transaction():
            self._journal.execute("DELETE FROM batch_requests WHERE shard = ?", (shard.id,))
            self._journal.execute("DELETE FROM batch_shards WHERE id = ?", (shard.id,))

    def _close(self, shard: Shard, state: State) -> None:
        with self._journal.transaction():
            self._journal.execute("DELETE FROM batch_requests WHERE shard = ?", (shard.id,))
            self._move(shard, state)

    def _move(self, shard: Shard, state: State, **columns: str | None) -> None:
        values: dict[str, Any] = {"state": state, "changed": time.time(), **columns}
        assignments = ", ".join(f"{name} = ?" for name in values)
        self._journal.execute(f"UPDATE batch_shards SET {assignments} WHERE id = ?", (*values.values(), shard.id))


def _shard_of(row: tuple[Any, ...]) -> Shard:
    *first, input_tokens, output_tokens, file_id, batch_id, made_with = row
    values: list[Any] = [*first, Usage(input_tokens, 0, output_tokens), file_id, batch_id, made_with]
    return Shard(*values)


def refuse_open_batches(journal: Journal) -> None:
    """Refuse to ask online what batches may be answering already.

    Raises:
        JournalError: If a batch of the job wasn't collected yet.
    """
    n_open = len(Ledger(journal).shards("creating", "created"))
    if n_open:
        raise JournalError(
            f"batches that were sent and not collected yet: {n_open}",
            where=str(journal.path),
            remedy="collect them with distill.batch_api=true first, or their answers are paid for twice",
        )
