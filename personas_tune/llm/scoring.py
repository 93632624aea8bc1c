"""Log probabilities of chosen next tokens, read from a server's ``/v1/completions``.

vLLM gives, for a prompt of token ids, the log probabilities of the tokens named in ``logprob_token_ids``
over its whole vocabulary, before any sampling setting changes them. It reads the prompt from its prefix
cache where it can. The log probabilities of a prompt's own tokens (``echo``, ``prompt_logprobs``) are as
exact, but for them it leaves the cache aside and reads every prompt anew.
"""

import asyncio
import json
import math
import random
import time
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from personas_tune.errors import ServerError
from personas_tune.llm.budget import Budget
from personas_tune.llm.calls import COMPLETIONS, Rejected
from personas_tune.llm.client import Client
from personas_tune.llm.failures import Reply, backoff_s, remedy_for, retry_after_s, verdict_on, words_of
from personas_tune.llm.journal import Usage
from personas_tune.llm.limits import Gate
from personas_tune.llm.settings import Access, ServerSettings, access_to

MOST_TOKENS_ASKED = 128  # that vLLM takes in one request
LogProbabilities = dict[int, float]
Result = TypeVar("Result")


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


def served_models(server: ServerSettings) -> list[ServedModel]:
    """The models that a server has.

    Raises:
        ServerError: If it is down or its answer can't be read.
        ConfigError: If its address is none.
    """
    access = access_to(server)
    reply = _finished(_list_models(server, access))
    if reply.status != "answered":
        raise ServerError(words_of(reply), where=access.shown_url, remedy=_remedy(reply))
    try:
        return [ServedModel(str(entry["id"]), entry.get("parent")) for entry in json.loads(reply.text)["data"]]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ServerError("no list of models", where=access.shown_url, remedy="check base_url") from error


def read_next_tokens(server: ServerSettings, readings: Sequence[Reading]) -> list[list[LogProbabilities]]:
    """Send requests, at most ``server.concurrency`` at a time and in their order.

    Args:
        server: Who is asked; what throttles or breaks off is asked again, up to ``max_retries`` times.
        readings: What is asked.

    Returns:
        For each request, for each of its ``more``: the tokens' log probabilities.

    Raises:
        ServerError: If a request isn't answered, or not as asked.
        ConfigError: If the server's address is none.
    """
    return _finished(_read_all(server, readings)) if readings else []


async def _list_models(server: ServerSettings, access: Access) -> Reply:
    client = Client(server, access)
    try:
        return await client.list_models()
    finally:
        await client.close()


async def _read_all(server: ServerSettings, readings: Sequence[Reading]) -> list[list[LogProbabilities]]:
    access = access_to(server)
    reader = _Reader(server, access)
    found: list[list[LogProbabilities]] = [[] for _ in readings]
    left = iter(enumerate(readings))
    workers = [
        asyncio.create_task(_work_off(left, reader, found)) for _ in range(min(server.concurrency, len(readings)))
    ]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        await reader.client.close()
    return found


async def _work_off(
    left: Iterator[tuple[int, Reading]], reader: "_Reader", found: list[list[LogProbabilities]]
) -> None:
    for place, reading in left:
        found[place] = await reader.read(reading)


class _Reader:
    """Asks one server, and again where that may help."""

    def __init__(self, server: ServerSettings, access: Access) -> None:
        self.client = Client(server, access)
        self._url = access.shown_url
        self._max_retries = server.max_retries
        self._gate = Gate(server, Budget(), kept_in="")
        self._draw = random.Random()

    async def read(self, reading: Reading) -> list[LogProbabilities]:
        where = f"{self._url}, model {reading.model}"
        text = await self._answer(reading.body, where)
        try:
            return read_log_probabilities(text, len(reading.more), reading.tokens)
        except Rejected as error:
            remedy = "it takes a server with logprob_token_ids in /v1/completions, such as vLLM 0.33"
            raise ServerError(str(error), where=where, remedy=remedy) from error

    async def _answer(self, body: dict[str, Any], where: str) -> str:
        tries = 0
        while True:
            reply = await self._sent(body, tries)
            if reply.status == "answered":
                return reply.text
            tries += 1
            if verdict_on(reply) != "again":
                raise ServerError(words_of(reply), where=where, remedy=_remedy(reply))
            if tries > self._max_retries:
                what = f"no answer in {tries} attempts, the last: {words_of(reply)}"
                raise ServerError(what, where=where, remedy=_remedy(reply))
            await self._gate.nap(backoff_s(tries - 1, self._draw))

    async def _sent(self, body: dict[str, Any], tries: int) -> Reply:
        loop = asyncio.get_running_loop()
        await self._gate.enter(Usage(), tries)
        sent_at = loop.time()
        try:
            reply = await self.client.send(COMPLETIONS, body)
        finally:
            self._gate.leave(Usage(), Usage())
        if reply.status == "answered":
            self._gate.window.grow()
        elif reply.is_throttled:
            self._gate.shrink(sent_at)
            self._gate.pause(retry_after_s(reply.headers, time.time()) or 0.0)
        return reply


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


def _finished(work: Coroutine[Any, Any, Result]) -> Result:
    """What a coroutine returns; in a notebook, whose event loop is running already, it gets a thread of its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()
