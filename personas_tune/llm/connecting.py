"""Makes the openai library's connections, whatever stands in the environment."""

from typing import Any, TypeVar
from urllib.request import getproxies

import openai

from personas_tune.errors import ConfigError
from personas_tune.llm.settings import Access, ServerSettings

Connection = TypeVar("Connection", openai.AsyncOpenAI, openai.OpenAI)

_REMEDY = "see to base_url and to the environment's proxies, SSL_CERT_FILE and OPENAI_... variables"


def connect(kind: type[Connection], server: ServerSettings, access: Access) -> Connection:
    """A connection that sends each request once; nothing is sent yet.

    Args:
        kind: ``openai.AsyncOpenAI`` or ``openai.OpenAI``.
        server: The server's settings.
        access: Its address and key.

    Raises:
        ConfigError: If the library can't do with the address or with what the environment says of proxies,
            certificates and the organisation.
    """
    try:
        connection = kind(
            base_url=access.base_url, api_key=access.api_key or "none", timeout=server.timeout_s, max_retries=0
        )
        _check_headers(connection.default_headers)
    except Exception as error:  # of three libraries, one of which goes by another name in other versions of openai
        words = f"can't connect: {_words_of(error, access)}"
    else:
        return connection
    raise ConfigError(words, where=access.shown_url, remedy=_REMEDY)


def headers_for(access: Access) -> dict[str, Any]:
    """What to send in place of the library's own ``Authorization``."""
    if access.basic is not None:
        return {"Authorization": access.basic}
    return {} if access.api_key is not None else {"Authorization": openai.Omit()}


def _check_headers(headers: Any) -> None:
    """Refuse those that would only be refused when the first request is sent."""
    for name, value in headers.items():
        if isinstance(value, str) and not (f"{name}{value}".isascii() and f"{name}{value}".isprintable()):
            raise ValueError(f"the header {name} holds characters that can't be sent")


def _words_of(error: Exception, access: Access) -> str:
    """What went wrong; a name and password of a proxy may be a part of what the library quotes."""
    if any("@" in proxy for proxy in getproxies().values()):
        return type(error).__name__
    return access.redact(str(error) or type(error).__name__)
