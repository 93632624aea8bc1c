"""What callers give: refused in one line where it would end up in a prompt as nonsense."""

import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any

from personas_tune.datasets.source import Tiers
from personas_tune.errors import DataError
from personas_tune.prompts.render import ItemText, label_of


def require_text(text: object, where: str) -> None:
    """Refuse what is no text, or can't be written to a prompt.

    Raises:
        DataError: If so.
    """
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{text!r} is no text", where=where, remedy="give one, or leave it out")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        what = f"it can't be encoded ({error.reason} at character {error.start})"
        raise DataError(what, where=where, remedy="give text in Unicode, without lone surrogates") from error


def require_item(item: ItemText, labels: Sequence[str]) -> None:
    """Refuse a new item that can't be put into words.

    Args:
        item: The item.
        labels: The rating labels, lowest first; an average lies between the ends.

    Raises:
        DataError: If a field isn't of its type or range.
    """
    if not isinstance(item.title, str) or not item.title.strip():
        raise DataError("an item without a title", where=f"item {item.title!r}", remedy="give it one")
    where = f"item {item.title!r}"
    require_text(item.title, where)
    for name in ("genres", "cast"):
        words = getattr(item, name)
        if not isinstance(words, tuple):
            raise DataError(f"{name} is no tuple", where=where, remedy="write ('Drama', 'War')")
        for word in words:
            require_text(word, f"{where}, {name}")
    if item.summary is not None:
        require_text(item.summary, f"{where}, summary")
    if item.year is not None and not _is_whole(item.year):
        raise DataError(f"year is {item.year!r}", where=where, remedy="give a whole number, or leave it out")
    if not _is_whole(item.n_ratings) or item.n_ratings < 0:
        raise DataError(f"n_ratings is {item.n_ratings!r}", where=where, remedy="give a whole number from 0 on")
    low, high = float(labels[0]), float(labels[-1])
    if item.mean_rating is not None and not (_is_number(item.mean_rating) and low <= item.mean_rating <= high):
        remedy = f"give a number from {labels[0]} to {labels[-1]}, or leave it out"
        raise DataError(f"mean_rating is {item.mean_rating!r}", where=where, remedy=remedy)


def pairs_of(pairs: object, example: str) -> list[tuple[Any, Any]]:
    """The pairs in what may be read once only.

    Args:
        pairs: Given by the caller.
        example: What would do.

    Raises:
        DataError: If it isn't made of pairs.
    """
    given = listed(pairs, example)
    wrong = next((pair for pair in given if not isinstance(pair, tuple | list) or len(pair) != 2), None)
    if wrong is not None:
        raise DataError("it is no pair", where=repr(wrong)[:80], remedy=f"give {example}")
    return [(first, second) for first, second in given]


def listed(values: object, example: str) -> list[Any]:
    """A list of what may be read once only.

    Raises:
        DataError: If it is one text or item, or can't be gone through.
    """
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise DataError("it is no list", where=repr(values)[:80], remedy=f"give {example}")
    return list(values)


def require_ratings(ratings: Sequence[tuple[Any, Any]], labels: Sequence[str]) -> None:
    """Refuse ratings that are no numbers or off the scale.

    Raises:
        DataError: If a rating is no number.
        PromptError: If it has no label.
    """
    for item, rating in ratings:
        if not _is_number(rating):
            raise DataError(f"rating {rating!r} is no number", where=f"item {item!r}", remedy="give one of the scale")
        label_of(float(rating), labels, where="ratings")


def require_tiers(tiers: object) -> Tiers:
    """The traits of a new user.

    Raises:
        DataError: If they aren't three whole numbers from 1 to 3.
    """
    given = list(tiers) if isinstance(tiers, Sequence) and not isinstance(tiers, str) else []
    if len(given) != 3 or not all(_is_whole(tier) and 1 <= tier <= 3 for tier in given):
        remedy = "give activity, conformity and diversity, each 1, 2 or 3"
        raise DataError(f"tiers are {tiers!r}", where="tiers", remedy=remedy)
    activity, conformity, diversity = map(int, given)
    return activity, conformity, diversity


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and math.isfinite(value)
