"""Sends single requests by the openai library and returns what came of it, whatever that is.

The library neither retries nor parses: raw texts are kept before anybody reads them, and every
attempt is an attempt of ours.
"""

import asyncio
from collections.abc import Mapping
from typing import Any

import openai

from personas_tune.llm.calls import CHAT, COMPLETIONS, EMBEDDINGS
from personas_tune.llm.connecting import connect, headers_for
from personas_tune.llm.failures import Reply
from personas_tune.llm.settings import Access, ServerSettings

LOOK_AT_MODEL_S = 10.0
# The library insists on these and walks through what it gets, a fifth of a call's work; `extra_body` overrides them
# and is sent as it stands. Without an encoding_format it would ask for base64, which no journalled body says.
_ARGUMENTS: dict[str, dict[str, Any]] = {
    CHAT: {"messages": []},
    COMPLETIONS: {"prompt": []},
    EMBEDDINGS: {"input": [], "encoding_format": "float"},
}
_BEFORE_SENDING = ("ConnectError", "ConnectTimeout", "PoolTimeout", "ProxyError")


class Client:
    """A connection to one server.

    Args:
        server: Its settings.
        access: Its address and key, from :func:`personas_tune.llm.settings.access_to`.
    """

    def __init__(self, server: ServerSettings, access: Access) -> None:
        self._access = access
        self._timeout_s = server.timeout_s
        self._headers = headers_for(access)
        self._openai = connect(openai.AsyncOpenAI, server, access)
        self._create = {
            CHAT: self._openai.chat.completions.with_raw_response.create,
            COMPLETIONS: self._openai.completions.with_raw_response.create,
            EMBEDDINGS: self._openai.embeddings.with_raw_response.create,
        }

    async def close(self) -> None:
        """Close the connections."""
        await self._openai.close()

    async def send(self, path: str, body: Mapping[str, Any]) -> Reply:
        """Send one request, once; errors of the server and of the line are replies, too.

        Args:
            path: The endpoint below the base URL.
            body: The whole of what is sent.
        """
        create = self._create[path]
        return await self._reply(create, self._timeout_s, model=body["model"], **_ARGUMENTS[path], extra_body=body)

    async def look_at_model(self, model: str) -> Reply:
        """What the server tells of a model."""
        look = self._openai.models.with_raw_response.retrieve
        return await self._reply(look, min(LOOK_AT_MODEL_S, self._timeout_s), model=model)

    async def list_models(self) -> Reply:
        """Which models the server has."""
        return await self._reply(self._openai.models.with_raw_response.list, min(LOOK_AT_MODEL_S, self._timeout_s))

    async def _reply(self, request: Any, timeout_s: float, **arguments: Any) -> Reply:
        try:
            async with asyncio.timeout(timeout_s):  # the library's own would start anew with every byte
                raw = await request(**arguments, extra_headers=self._headers)
            return self._reply_from("answered", raw.http_response)
        except openai.APIStatusError as error:
            return self._reply_from("failed", error.response)
        except (TimeoutError, openai.APITimeoutError) as error:
            if _was_sent(error):
                return Reply("lost", None, f"no whole answer within {timeout_s:g} s")
            return Reply("failed", None, f"no connection within {timeout_s:g} s")
        except (openai.APIConnectionError, OSError) as error:
            cause = self._access.redact(str(error.__cause__ or error) or type(error.__cause__).__name__)
            if _was_sent(error):
                return Reply("lost", None, f"the connection broke ({cause})")
            return Reply("failed", None, f"no connection ({cause})")

    def _reply_from(self, status: Any, response: Any) -> Reply:
        text = self._access.redact(response.content.decode("utf-8", "replace"))
        headers = {name.lower(): self._access.redact(value) for name, value in response.headers.items()}
        return Reply(status, response.status_code, text, headers)


def _was_sent(error: BaseException) -> bool:
    return type(error.__cause__).__name__ not in _BEFORE_SENDING
