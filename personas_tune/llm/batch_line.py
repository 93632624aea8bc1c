"""Asks a server of the Batch API one thing at a time, again where that may help."""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property
from typing import Any, TypeVar

import openai
from openai.pagination import SyncCursorPage

from personas_tune.errors import ServerError
from personas_tune.llm.batch_stop import Stop
from personas_tune.llm.connecting import connect, headers_for
from personas_tune.llm.failures import Reply, backoff_s, remedy_for, retry_after_s, verdict_on, words_of
from personas_tune.llm.settings import Access, ServerSettings, access_to

MOST_FAILURES = 200  # in a row, of a server that was there before; with waits of up to a minute between them
MOST_LOOKS = 3  # for what isn't there
LONGEST_NAP_S = 60.0  # between them
_NOT_OFFERED = (404, 405, 501)

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


class NotThereError(ServerError):
    """The server knows nothing of that id."""


class Line:
    """A connection to a server, made when it is needed.

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

    def close(self) -> None:
        """Close the connection, if there is one."""
        if "api" in self.__dict__:
            self.api.close()

    @property
    def where(self) -> str:
        """Its address, for messages."""
        return self.access.shown_url

    @cached_property
    def access(self) -> Access:
        """Its address and key."""
        return access_to(self._server)

    @cached_property
    def headers(self) -> dict[str, Any]:
        """What each request is sent with."""
        return headers_for(self.access)

    @cached_property
    def api(self) -> openai.OpenAI:
        """The library's connection."""
        return connect(openai.OpenAI, self._server, self.access)

    def all_of(self, list_first: Callable[[], Any]) -> Iterator[Any]:
        """All entries of a listing, page after page."""
        page = self.patiently(list_first, SyncCursorPage)
        yield from page.data
        while page.data and page.has_next_page():
            page = self.patiently(page.get_next_page, SyncCursorPage)
            yield from page.data

    def find(self, ask: Callable[[], Any], kind: type[Answer]) -> Answer | None:
        """As :meth:`patiently`, for what may be gone."""
        for look in range(MOST_LOOKS):
            if look:
                self._stop.sleep(min(self._poll_s, LONGEST_NAP_S))
            with suppress(NotThereError):
                return self.patiently(ask, kind)
        return None

    def patiently(self, ask: Callable[[], Any], kind: type[Answer]) -> Answer:
        """Ask what changes nothing at the server, until it answers."""
        tries = 0
        while True:
            try:
                with self._stop.allowed():
                    return self.once(ask, kind)
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

    def once(self, ask: Callable[[], Any], kind: type[Answer]) -> Answer:
        """Ask once.

        Raises:
            Unsure: If no answer came, or one that says to come again.
            ServerError: If it won't be answered.
        """
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
        return Unsure(self.access.redact(f"the connection broke ({str(cause) or type(cause).__name__})"), None)

    def _reply_in(self, error: openai.APIStatusError) -> Reply:
        text = self.access.redact(error.response.content.decode("utf-8", "replace"))
        headers = {name.lower(): value for name, value in error.response.headers.items()}
        return Reply("failed", error.status_code, text, headers)

    def _failure(self, reply: Reply) -> Exception:
        words = words_of(reply)
        if verdict_on(reply) == "again":
            return Unsure(words, retry_after_s(reply.headers, time.time()))
        remedy = _NO_BATCH_API if reply.http_status in _NOT_OFFERED else remedy_for(reply)
        kind = NotThereError if reply.http_status == 404 else ServerError
        return kind(words, where=self.where, remedy=remedy)


_NO_BATCH_API = (
    "use the base_url and key that the batches were made with, or distill.batch_api=false where none were made"
)


def _is_of_http_library(error: Exception) -> bool:
    return type(error).__module__.partition(".")[0] in ("httpx", "httpx2")
