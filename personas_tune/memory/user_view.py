"""What is shown of one user: what was rated, the profile as it grew, the memories, the persona.

Of the test rows only their number is known here: they are what is to be predicted.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from personas_tune.memory.changes import Change
from personas_tune.memory.wording import count_words, label_of


@dataclass(frozen=True)
class Rated:
    """A train interaction: the ``number``-th (from 1), what others give on average, and why the user gave it."""

    number: int
    title: str
    rating: float
    others: float | None
    memory: str | None


@dataclass(frozen=True)
class Step:
    """A batch of train interactions and the profile after it.

    Attributes:
        upto: After so many train interactions.
        rated: Those since the step before.
        profile: None if no profile was written after these.
        changes: Against the profile before, sentence by sentence; empty for the first one.
    """

    upto: int
    rated: tuple[Rated, ...]
    profile: str | None
    changes: tuple[Change, ...] = ()


@dataclass(frozen=True)
class Trait:
    """A trait's value and its tier, 1 to 3."""

    name: str
    value: float
    tier: int


@dataclass(frozen=True)
class Persona:
    """A user's persona: its number, the user's distance from its centre, and how many of all users it has."""

    number: int
    distance: float
    n_members: int
    n_users: int


@dataclass(frozen=True)
class UserView:
    """What is known of one user.

    Attributes:
        steps: The history in the batches between profiles, oldest first.
        n_test: How many interactions are left to be predicted.
        distiller: What wrote the profiles; None if the user has none.
        traits: Empty if they are not known.
        notes: What is not there, and which recipe makes it.
    """

    user_id: str
    steps: tuple[Step, ...]
    n_test: int
    distiller: str | None
    traits: tuple[Trait, ...]
    persona: Persona | None
    notes: tuple[str, ...]

    @property
    def rated(self) -> list[Rated]:
        """All train interactions, oldest first."""
        return [rated for step in self.steps for rated in step.rated]

    @property
    def mean_rating(self) -> float | None:
        """Of the train interactions; None if there are none."""
        rated = self.rated
        return sum(each.rating for each in rated) / len(rated) if rated else None

    @property
    def final(self) -> Step | None:
        """The step with the last profile."""
        return next((step for step in reversed(self.steps) if step.profile is not None), None)


def plain(text: str) -> str:
    """A text on one line, without the control characters that a title or an answer may hold."""
    return "".join(letter for letter in " ".join(text.split()) if letter.isprintable())


def describe_facts(view: UserView) -> Iterator[tuple[str, str]]:
    """What stands beside a user's name: names and values, then what is not there and why."""
    if view.mean_rating is not None:
        yield "rated", f"{count(len(view.rated), 'item')}, {view.mean_rating:.2f} on average"
    if view.n_test:
        yield "to predict", f"{count(view.n_test, 'rating')}, not shown"
    for trait in view.traits:
        yield trait.name, f"{trait.value:.4g}, tier {trait.tier} of 3"
    if view.persona is not None:
        persona = view.persona
        share = f"{persona.n_members} of {count(persona.n_users, 'user')}"
        yield "persona", f"{persona.number} ({share}), {persona.distance:.2f} from its centre"
    for note in view.notes:
        what, _, why = note.partition(": ")
        yield what, why


def name_batch(step: Step) -> str:
    """Which interactions a step adds: ``Ratings 11-20``."""
    if not step.rated:
        return f"Up to rating {step.upto}" if step.upto else "Before any rating"
    first, last = step.rated[0].number, step.rated[-1].number
    return f"Rating {first}" if first == last else f"Ratings {first}-{last}"


def describe_profile(step: Step) -> str:
    """When a step's profile was written and how long it is: ``after 20 ratings, 87 words``."""
    moment = f"after {count(step.upto, 'rating')}" if step.upto else "before any rating"
    return f"{moment}, {count(count_words(step.profile or ''), 'word')}"


def describe_rating(rated: Rated) -> str:
    """The user's rating beside the others' average."""
    others = "" if rated.others is None else f", others {rated.others:.1f}"
    return f"rated {label_of(rated.rating)}{others}"


def summarise_changes(changes: Sequence[Change]) -> Iterator[tuple[str, str]]:
    """Marks and sentences in reading order; unchanged sentences that follow each other are only counted."""
    for mark, same in groupby(changes, key=lambda change: change.mark):
        sentences = [plain(change.sentence) for change in same]
        if mark == "=":
            yield mark, f"{count(len(sentences), 'sentence')} unchanged"
        else:
            yield from ((mark, sentence) for sentence in sentences)


def count(n: int, what: str) -> str:
    """``1 rating``, ``2 ratings``."""
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
