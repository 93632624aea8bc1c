"""Hierarchical reflection: a user's profile grows batch by batch, with a reason for every rating.

After section 3.2 and appendix A of the paper. Each call sees the profile as it stands and the next
batch of ratings, and gives a reason for each rating and the profile revised by them. A profile that
outgrows its budget is shortened by a call of its own before the next batch is looked at.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from personas_tune.llm.calls import CHAT, Call, Chain, Request
from personas_tune.memory.reflection_answers import read_consolidation, read_reflection
from personas_tune.memory.reflection_prompts import (
    CONSOLIDATION_SCHEMA,
    REFLECTION_SCHEMA,
    Messages,
    consolidation_messages,
    reflection_messages,
)
from personas_tune.memory.reflection_prompts import PROMPT_VERSION as PROMPT_VERSION
from personas_tune.memory.stream import RatedItem, UserHistory
from personas_tune.memory.tables import MemoryRow, Reflected
from personas_tune.memory.wording import count_words, domain_words, no_history_sentence, rating_fact, squeeze

TOKENS_PER_WORD = 1.4  # of English in JSON, with its punctuation
REASON_FILL, PROFILE_FILL = 0.7, 0.8  # how much of their budgets reasons and profiles use


@dataclass(frozen=True)
class ReflectionSettings:
    """What decides the calls and which answers are let through.

    Args:
        model: The server's name of the model.
        batch_size: How many ratings a call looks at, at most.
        max_words: Bound on all the words of one answer.
        profile_words: Bound on a profile.
        memory_words: How long a reason is to be; answers may exceed it up to twofold.
        response_format: How the server is told the form of its answer; ``none`` leaves it to the prompt.
        sampling: Sent as it stands: temperature, seed, ...
        max_output_tokens: After so many the server cuts an answer off.
        output_limit_name: What the server calls that bound: ``max_completion_tokens`` or ``max_tokens``.
        template: ``prompt.template``; chooses the domain's words.
        top: The highest possible rating.
    """

    model: str
    batch_size: int
    max_words: int
    profile_words: int
    memory_words: int
    response_format: Literal["json_schema", "json_object", "none"]
    sampling: Mapping[str, bool | int | float | str | None]
    max_output_tokens: int
    output_limit_name: str
    template: str
    top: float


def reflect_on(history: UserHistory, settings: ReflectionSettings) -> Chain[Reflected]:
    """Distil one user, in as many calls as there are batches and consolidations.

    A call depends on nothing but the settings, the answers before it and the ratings up to its
    batch's last. A user without train interactions makes no call.
    """
    profiles = [(0, no_history_sentence(domain_words(settings.template)))]
    memories: list[MemoryRow] = []
    profile = ""
    for begin in range(0, len(history.rated), settings.batch_size):
        batch = history.rated[begin : begin + settings.batch_size]
        reasons, profile = yield _reflection_call(profile, batch, settings)
        if count_words(profile) > settings.profile_words:
            profile = yield _consolidation_call(profile, settings)
        profiles.append((begin + len(batch), profile))
        memories += [
            _memory_row(history.user_id, rated, reason, settings.top)
            for rated, reason in zip(batch, reasons, strict=True)
        ]
    return Reflected(history.user_id, tuple(profiles), tuple(memories))


def typical_answer(call: Call, settings: ReflectionSettings) -> Any:
    """What to send a chain in place of an answer that isn't there yet, as long as answers usually are.

    For estimates only: what such a chain returns is worth nothing.
    """
    assert isinstance(call.read, partial)
    profile = " ".join(["taste"] * round(settings.profile_words * PROFILE_FILL))
    n_items = call.read.keywords.get("n_items")
    return profile if n_items is None else (("",) * n_items, profile)


def _memory_row(user_id: str, rated: RatedItem, reason: str, top: float) -> MemoryRow:
    """The fact is ours, the reason the model's."""
    memory = f"{rating_fact(rated.title, rated.rating, top, rated.mean_rating)} {reason}"
    return user_id, rated.item_id, rated.position, rated.rating, squeeze(memory)


def _reflection_call(profile: str, batch: Sequence[RatedItem], settings: ReflectionSettings) -> Call:
    messages = reflection_messages(
        profile,
        batch,
        words=domain_words(settings.template),
        top=settings.top,
        memory_words=settings.memory_words,
        profile_words=settings.profile_words,
    )
    read = partial(
        read_reflection, n_items=len(batch), memory_words=settings.memory_words, max_words=settings.max_words
    )
    n_words = len(batch) * settings.memory_words * REASON_FILL + settings.profile_words * PROFILE_FILL
    request = _request("reflection", messages, REFLECTION_SCHEMA, settings)
    return Call(request, read, _expected_tokens(n_words, settings))


def _consolidation_call(profile: str, settings: ReflectionSettings) -> Call:
    words = domain_words(settings.template)
    messages = consolidation_messages(profile, words=words, profile_words=settings.profile_words)
    read = partial(read_consolidation, profile_words=settings.profile_words, max_words=settings.max_words)
    request = _request("consolidation", messages, CONSOLIDATION_SCHEMA, settings)
    return Call(request, read, _expected_tokens(settings.profile_words * PROFILE_FILL, settings))


def _expected_tokens(n_words: float, settings: ReflectionSettings) -> int:
    return min(math.ceil(TOKENS_PER_WORD * n_words), settings.max_output_tokens)


def _request(name: str, messages: Messages, schema: Mapping[str, Any], settings: ReflectionSettings) -> Request:
    body = {
        **settings.sampling,
        "model": settings.model,
        "messages": messages,
        **_response_format(name, schema, settings),
    }
    return Request(CHAT, body, PROMPT_VERSION, limits={settings.output_limit_name: settings.max_output_tokens})


def _response_format(name: str, schema: Mapping[str, Any], settings: ReflectionSettings) -> dict[str, Any]:
    match settings.response_format:
        case "json_schema":
            form = {"name": name, "strict": True, "schema": schema}
            return {"response_format": {"type": "json_schema", "json_schema": form}}
        case "json_object":
            return {"response_format": {"type": "json_object"}}
        case "none":
            return {}
