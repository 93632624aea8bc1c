"""An agent that rates items for users, whatever computes its answers."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from personas_tune.agents.newcomers import (
    MIDDLE,
    NewUser,
    Tiers,
    describe_newcomer,
    place_newcomer,
    require_ratings,
)
from personas_tune.agents.past import Past
from personas_tune.agents.ratings import Ratings
from personas_tune.agents.settings import AgentSettings, nearest
from personas_tune.datasets import RatingDataset, RatingSource, Sample
from personas_tune.datasets.tokens import ChatTokenizer
from personas_tune.errors import AdapterError, DataError
from personas_tune.evaluation.readouts import Probabilities
from personas_tune.prompts.render import ItemText
from personas_tune.training.sets import ALL_USERS

# From prompts, each user's adapter (None: the base alone) and labels to distributions, shape (n_prompts, n_labels).
Score = Callable[[RatingDataset, Mapping[str, str] | None, Sequence[str]], Probabilities]
Item = str | ItemText


class Agent:
    """Rates items for users; get one from :func:`load_agent` or :func:`load_served_agent`.

    A prompt is what ``persona_eval`` would ask after the user's last train rating: what comes later isn't known.
    Of an item that the user has rated, that rating's memory isn't shown.

    Args:
        settings: Which agent it is.
        tokenizer: The base's.
        assignment: Each cohort user's adapter, ``SET/ADAPTER``; None for the base alone.
        score: Computes distributions.
        allow_paid_calls: Whether embedders may make calls that cost money.
    """

    def __init__(
        self,
        settings: AgentSettings,
        tokenizer: ChatTokenizer,
        assignment: Mapping[str, str] | None,
        score: Score,
        *,
        allow_paid_calls: bool = False,
    ) -> None:
        self._settings = settings
        self._tokenizer = tokenizer
        self._assignment = None if assignment is None else dict(assignment)
        self._adapters = frozenset(self._assignment.values()) if self._assignment is not None else frozenset()
        self._score = score
        self._allow_paid_calls = allow_paid_calls
        self._source = RatingSource(settings.workspace.root)
        self._past = Past.of(settings, self._source.items, allow_paid_calls=allow_paid_calls)
        self._rated: dict[str, dict[str, int]] = {}  # positions of train ratings, by user and item
        for sample in self._source.samples("train"):
            self._rated.setdefault(sample.user_id, {})[sample.item_id] = sample.position
        for sample in self._source.samples("test"):  # a user may have test ratings only
            self._rated.setdefault(sample.user_id, {})
        self._n_cohort = len(self._rated)
        self._newcomers: dict[str, NewUser] = {}
        self._id_of: dict[ItemText, str] = {}
        # The true rating isn't known: room is left for the longest answer.
        self._longest = float(max(self.labels, key=lambda label: len(tokenizer.answer_tokens(label))))

    @property
    def name(self) -> str:
        """Its name under ``agents``."""
        return self._settings.name

    @property
    def labels(self) -> tuple[str, ...]:
        """The rating labels, lowest first."""
        return self._source.labels

    @property
    def users(self) -> list[str]:
        """The users whom it knows: the cohort, then those it has met."""
        return list(self._rated)

    @property
    def items(self) -> list[str]:
        """The ids of the items in the catalogue."""
        new = set(self._id_of.values())
        return [item_id for item_id in self._source.items if item_id not in new]

    def rate(self, user: str | NewUser, items: Sequence[Item]) -> Ratings:
        """How a user would rate some items.

        Args:
            user: A cohort user's id, or a user from :meth:`meet`.
            items: Ids of the catalogue, or new items.

        Raises:
            DataError: If the user or an item isn't known.
            PromptError: If a prompt can't be shortened to fit the context.
            ServerError: If a server doesn't answer.
        """
        return self.rate_many([(user, items)])[0]

    def rate_many(self, pairs: Sequence[tuple[str | NewUser, Sequence[Item]]]) -> list[Ratings]:
        """:meth:`rate` for several users at once, which is quicker than one after the other."""
        users = [self._known_user(user) for user, _ in pairs]
        item_ids = [[self._known_item(item) for item in items] for _, items in pairs]
        asked = [(user, item) for user, ids in zip(users, item_ids, strict=True) for item in ids]
        dataset = RatingDataset(self._tokenizer, self._source, self._samples(asked), self._settings.memories)
        p = self._score(dataset, self._assignment, self.labels)
        ends = np.cumsum([len(ids) for ids in item_ids])[:-1]
        return [
            Ratings(user, tuple(self._shown(item) for item in items), self.labels, part)
            for user, (_, items), part in zip(users, pairs, np.split(p, ends) if pairs else [], strict=True)
        ]

    def meet(
        self,
        ratings: Sequence[tuple[Item, float]] = (),
        *,
        profile: str | None = None,
        memories: Sequence[str] | None = None,
        tiers: Tiers = MIDDLE,
        by_template: bool = False,
    ) -> NewUser:
        """Get to know a user who isn't of the cohort, and give the user the nearest persona.

        The offline template distiller writes the profile and the memories that aren't given, if it wrote the
        cohort's. No language model is called.

        Args:
            ratings: Some items with the user's ratings, oldest first.
            profile: The user's profile, if you have it.
            memories: A memory of each rating, if you have them.
            tiers: Of the traits activity, conformity and diversity, 1 to 3; the middle ones if nothing is known.
            by_template: Use the template distiller though another one wrote the cohort's texts.

        Raises:
            DataError: If an item isn't known or rated twice.
            PromptError: If a rating is off the scale.
            DistillError: If the template distiller would have to write what it may not.
            ClusteringError: If the profile has no word that the personas' embedder knows.
            AdapterError: If the agent's adapters can't be given to new users.
        """
        rated = [(self._known_item(item), float(rating)) for item, rating in ratings]
        require_ratings(rated, self.labels)
        user_id = self._free_id()
        words, table = describe_newcomer(
            self._settings, user_id, rated, self._source.items,
            profile=profile, memories=memories, tiers=tiers, by_template=by_template,
        )  # fmt: skip
        place = place_newcomer(self._settings, user_id, words, allow_paid_calls=self._allow_paid_calls)
        newcomer = NewUser(user_id, words, tuple(table["memory"].to_pylist()), *place)
        self._give_adapter(newcomer)
        self._source.add_user(user_id, tiers, words, newcomer.memories)
        self._past.add_user(user_id, words, table)
        self._rated[user_id] = {item_id: position for position, (item_id, _) in enumerate(rated)}
        self._newcomers[user_id] = newcomer
        return newcomer

    def _samples(self, asked: Sequence[tuple[str, str]]) -> list[Sample]:
        """What is to be predicted, in the place behind each user's last rating."""
        own = [self._rated[user].get(item) for user, item in asked]
        behind = {user: 1 + max(self._rated[user].values(), default=-1) for user, _ in asked}
        positions = [behind[user] for user, _ in asked]
        at = [position if mine is None else mine for mine, position in zip(own, positions, strict=True)]
        found = zip(asked, positions, self._past.memories_for(asked, own), self._past.neighbours_for(asked, at),
                    strict=True)  # fmt: skip
        return [
            Sample(user, item, position, self._longest, -1, memories, neighbours)
            for (user, item), position, memories, neighbours in found
        ]

    def _known_user(self, user: str | NewUser) -> str:
        if isinstance(user, NewUser):
            if self._newcomers.get(user.user_id) is not user:
                raise DataError("this agent hasn't met the user", where=user.user_id, remedy="call its meet(...) first")
            return user.user_id
        if user not in self._rated:
            known = list(self._rated)[: self._n_cohort]
            raise DataError(f"no user {user!r}", where=self._where, remedy=nearest(str(user), known, "users"))
        return user

    def _known_item(self, item: Item) -> str:
        if isinstance(item, ItemText):
            return self._id_of_new(item)
        if item not in self._source.items:
            remedy = f"{nearest(str(item), self.items, 'items')}; a new item is given as an ItemText"
            raise DataError(f"no item {item!r}", where=self._where, remedy=remedy)
        return item

    def _id_of_new(self, item: ItemText) -> str:
        _require_item(item)
        if item not in self._id_of:
            item_id = f"{item.title} (new item {len(self._id_of) + 1})"
            self._id_of[item] = item_id
            self._source.add_item(item_id, item)
            self._past.add_item(item_id, item)
        return self._id_of[item]

    def _free_id(self) -> str:
        number = len(self._newcomers) + 1
        while f"new user {number}" in self._rated:
            number += 1
        return f"new user {number}"

    def _give_adapter(self, newcomer: NewUser) -> None:
        adapters, per = self._settings.adapters, self._settings.per
        if self._assignment is None:
            return
        name = f"{adapters}/{ALL_USERS if per == 'all' else newcomer.persona}"
        if self._settings.is_shuffled:
            raise AdapterError(
                f"adapter set {adapters} deals users out at random", where=self._where,
                remedy="meet new users with an agent whose adapters belong to personas, or to all users",
            )  # fmt: skip
        if name not in self._adapters:
            known = ", ".join(sorted(self._adapters))
            raise AdapterError(
                f"no adapter {name} for the nearest persona", where=self._where, remedy=f"it has {known}"
            )
        self._assignment[newcomer.user_id] = name

    @property
    def _where(self) -> str:
        return f"agent {self.name} of {self._settings.workspace.root}"

    @staticmethod
    def _shown(item: Any) -> str:
        return item.title if isinstance(item, ItemText) else str(item)


def _require_item(item: ItemText) -> None:
    """Refuse what would end up in a prompt as nonsense, or can't be told apart from another item."""
    lists = [name for name in ("genres", "cast") if not isinstance(getattr(item, name), tuple)]
    if lists:
        raise DataError(f"{lists[0]} is no tuple", where=f"item {item.title!r}", remedy="write ('Drama', 'War')")
    if not isinstance(item.title, str) or not item.title.strip():
        raise DataError("an item without a title", where=f"item {item.title!r}", remedy="give it one")
    if item.mean_rating is not None and not math.isfinite(item.mean_rating):
        raise DataError(f"mean_rating is {item.mean_rating}", where=f"item {item.title!r}", remedy="leave it out")
