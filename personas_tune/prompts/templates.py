"""The words of a prompt, by domain.

A prompt has the sections of the paper's appendix C in its order: system (role, traits, profile);
user (instructions and scale, memories, the item); the answer is the rating. Whatever all samples
of a user share stands first, so that their token rows have the longest common prefix.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from personas_tune.errors import PromptError

TRAITS = ("activity", "conformity", "diversity")


@dataclass(frozen=True)
class Template:
    """A domain's words.

    Args:
        name: What ``prompt.template`` calls it.
        role: The opening sentence of the system message.
        traits: For each trait, a sentence per tier (1, 2, 3), in the first person as the profile is.
        task: The instruction; takes ``{low}``, ``{high}`` and ``{labels}``.
        memories_heading: Stands before the memories, when there are any.
        item_heading: Stands before the item to rate.
        people_heading: Stands before the names of an item's people.
        neighbours: What like-minded users gave the item; takes ``{n}`` and ``{rating}``.
        no_neighbours: What other users gave it when no like-minded one did; takes ``{rating}``.
    """

    name: str
    role: str
    traits: dict[str, tuple[str, str, str]]
    task: str
    memories_heading: str
    item_heading: str
    people_heading: str
    neighbours: str
    no_neighbours: str

    def instructions(self, labels: Sequence[str]) -> str:
        """The instruction with the scale's labels put in."""
        return self.task.format(low=labels[0], high=labels[-1], labels=", ".join(labels))


MOVIES = Template(
    name="movies",
    role="You are a viewer on a film site. Rate each film exactly as this viewer would.",
    traits={
        "activity": (
            "I rarely watch films.",
            "I watch films now and then.",
            "I watch films all the time.",
        ),
        "conformity": (
            "My ratings follow the crowd.",
            "My ratings weigh the crowd against my own taste.",
            "My ratings ignore the crowd.",
        ),
        "diversity": (
            "I keep to a few genres.",
            "I mostly stay with favourite genres.",
            "I explore every genre.",
        ),
    },
    task="Rate the film from {low} (hated it) to {high} (loved it). Reply with one of {labels} and nothing else.",
    memories_heading="What I remember of films like it:",
    item_heading="Film:",
    people_heading="With",
    neighbours="Viewers with my taste ({n}) give it {rating:.1f} on my scale.",
    no_neighbours="Other viewers give it {rating:.1f} on my scale.",
)

GENERIC = Template(
    name="generic",
    role="You are a user of a recommendation service. Rate each item exactly as this user would.",
    traits={
        "activity": (
            "I rarely use the service.",
            "I use the service now and then.",
            "I use the service all the time.",
        ),
        "conformity": (
            "My ratings follow the crowd.",
            "My ratings weigh the crowd against my own taste.",
            "My ratings ignore the crowd.",
        ),
        "diversity": (
            "I keep to a few categories.",
            "I mostly stay with favourite categories.",
            "I explore every category.",
        ),
    },
    task="Rate the item from {low} (hated it) to {high} (loved it). Reply with one of {labels} and nothing else.",
    memories_heading="What I remember of items like it:",
    item_heading="Item:",
    people_heading="By",
    neighbours="Users with my taste ({n}) give it {rating:.1f} on my scale.",
    no_neighbours="Other users give it {rating:.1f} on my scale.",
)

TEMPLATES = {template.name: template for template in (MOVIES, GENERIC)}


def find_template(name: str) -> Template:
    """The template called ``name``.

    Raises:
        PromptError: If there is none; names those that there are.
    """
    if name not in TEMPLATES:
        raise PromptError(f"no template {name!r}", where="prompt.template", remedy=f"use one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]
