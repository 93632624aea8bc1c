"""The journal's file: its lock, mode, schema and connections, how rows get in, and its troubles in the user's words."""

import fcntl
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

from personas_tune.errors import JournalError

APPLICATION_ID = 0x50544A4C  # "PTJL"
SCHEMA_VERSION = 1

_SCHEMA = f"""
CREATE TABLE attempts (
    id INTEGER PRIMARY KEY,
    request TEXT NOT NULL,
    attempt INTEGER NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('answered', 'failed', 'lost')),
    http_status INTEGER,
    input_tokens INTEGER NOT NULL,
    cached_tokens INTEGER NOT NULL,
    output_tokens INTEGER NOT NULL,
    request_id TEXT,
    model TEXT NOT NULL,
    via TEXT NOT NULL CHECK (via IN ('online', 'batch')),
    started REAL NOT NULL,
    ended REAL NOT NULL,
    response TEXT,  -- last, for SQLite reads a row up to the column that it needs
    UNIQUE (request, attempt)
);
CREATE INDEX sums ON attempts (model, via, status, input_tokens, cached_tokens, output_tokens);
CREATE TABLE parts (
    name TEXT PRIMARY KEY,
    attempt_id INTEGER NOT NULL REFERENCES attempts (id),
    place INTEGER NOT NULL
) WITHOUT ROWID;
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
"""

COLUMNS = (
    "request", "status", "http_status", "input_tokens", "cached_tokens", "output_tokens",
    "request_id", "model", "via", "started", "ended", "response",
)  # fmt: skip
Row: TypeAlias = tuple[Any, ...]  # in the order of COLUMNS

_INSERT = f"INSERT INTO attempts (attempt, {', '.join(COLUMNS)}) VALUES "
_NEXT_ATTEMPT = "(SELECT coalesce(max(attempt), 0) + 1 FROM attempts WHERE request = ?)"
_VALUES = f"({_NEXT_ATTEMPT}, {', '.join('?' * len(COLUMNS))})"
_MOST_ROWS = 1000  # SQLite takes 32,766 values in a statement

_WRITABLE = "free some disk space, or name a place that may be written"
_ASIDE = "bring back a copy of it, or move it aside to begin a new one"


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All that is executed inside is committed together, or undone."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):  # a full disk has rolled it back already
            connection.execute("ROLLBACK")
        raise


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Tell the errors of files and of SQLite in the user's words."""
    try:
        yield
    except OSError as error:
        raise JournalError(f"can't be used ({error.strerror})", where=str(path), remedy=_WRITABLE) from error
    except sqlite3.OperationalError as error:
        raise JournalError(f"can't be used ({error})", where=str(path), remedy=_WRITABLE) from error
    except sqlite3.DatabaseError as error:
        raise JournalError(f"no journal, or a damaged one ({error})", where=str(path), remedy=_ASIDE) from error


def open_locked(path: Path) -> int:
    """Lock the journal at ``path``, having begun it if need be; closing the descriptor unlocks it.

    Raises:
        JournalError: If another process has it open, if the file is something else or damaged, or can't be written.
    """
    with told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(path)
    try:
        with told(path):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            with closing(connect(path)) as connection:
                _check_kind(connection, path)
                connection.execute("PRAGMA journal_mode = WAL")
                _make_private(path)
                _make_tables(connection)
    except BaseException:
        os.close(lock)
        raise
    return lock


def _lock(path: Path) -> int:
    """Take the lock file beside the journal and put our process id into it.

    The system drops the lock when the process ends, however it ends.
    """
    lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(lock, 20).decode("ascii", "replace").strip() or "unknown"
        os.close(lock)
        raise JournalError(
            f"process {holder} is using it", where=str(path), remedy="wait until it is done, or stop it"
        ) from None
    except BaseException:
        os.close(lock)
        raise
    os.ftruncate(lock, 0)
    os.write(lock, f"{os.getpid()}\n".encode())
    return lock


def connect(path: Path) -> sqlite3.Connection:
    """A connection whose commits outlive a power cut; transactions are begun by hand."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=60)
    connection.execute("PRAGMA synchronous = FULL")
    return connection


def _make_private(path: Path) -> None:
    """SQLite gives the side files that it makes later the same mode."""
    for file in (path, Path(f"{path}-wal"), Path(f"{path}-shm")):
        with suppress(FileNotFoundError):
            file.chmod(0o600)


def _make_tables(connection: sqlite3.Connection) -> None:
    if not _has_tables(connection):
        with transaction(connection):
            for statement in _SCHEMA.split(";\n"):
                connection.execute(statement)


def _has_tables(connection: sqlite3.Connection) -> bool:
    return bool(connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])


def _check_kind(connection: sqlite3.Connection, path: Path) -> None:
    (kind,) = connection.execute("PRAGMA application_id").fetchone()
    (schema,) = connection.execute("PRAGMA user_version").fetchone()
    if not _has_tables(connection) and kind == schema == 0:
        return
    if kind != APPLICATION_ID:
        raise JournalError("an SQLite file, but no journal of answers", where=str(path), remedy=_ASIDE)
    if schema != SCHEMA_VERSION:
        raise JournalError(
            f"a journal of schema {schema}, this version reads {SCHEMA_VERSION}",
            where=str(path),
            remedy="use the version of personas-tune that wrote it, or move it aside to begin a new one",
        )


def insert(connection: sqlite3.Connection, row: Row, parts: Sequence[str]) -> None:
    """Add an attempt with the names of what its answer is made of."""
    cursor = connection.execute(_INSERT + _VALUES, (row[0], *row))
    connection.executemany(
        "INSERT OR REPLACE INTO parts VALUES (?, ?, ?)",
        [(name, cursor.lastrowid, place) for place, name in enumerate(parts)],
    )


def insert_at_once(connection: sqlite3.Connection, rows: Sequence[Row]) -> None:
    """Add attempts, each at another request, by one statement.

    SQLite lets go of the interpreter during each statement, and a busy event loop gives it back up to 5 ms
    later: with a statement a row, answers waited for 30 ms (64 calls in flight, 200 calls a second).
    """
    for start in range(0, len(rows), _MOST_ROWS):
        some = rows[start : start + _MOST_ROWS]
        values = [value for row in some for value in (row[0], *row)]
        connection.execute(_INSERT + ", ".join([_VALUES] * len(some)), values)
