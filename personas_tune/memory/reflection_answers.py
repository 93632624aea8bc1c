"""From the raw answer of a chat server to a profile and reasons, or to words on what is wrong with it.

Servers are not trusted to keep to a schema: many local ones ignore it. The words of a
:class:`~personas_tune.llm.calls.Rejected` are sent back to the model, so they say what to do.
"""

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from personas_tune.llm.calls import Rejected
from personas_tune.memory.wording import count_words, squeeze

MAX_NAMED = 5  # mistakes of one kind in a complaint
MAX_QUOTED = 200  # characters of a server's or model's own words in a complaint

# What pydantic's types of errors are called in a complaint.
_MISTAKES = {
    "missing": "is missing",
    "extra_forbidden": "was not asked for",
    "list_type": "is not a list",
    "string_type": "is not a string",
    "model_type": "is not an object",
}
_OTHER = "is not a whole number"  # all that is left


class Reason(BaseModel):
    """Why one item was rated as it was; ``item`` is its number in the prompt."""

    model_config = ConfigDict(extra="forbid")

    item: int
    reason: str


class Reflection(BaseModel):
    """What a reflection gives: its JSON schema is ``REFLECTION_SCHEMA``."""

    model_config = ConfigDict(extra="forbid")

    memories: list[Reason]
    profile: str


class Consolidation(BaseModel):
    """What a consolidation gives: its JSON schema is ``CONSOLIDATION_SCHEMA``."""

    model_config = ConfigDict(extra="forbid")

    profile: str


Form = TypeVar("Form", Reflection, Consolidation)


def read_reflection(body: str, *, n_items: int, memory_words: int, max_words: int) -> tuple[tuple[str, ...], str]:
    """The reasons in the order of the items, and the revised profile, each on one line.

    Args:
        body: The whole answer of ``/chat/completions``.
        n_items: How many items were asked about.
        memory_words: How long a reason was to be; twice as long is let through.
        max_words: Bound on all that was generated.

    Raises:
        Rejected: If the answer can't be used.
    """
    answer = _read_form(body, Reflection, max_words)
    reasons = {entry.item: squeeze(entry.reason) for entry in answer.memories}
    profile = squeeze(answer.profile)
    mistakes = _wrong_numbers([entry.item for entry in answer.memories], n_items)
    mistakes += _wrong_reasons(reasons, memory_words)
    mistakes += _empty_profile(profile)
    if mistakes:
        raise _rejected("; ".join(mistakes))
    return tuple(reasons[number] for number in range(1, n_items + 1)), profile


def read_consolidation(body: str, *, profile_words: int, max_words: int) -> str:
    """The shortened profile on one line.

    Args:
        body: The whole answer of ``/chat/completions``.
        profile_words: Bound on the profile.
        max_words: Bound on all that was generated.

    Raises:
        Rejected: If the answer can't be used.
    """
    profile = squeeze(_read_form(body, Consolidation, max_words).profile)
    if mistakes := _empty_profile(profile):
        raise _rejected(mistakes[0])
    if (n_words := count_words(profile)) > profile_words:
        raise _rejected(f"the profile has {n_words} words; shorten it to at most {profile_words}")
    return profile


def _read_form(body: str, form: type[Form], max_words: int) -> Form:
    text = _generated_text(body)
    if (n_words := count_words(text)) > max_words:
        raise _rejected(f"it has {n_words} words; write at most {max_words}")
    try:
        return form.model_validate(_find_object(text))
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        mistakes = [f"{_place(each['loc'])} {_MISTAKES.get(each['type'], _OTHER)}" for each in found]
        raise _rejected(f"its JSON is not of the form asked for ({_enumerate(mistakes)})") from error


def _generated_text(body: str) -> str:
    """What the model wrote, without the thoughts that some servers leave in front of it."""
    answer = _load(body)
    choices = answer.get("choices") if isinstance(answer, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        raise _rejected(f"the server's answer is not a chat completion ({_quote(body)})")
    given = choice.get("message")
    message = given if isinstance(given, dict) else {}
    if message.get("refusal") or choice.get("finish_reason") == "content_filter":
        raise _rejected(f"it was refused ({_quote(str(message.get('refusal') or 'content filter'))})")
    if choice.get("finish_reason") == "length":
        raise _rejected("it was cut off before its end; write shorter reasons and a shorter profile")
    content = message.get("content")
    if not isinstance(content, str) or not content.strip():
        raise _rejected("it is empty")
    after_thoughts = content.rpartition("</think>")[2]
    return after_thoughts if "{" in after_thoughts else content


def _find_object(text: str) -> Any:
    """The JSON object in a text, with or without a code fence or words around it."""
    begin, end = text.find("{"), text.rfind("}")
    found = _load(text[begin : end + 1]) if 0 <= begin < end else None
    if found is None:
        raise _rejected("it is not one valid JSON object")
    return found


def _load(text: str) -> Any:
    """The JSON value of a text, None where it isn't JSON; line breaks within strings are let through."""
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):  # a model may well write ten thousand brackets
        return None


def _wrong_numbers(numbers: Sequence[int], n_items: int) -> list[str]:
    asked, counts = range(1, n_items + 1), Counter(numbers)
    kinds = {
        "missing": [number for number in asked if number not in counts],
        "there more than once": [number for number, count in counts.items() if count > 1],
        "unknown": [number for number in counts if number not in asked],
    }
    return [
        f"in memories, {_items(found)} {'is' if len(found) == 1 else 'are'} {kind}"
        for kind, found in kinds.items()
        if found
    ]


def _wrong_reasons(reasons: dict[int, str], memory_words: int) -> list[str]:
    empty = [number for number, reason in reasons.items() if not _says_something(reason)]
    long = [number for number, reason in reasons.items() if count_words(reason) > 2 * memory_words]
    mistakes = [f"the reason of {_items(empty)} is empty"] if empty else []
    return mistakes + ([f"the reason of {_items(long)} is longer than {memory_words} words"] if long else [])


def _empty_profile(profile: str) -> list[str]:
    return [] if _says_something(profile) else ["the profile is empty"]


def _says_something(text: str) -> bool:
    """Whether it has a letter or digit: a small model may copy the ``...`` of the form."""
    return any(character.isalnum() for character in text)


def _items(numbers: Sequence[int]) -> str:
    return f"item{'' if len(numbers) == 1 else 's'} {_enumerate([_quote(str(number), 20) for number in numbers])}"


def _enumerate(texts: Sequence[str]) -> str:
    more = len(texts) - MAX_NAMED
    return ", ".join(texts[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def _place(location: tuple[int | str, ...]) -> str:
    """``memories, entry 3, reason``."""
    parts = [f"entry {part + 1}" if isinstance(part, int) else _quote(part, 40) for part in location]
    return ", ".join(parts) or "all of it"


def _quote(text: str, max_characters: int = MAX_QUOTED) -> str:
    plain = squeeze(text)
    return plain if len(plain) <= max_characters else f"{plain[:max_characters]}..."


def _rejected(what: str) -> Rejected:
    return Rejected(squeeze(what))
