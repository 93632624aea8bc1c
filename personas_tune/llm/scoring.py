"""Log probabilities of chosen next tokens, read from a server's ``/v1/completions``.

vLLM gives, for a prompt of token ids, the log probabilities of the tokens named in ``logprob_token_ids``
over its whole vocabulary, before any sampling setting changes them. It reads the prompt from its prefix
cache where it can. The log probabilities of a prompt's own tokens (``echo``, ``prompt_logprobs``) are as
exact, but for them it leaves the cache aside and reads every prompt anew.
"""

import asyncio
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self

from personas_tune.errors import ServerError
from personas_tune.llm.background import BackgroundLoop
from personas_tune.llm.budget import Budget
from personas_tune.llm.calls import COMPLETIONS, Rejected
from personas_tune.llm.client import Client
from personas_tune.llm.failures import Reply, remedy_for, verdict_on, words_of
from personas_tune.llm.journal import Usage
from personas_tune.llm.limits import Gate
from personas_tune.llm.sending import Sender, Unanswered
from personas_tune.llm.settings import ServerSettings, access_to

MOST_TOKENS_ASKED = 128  # that vLLM takes in one request
LogProbabilities = dict[int, float]


@dataclass(frozen=True)
class Reading:
    """One request: what may come next after a prompt and some tokens more.

    Args:
        model: The model's name at the server.
        prompt: Token ids.
        more: What follows the prompt, token ids too, perhaps none; for each, what may come next is asked.
        tokens: Whose log probabilities are asked for.
    """

    model: str
    prompt: list[int]
    more: Sequence[Sequence[int]]
    tokens: Sequence[int]

    @property
    def body(self) -> dict[str, Any]:
        """What is sent; the one token that is drawn is of no interest."""
        return {
            "model": self.model,
            "prompt": [[*self.prompt, *more] for more in self.more],
            "max_tokens": 1,
            "temperature": 1.0,
            "logprobs": len(self.tokens),
            "logprob_token_ids": list(self.tokens),
            "return_tokens_as_token_ids": True,
        }


@dataclass(frozen=True)
class ServedModel:
    """A model of a server.

    Args:
        name: What requests call it.
        parent: Of an adapter: its base's name.
    """

    name: str
    parent: str | None


class Scorer:
    """Asks servers, over connections that stay open from call to call.

    Close it, or use it in a ``with`` block; one that is let go of closes itself.

    Args:
        servers: By names of the caller's.

    Attributes:
        shown_urls: Their addresses, for messages.

    Raises:
        ConfigError: If an address is none.
    """

    def __init__(self, servers: Mapping[str, ServerSettings]) -> None:
        accesses = {name: access_to(server) for name, server in servers.items()}
        self.shown_urls = {name: access.shown_url for name, access in accesses.items()}
        self._servers = dict(servers)
        self._clients = {name: Client(server, accesses[name]) for name, server in servers.items()}
        self._background = BackgroundLoop([client.close for client in self._clients.values()])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; again it does nothing."""
        self._background.close()

    def models(self, name: str) -> list[ServedModel]:
        """The models that a server has.

        Raises:
            ServerError: If it is down or its answer can't be read.
        """
        where = self.shown_urls[name]
        reply = self._background.run(self._clients[name].list_models())
        if reply.status != "answered":
            raise ServerError(words_of(reply), where=where, remedy=_remedy(reply))
        try:
            return [ServedModel(str(entry["id"]), entry.get("parent")) for entry in json.loads(reply.text)["data"]]
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ServerError("no list of models", where=where, remedy="check base_url") from error

    def read(self, readings: Sequence[tuple[str, Reading]]) -> list[list[LogProbabilities]]:
        """Send requests, to each server at most its ``concurrency`` at a time and in their order.

        Args:
            readings: Which server is asked, and what; what throttles or breaks off is asked again, up to
                ``max_retries`` times.

        Returns:
            For each request, for each of its ``more``: the tokens' log probabilities.

        Raises:
            ServerError: If a request isn't answered, or not as asked.
        """
        if self._background.is_closed:
            raise ServerError("the agent is closed", where="agent", remedy="load it again")
        return self._background.run(self._read_all(readings))

    async def _read_all(self, readings: Sequence[tuple[str, Reading]]) -> list[list[LogProbabilities]]:
        found: list[list[LogProbabilities]] = [[] for _ in readings]
        workers = []
        for name, server in self._servers.items():
            mine = [(place, reading) for place, (asked, reading) in enumerate(readings) if asked == name]
            reader, left = _Reader(server, self._clients[name], self.shown_urls[name]), iter(mine)
            n_workers = min(server.concurrency, len(mine))
            workers += [asyncio.create_task(_work_off(left, reader, found)) for _ in range(n_workers)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        return found


async def _work_off(
    left: Iterator[tuple[int, Reading]], reader: "_Reader", found: list[list[LogProbabilities]]
) -> None:
    for place, reading in left:
        found[place] = await reader.read(str(place), reading)


class _Reader:
    """Asks one server, and again where that may help."""

    def __init__(self, server: ServerSettings, client: Client, shown_url: str) -> None:
        self._client = client
        self._url = shown_url
        self._sender = Sender(server.max_retries, Gate(server, Budget(), kept_in=""), lambda words, kind: None)

    async def read(self, name: str, reading: Reading) -> list[LogProbabilities]:
        where = f"{self._url}, model {reading.model}"
        estimate = Usage(input_tokens=sum(len(reading.prompt) + len(more) for more in reading.more))
        send = partial(self._client.send, COMPLETIONS, reading.body)
        reply = await self._sender.until_answered(name, estimate, send, _keep_nothing)
        if isinstance(reply, Unanswered):
            raise ServerError(reply.words, where=where, remedy=_remedy(reply.reply))
        try:
            return read_log_probabilities(reply.text, len(reading.more), reading.tokens)
        except Rejected as error:
            remedy = "it takes a server with logprob_token_ids in /v1/completions, such as vLLM 0.33"
            raise ServerError(str(error), where=where, remedy=remedy) from error


async def _keep_nothing(reply: Reply, usage: Usage, started: float) -> None:
    pass


def read_log_probabilities(body: str, n_prompts: int, tokens: Sequence[int]) -> list[LogProbabilities]:
    """The log probabilities in an answer of ``/v1/completions``.

    Args:
        body: The answer.
        n_prompts: How many prompts were sent.
        tokens: Which tokens were asked for.

    Raises:
        Rejected: If the answer lacks some.
    """
    try:
        choices = sorted(json.loads(body)["choices"], key=lambda choice: int(choice["index"]))
    except (ValueError, LookupError, TypeError) as error:
        raise Rejected("an answer without choices") from error
    if len(choices) != n_prompts:
        raise Rejected(f"{len(choices)} answers to {n_prompts} prompts")
    return [_told_after_prompt(choice, tokens) for choice in choices]


def _told_after_prompt(choice: Any, tokens: Sequence[int]) -> LogProbabilities:
    try:
        told = choice["logprobs"]["top_logprobs"][0]
        found = {token: float(told[f"token_id:{token}"]) for token in tokens}
    except (LookupError, TypeError, ValueError) as error:
        raise Rejected("an answer without the log probabilities of the tokens asked for") from error
    if not all(map(math.isfinite, found.values())):
        raise Rejected("an answer with log probabilities that are no numbers")
    return found


def _remedy(reply: Reply) -> str:
    if reply.http_status is None:
        return "see whether the server is up, and check base_url"
    if verdict_on(reply) == "refused":
        return "check that the served base and its context are the experiment's"
    return remedy_for(reply)
