"""What is asked of a server, and chains of calls of which each depends on the answers before it.

A chain is a generator: it yields a :class:`Call` and is sent what the call's ``read`` made of the
server's answer. So the same chain runs against a server, in waves of the Batch API, or on journalled
answers alone, and knows nothing of any of them.
"""

import hashlib
import json
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias, TypeVar

CHAT = "/chat/completions"
EMBEDDINGS = "/embeddings"
COMPLETIONS = "/completions"

Result = TypeVar("Result")


class Rejected(Exception):  # noqa: N818
    """A delivered answer that can't be used; the text says what is wrong with it, for the model to read."""


@dataclass(frozen=True)
class Request:
    """One request, without the server's address and without the key.

    Args:
        path: The endpoint below the base URL, such as :data:`CHAT`.
        body: What is sent: model, messages, response format, sampling.
        version: The version of the prompt's wording.
        limits: Sent too, but no part of the name, as they don't change what is asked: how long an answer may be.
    """

    path: str
    body: Mapping[str, Any]
    version: str
    limits: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def sha256(self) -> str:
        """Names the request: hex sha256 of its canonical JSON (sorted keys, no blanks)."""
        material = {"path": self.path, "body": self.body, "version": self.version}
        text = json.dumps(material, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def body_after(self, complaint: str | None) -> dict[str, Any]:
        """The body to send once an answer was rejected with ``complaint``; the body itself for None.

        The request keeps its name: whatever answers it, however often it was asked, is its answer.
        """
        if complaint is None or "messages" not in self.body:
            return {**self.body, **self.limits}
        words = f"Your last answer could not be used: {complaint}. Answer again, in full, as asked above."
        return {**self.body, **self.limits, "messages": [*self.body["messages"], {"role": "user", "content": words}]}


@dataclass(frozen=True)
class Call:
    """A request and how its answer is read.

    Args:
        request: What is asked.
        read: From the whole body of an HTTP answer of status 200 to what the chain goes on with.
            Depends on nothing but the body. Raises :class:`Rejected`.
        expected_output_tokens: How long the answer probably is, for limits and budgets.
        parts: Names (hex sha256) of what the answer is made of, in its order, if each is to be found by itself:
            the texts of a request for embeddings.
    """

    request: Request
    read: Callable[[str], Any]
    expected_output_tokens: int
    parts: tuple[str, ...] = ()


Chain: TypeAlias = Generator[Call, Any, Result]
