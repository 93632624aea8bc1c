"""What came of sending a call, and what to do about it."""

import json
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, Literal, TypeAlias

from personas_tune.llm.journal import Status

BACKOFF_BASE_S = 0.5
BACKOFF_CAP_S = 60.0
LONGEST_PAUSE_S = 86_400.0

# again: the same call may succeed later. refused: it never will, and if nothing else does, a setting is wrong.
# unfit: it never will, and others may. stop: no call will.
Verdict: TypeAlias = Literal["answered", "again", "refused", "unfit", "stop"]

_OUT_OF_MONEY = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}
_REMEDIES = {
    401: "export OPENAI_API_KEY=... with a key that this server takes",
    402: "see to the account's plan and billing, then run the same command to go on",
    403: "ask for access, or name another model",
    404: "check model and base_url",
}


@dataclass(frozen=True)
class Reply:
    """What came of sending a request.

    Args:
        status: As in :class:`personas_tune.llm.journal.Attempt`.
        http_status: None if no answer came.
        text: The whole body, or what went wrong.
        headers: By names in lower case.
    """

    status: Status
    http_status: int | None
    text: str
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_throttled(self) -> bool:
        """Whether the server asks for fewer calls."""
        return self.http_status == 429


def verdict_on(reply: Reply) -> Verdict:
    """What to do about a reply."""
    if reply.status == "answered":
        return "answered"
    if reply.http_status is None:
        return "again"
    codes = _codes_in(reply.text)
    if codes & _OUT_OF_MONEY or reply.http_status in _REMEDIES:
        return "stop"
    if "content_filter" in codes:
        return "unfit"
    if reply.http_status in (408, 409, 425, 429) or reply.http_status >= 500:
        return "again"
    return "refused"


def words_of(reply: Reply) -> str:
    """The server's own words, or what went wrong on the way, in one line."""
    if reply.http_status is None:
        return reply.text
    message = "".join(letter if letter.isprintable() else " " for letter in _message_in(reply.text)[:2000])
    words = " ".join(message.split()) or "no words"
    return f"HTTP {reply.http_status}: {words if len(words) <= 300 else words[:300] + '...'}"


def remedy_for(reply: Reply) -> str:
    """What would work after a reply that stops the run."""
    if _codes_in(reply.text) & _OUT_OF_MONEY:
        return _REMEDIES[402]
    return _REMEDIES.get(reply.http_status or 0, "check model, sampling and response_format")


def retry_after_s(headers: Mapping[str, str], now: float) -> float | None:
    """How long the server asks us to wait.

    Args:
        headers: By names in lower case.
        now: Unix time.
    """
    waits = (
        _number(headers.get("retry-after-ms"), 1e-3),
        _number(headers.get("retry-after"), 1.0),
        _seconds_until(headers.get("retry-after"), now),
    )
    wait = next((wait for wait in waits if wait is not None), None)
    return None if wait is None else min(max(wait, 0.0), LONGEST_PAUSE_S)


def backoff_s(tries: int, draw: random.Random) -> float:
    """How long to wait after that many tries: evenly from 0 to a bound that doubles ("full jitter")."""
    return draw.uniform(0.0, min(BACKOFF_CAP_S, BACKOFF_BASE_S * 2.0 ** min(tries, 16)))


def _number(text: str | None, unit: float) -> float | None:
    try:
        number = float(text or "") * unit
    except ValueError:
        return None
    return None if math.isnan(number) else number


def _seconds_until(date: str | None, now: float) -> float | None:
    try:
        return None if date is None else parsedate_to_datetime(date).timestamp() - now
    except (ValueError, TypeError, IndexError, OverflowError):  # odd dates break the parser in odd ways
        return None


def _error_in(body: str) -> Any:
    """The part of an error's body that tells of it; the body itself if it has none."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return body
    return content.get("error") or content if isinstance(content, dict) else body


def _message_in(body: str) -> str:
    error = _error_in(body)
    if isinstance(error, dict):
        message = error.get("message") or error.get("detail")
        return message if isinstance(message, str) else json.dumps(message or error, ensure_ascii=False)
    return str(error)


def _codes_in(body: str) -> set[str]:
    error = _error_in(body)
    if not isinstance(error, dict):
        return set()
    return {code for code in (error.get("code"), error.get("type")) if isinstance(code, str)}
