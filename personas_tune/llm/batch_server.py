"""The Batch API of a server, a method for each of its endpoints."""

import random
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import openai
from openai.pagination import SyncCursorPage
from openai.types import Batch, FileObject

from personas_tune.errors import ConfigError, ServerError
from personas_tune.llm.batch_ledger import Shard
from personas_tune.llm.batch_stop import Stop
from personas_tune.llm.client import _headers_for
from personas_tune.llm.failures import Reply, backoff_s, remedy_for, retry_after_s, verdict_on, words_of
from personas_tune.llm.settings import Access, ServerSettings, access_to

MOST_FAILURES = 200  # in a row, of a server that was there before; with waits of up to a minute between them
_NOT_OFFERED = (404, 405, 501)
_CHUNK_BYTES = 1 << 18

Answer = TypeVar("Answer")


class Unsure(Exception):  # noqa: N818
    """The server may have done what it was asked, or not; the text says what went wrong.

    Args:
        words: What went wrong.
        wait_s: How long the server asks us to wait.
    """

    def __init__(self, words: str, wait_s: float | None) -> None:
        super().__init__(words)
        self.wait_s = wait_s


class BatchServer:
    """A connection to a server's Batch API, made when it is needed.

    Args:
        server: Its settings.
        poll_s: The longest wait after a failure, unless the server asks for more.
        stop: Breaks calls off.
        note: Tells the user what holds the run up.

    Attributes:
        most_failures: How often in a row the same may fail.
    """

    def __init__(self, server: ServerSettings, poll_s: float, stop: Stop, note: Callable[[str], None]) -> None:
        self._server = server
        self._poll_s, self._stop, self._note = poll_s, stop, note
        self._draw = random.Random()
        self.most_failures = server.max_retries + 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if "_connection" in self.__dict__:
            self._connection.close()

    @property
    def where(self) -> str:
        """Its address, for messages."""
        return self._access.shown_url

    @cached_property
    def _access(self) -> Access:
        return access_to(self._server)

    @cached_property
    def _headers(self) -> dict[str, Any]:
        return _headers_for(self._access)

    @cached_property
    def _connection(self) -> openai.OpenAI:
        return _connect(self._server, self._access)

    def batches_of(self, job: str) -> dict[tuple[str, int], str]:
        """Ids of the job's batches by their input's sha256 and their number."""
        found = {}
        for batch in self._all(lambda: self._connection.batches.list(limit=100, extra_headers=self._headers)):
            key = _key_in(batch.metadata or {}, job)
            if key is not None:
                found[key] = batch.id
        return found

    def input_files(self) -> dict[tuple[str, int], str]:
        """Ids of the uploaded input files by name and size."""
        listed = self._all(
            lambda: self._connection.files.list(purpose="batch", limit=10_000, extra_headers=self._headers)
        )
        return {(file.filename, file.bytes): file.id for file in listed if file.status != "error"}

    def upload(self, file: Path) -> str:
        """Upload an input file under its own name; returns its id.

        Raises:
            Unsure: If it may be there, or may be taken later.
            ServerError: If it never will be.
        """
        with file.open("rb") as stream, self._stop.allowed():
            form = (file.name, stream, "application/jsonl")
            return self._once(
                lambda: self._connection.files.create(file=form, purpose="batch", extra_headers=self._headers),
                FileObject,
            ).id

    def create(self, shard: Shard, file_id: str, job: str) -> str:
        """Have a batch made of an uploaded file; returns its id. Not to be broken off: a lost id costs a search.

        Raises:
            Unsure: If it may have been made, or may be made later.
            ServerError: If it never will be.
        """
        return self._once(
            lambda: self._connection.batches.create(
                input_file_id=file_id,
                endpoint=f"/v1{shard.path}",  # type: ignore[arg-type]  # theirs is a list of literals
                completion_window="24h",  # there is no other
                metadata=_metadata(shard, job),
                extra_headers=self._headers,
            ),
            Batch,
        ).id

    def batch(self, batch_id: str) -> Batch:
        """How far a batch has come."""
        return self._patiently(lambda: self._connection.batches.retrieve(batch_id, extra_headers=self._headers), Batch)

    def download(self, file_id: str, path: Path) -> None:
        """Write a file of the server's to ``path``."""

        def fetch() -> Path:
            content = self._connection.files.with_streaming_response.content(file_id, extra_headers=self._headers)
            with content as answer, path.open("wb") as stream:
                for chunk in answer.iter_bytes(_CHUNK_BYTES):
                    stream.write(chunk)
            return path

        self._patiently(fetch, Path)

    def _all(self, list_first: Callable[[], Any]) -> Iterator[Any]:
        """All entries of a listing, page after page."""
        page = self._patiently(list_first, SyncCursorPage)
        yield from page.data
        while page.data and page.has_next_page():
            page = self._patiently(page.get_next_page, SyncCursorPage)
            yield from page.data

    def _patiently(self, ask: Callable[[], Any], kind: type[Answer]) -> Answer:
        """Ask what changes nothing at the server, until it answers."""
        tries = 0
        while True:
            try:
                with self._stop.allowed():
                    return self._once(ask, kind)
            except Unsure as failure:
                tries += 1
                self.give_up_after(tries, failure)
                self._note(f"{failure}; trying again")
                self._stop.sleep(failure.wait_s or min(self._poll_s, backoff_s(tries - 1, self._draw)))

    def give_up_after(self, tries: int, failure: Unsure) -> None:
        """Stop the run if the same failed too often in a row.

        Raises:
            ServerError: If it did.
        """
        if tries >= self.most_failures:
            remedy = "see whether it is up, then run the same command; batches that are there go on meanwhile"
            raise ServerError(f"no answer in {tries} attempts, the last: {failure}", where=self.where, remedy=remedy)

    def _once(self, ask: Callable[[], Any], kind: type[Answer]) -> Answer:
        try:
            answer = ask()
        except openai.APIStatusError as error:
            raise self._failure(self._reply_in(error)) from error
        except (openai.APIError, ValueError) as error:
            raise self._broken(error) from error
        except Exception as error:
            if not _is_of_http_library(error):  # whose name differs between versions of openai
                raise
            raise self._broken(error) from error
        if isinstance(answer, kind) and getattr(answer, "id", "") is not None:
            self.most_failures = MOST_FAILURES
            return answer
        raise ServerError("answers, but not as the Batch API does", where=self.where, remedy=_NO_BATCH_API)

    def _broken(self, error: Exception) -> Unsure:
        cause = error.__cause__ or error
        return Unsure(self._access.redact(f"the connection broke ({str(cause) or type(cause).__name__})"), None)

    def _reply_in(self, error: openai.APIStatusError) -> Reply:
        text = self._access.redact(error.response.content.decode("utf-8", "replace"))
        headers = {name.lower(): value for name, value in error.response.headers.items()}
        return Reply("failed", error.status_code, text, headers)

    def _failure(self, reply: Reply) -> Exception:
        words = words_of(reply)
        if verdict_on(reply) == "again":
            return Unsure(words, retry_after_s(reply.headers, time.time()))
        remedy = _NO_BATCH_API if reply.http_status in _NOT_OFFERED else remedy_for(reply)
        return ServerError(words, where=self.where, remedy=remedy)


_NO_BATCH_API = (
    "use the base_url and key that the batches were made with, or distill.batch_api=false where none were made"
)


def _connect(server: ServerSettings, access: Access) -> openai.OpenAI:
    try:
        return openai.OpenAI(
            base_url=access.base_url, api_key=access.api_key or "none", timeout=server.timeout_s, max_retries=0
        )
    except Exception as error:
        if not _is_of_http_library(error):
            raise
        raise ConfigError(f"{access.shown_url!r} is no address ({error})", where="base_url") from error


def _is_of_http_library(error: Exception) -> bool:
    return type(error).__module__.partition(".")[0] in ("httpx", "httpx2")


def _metadata(shard: Shard, job: str) -> dict[str, str]:
    return {
        "personas_tune_job": job,
        "personas_tune_shard": shard.sha256,
        "personas_tune_try": str(shard.number),
    }


def _key_in(metadata: dict[str, str], job: str) -> tuple[str, int] | None:
    number = str(metadata.get("personas_tune_try"))
    if metadata.get("personas_tune_job") != job or not number.isdecimal():
        return None
    return metadata.get("personas_tune_shard", ""), int(number)
