"""Which server is asked, with which key, and how hard and how dearly it may be used."""

import base64
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any
from urllib.parse import SplitResult, quote, unquote, urlsplit

from personas_tune.errors import ConfigError, ServerError
from personas_tune.llm.budget import Prices

_OPENAI_HOST = "api.openai.com"
OPENAI_URL = f"https://{_OPENAI_HOST}/v1"
KEY_VARIABLE = "OPENAI_API_KEY"
_SHORTEST_SECRET = 8  # local servers take keys such as "none", which are words of any answer


@dataclass(frozen=True)
class ServerSettings:
    """An OpenAI-compatible server and the bounds on its use.

    Args:
        model: The model's name at the server.
        base_url: Where the API lies, such as ``http://localhost:8000/v1``; if None, what ``OPENAI_BASE_URL``
            says, or OpenAI's.
        concurrency: Most calls in flight.
        requests_per_minute: Learnt from the server's headers if None; so is ``tokens_per_minute``.
        tokens_per_minute: Input and output tokens.
        timeout_s: For a whole call, from connecting to the answer's last byte.
        max_retries: Of one call after 408, 409, 429, 5xx and broken connections.
        prices: The model's.
        max_usd: What the whole job may cost, over all runs on one journal.
        max_tokens: Input and output tokens that the whole job may take, over all runs on one journal.
        section: The part of a config that has these settings, for messages.
    """

    model: str
    base_url: str | None = None
    concurrency: int = 32
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    timeout_s: float = 120.0
    max_retries: int = 8
    prices: Prices | None = None
    max_usd: float | None = None
    max_tokens: int | None = None
    section: str = "distill"

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> "ServerSettings":
        """The settings in a config's section, which may have more keys, and ``prices`` as a mapping or None."""
        own = {each.name: section[each.name] for each in fields(cls) if each.name in section}
        prices = own.get("prices")
        return cls(**{**own, "prices": None if prices is None else Prices(**prices)})


@dataclass(frozen=True)
class Access:
    """Where a server is and what opens it.

    Args:
        base_url: Its address, without a name and password.
        api_key: The key from the environment, if there is one.
        basic: What to send as the ``Authorization`` header in place of the key: the address's name and password.
    """

    base_url: str
    api_key: str | None = field(default=None, repr=False)
    basic: str | None = field(default=None, repr=False)

    @property
    def shown_url(self) -> str:
        """The address for messages: a query may hold secrets, too."""
        return self.base_url.partition("?")[0]

    def redact(self, text: str) -> str:
        """The text without the key, should a server or proxy have echoed it."""
        for secret in self._secrets:
            text = text.replace(secret, "[key]")
        return text

    @cached_property
    def _secrets(self) -> list[str]:
        secrets: list[str] = []
        for words in (self.api_key, self.basic):
            for word in (words or "").split():
                secrets += [word, json.dumps(word)[1:-1], quote(word, safe="")]
        if self.basic is not None:
            name_and_password = base64.b64decode(self.basic.removeprefix("Basic ")).decode()
            secrets += [name_and_password, name_and_password.partition(":")[2]]
        return [secret for secret in dict.fromkeys(secrets) if len(secret) >= _SHORTEST_SECRET]


def access_to(server: ServerSettings, environment: Mapping[str, str] = os.environ) -> Access:
    """Find a server's address and key.

    The address comes from the settings, else from ``OPENAI_BASE_URL``, else it is OpenAI's; the key from
    ``OPENAI_API_KEY``.

    Raises:
        ConfigError: If the address is none, or has a query.
        ServerError: If the server is OpenAI's and there is no key, or if the key can't be one.
    """
    url = _url_of(server, environment)
    key = environment.get(KEY_VARIABLE, "").strip() or None
    if key is not None and not (key.isascii() and key.isprintable()):
        raise ServerError("holds characters that are in no key", where=KEY_VARIABLE, remedy=_EXPORT)
    if key is None and url.hostname == _OPENAI_HOST:
        raise ServerError("no key", where=f"https://{url.hostname}", remedy=_EXPORT)
    bare = url._replace(netloc=url.netloc.rpartition("@")[2])
    return Access(bare.geturl(), key, _basic(url))


def output_limit_name(server: ServerSettings, environment: Mapping[str, str] = os.environ) -> str:
    """What the server calls the bound on an answer's tokens: OpenAI's newer models refuse the older name.

    Raises:
        ConfigError: If the server's address is none, or has a query.
    """
    is_openais = _url_of(server, environment).hostname == _OPENAI_HOST
    return "max_completion_tokens" if is_openais else "max_tokens"


_EXPORT = f"export {KEY_VARIABLE}=... (it is read from nowhere else)"


def _url_of(server: ServerSettings, environment: Mapping[str, str]) -> SplitResult:
    given = server.base_url or environment.get("OPENAI_BASE_URL") or OPENAI_URL
    return _split(given.strip())


def _split(base_url: str) -> SplitResult:
    try:
        url = urlsplit(base_url)
        if url.query:
            what = "a query doesn't reach the server's endpoints"
            raise ConfigError(what, where="base_url", remedy="give the address without it")
        if url.scheme in ("http", "https") and url.hostname and url.port != 0:
            return url
    except ValueError:  # a port that is no number, half a bracket
        pass
    shown = base_url.rpartition("@")[2].partition("?")[0]
    raise ConfigError(f"{shown!r} is no address", where="base_url", remedy="such as http://localhost:8000/v1") from None


def _basic(url: SplitResult) -> str | None:
    if url.username is None and url.password is None:
        return None
    name_and_password = f"{unquote(url.username or '')}:{unquote(url.password or '')}"
    return "Basic " + base64.b64encode(name_and_password.encode()).decode()
