"""From a sample's parts to chat messages, and shortening them to a token budget."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from personas_tune.errors import PromptError
from personas_tune.prompts.labels import rating_label
from personas_tune.prompts.templates import TRAITS, Template


@dataclass(frozen=True)
class ItemText:
    """What a prompt says about an item.

    Args:
        title: Its title.
        year: Year of release, or None.
        genres: Its genres or categories.
        mean_rating: Average rating by others (``data.historical_average`` says by whom), or None.
        n_ratings: How many ratings that average rests on.
        summary: A sentence about it, or None.
        cast: Its people.
    """

    title: str
    year: int | None = None
    genres: tuple[str, ...] = ()
    mean_rating: float | None = None
    n_ratings: int = 0
    summary: str | None = None
    cast: tuple[str, ...] = ()


class Neighbours(NamedTuple):
    """What like-minded users gave an item, on the user's own scale, and how many they are."""

    rating: float
    n: int


@dataclass(frozen=True)
class PromptParts:
    """All that a prompt is made of; an empty part leaves its section out."""

    tiers: tuple[int, int, int] | None
    profile: str | None
    labels: tuple[str, ...]
    memories: tuple[str, ...]
    item: ItemText
    neighbours: Neighbours | None = None


Message = Mapping[str, str]


def describe_item(item: ItemText, people_heading: str) -> str:
    """One line on an item: title, year, genres, what others gave it, summary, people."""
    title = item.title if item.year is None else f"{item.title} ({item.year})"
    sentences = [f"{title}."]
    if item.genres:
        sentences.append(f"{', '.join(item.genres)}.")
    if item.mean_rating is not None:
        plural = "" if item.n_ratings == 1 else "s"
        sentences.append(f"Others give it {item.mean_rating:.2f} on average in {item.n_ratings} rating{plural}.")
    if item.summary:
        sentences.append(item.summary if item.summary.endswith((".", "!", "?")) else f"{item.summary}.")
    if item.cast:
        sentences.append(f"{people_heading} {', '.join(item.cast)}.")
    return " ".join(sentences)


def render_prompt(template: Template, parts: PromptParts) -> list[Message]:
    """The system and user messages of one sample, shared parts first.

    Returns:
        Two messages, each with ``role`` and ``content``; the assistant's answer is the rating's label.
    """
    system = [template.role]
    if parts.tiers is not None:
        system.append(" ".join(template.traits[name][tier - 1] for name, tier in zip(TRAITS, parts.tiers, strict=True)))
    if parts.profile:
        system.append(parts.profile)
    user = [template.instructions(parts.labels)]
    if parts.memories:
        user.append("\n".join([template.memories_heading, *(f"- {memory}" for memory in parts.memories)]))
    user.append(f"{template.item_heading} {describe_item(parts.item, template.people_heading)}")
    if parts.neighbours is not None:
        words = template.neighbours if parts.neighbours.n else template.no_neighbours
        user.append(words.format(**parts.neighbours._asdict()))
    return [
        {"role": "system", "content": "\n".join(system)},
        {"role": "user", "content": "\n".join(user)},
    ]


def shorter_versions(parts: PromptParts) -> Iterator[PromptParts]:
    """Ever shorter versions of a prompt, in the order in which its parts are given up.

    First the item's people beyond three, then all of them; then memories, the least similar first;
    then the item's summary; then the profile's sentences, the last first, down to its first one.
    The item's title, genres, average and neighbours, the instructions and the answer are never touched.
    """
    if len(parts.item.cast) > 3:
        parts = replace(parts, item=replace(parts.item, cast=parts.item.cast[:3]))
        yield parts
    if parts.item.cast:
        parts = replace(parts, item=replace(parts.item, cast=()))
        yield parts
    while parts.memories:
        parts = replace(parts, memories=parts.memories[:-1])
        yield parts
    if parts.item.summary:
        parts = replace(parts, item=replace(parts.item, summary=None))
        yield parts
    sentences = (parts.profile or "").split(". ")
    while len(sentences) > 1:
        sentences = sentences[:-1]
        parts = replace(parts, profile=". ".join(sentences) + ".")
        yield parts


def fit_prompt(parts: PromptParts, fits: Callable[[PromptParts], bool], *, where: str) -> tuple[PromptParts, bool]:
    """The longest version of a prompt that fits, and whether it had to be shortened.

    Args:
        parts: The full prompt.
        fits: Says whether a version, answer included, is within the model's context.
        where: Names the sample in the error.

    Raises:
        PromptError: If not even the shortest version fits.
    """
    if fits(parts):
        return parts, False
    for shorter in shorter_versions(parts):
        if fits(shorter):
            return shorter, True
    raise PromptError(
        "prompt does not fit even without people, memories, summary and most of the profile",
        where=where,
        remedy="raise tokenizer.max_seq_len or shorten the item's title and genres",
    )


def label_of(rating: float, labels: Sequence[str], where: str = "samples") -> str:
    """The label that stands for a rating, such as "4" for 4.0 and "3.5" for 3.5.

    Args:
        rating: On the scale.
        labels: Those of the scale.
        where: What it comes from, for the error.

    Raises:
        PromptError: If the rating is not on the scale.
    """
    label = rating_label(rating)
    if label not in labels:
        raise PromptError(
            f"rating {label} has no label", where=where, remedy=f"the scale's labels are {', '.join(labels)}"
        )
    return label
