"""An agent that rates items for users, whatever computes its answers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import numpy as np

from personas_tune.agents.given import listed, pairs_of, require_item, require_ratings, require_tiers
from personas_tune.agents.newcomers import MIDDLE, NewUser, describe_newcomer, place_newcomer
from personas_tune.agents.past import Past
from personas_tune.agents.ratings import Ratings
from personas_tune.agents.settings import AgentSettings, nearest
from personas_tune.datasets import RatingDataset, RatingSource, Sample
from personas_tune.datasets.source import Tiers
from personas_tune.datasets.tokens import ChatTokenizer
from personas_tune.errors import AdapterError, DataError
from personas_tune.evaluation.readouts import Probabilities
from personas_tune.prompts.render import ItemText
from personas_tune.training.sets import ALL_USERS
from personas_tune.workspace import COLUMNS, read_table

ROWS_AT_ONCE = 2048  # that are tokenised together: some 50 MB of prompts

# From prompts, each user's adapter (None: the base alone) and labels to distributions, shape (n_prompts, n_labels).
Score = Callable[[RatingDataset, Mapping[str, str] | None, Sequence[str]], Probabilities]
Item = str | ItemText


class Agent:
    """Rates items for users; get one from :func:`load_agent` or :func:`load_served_agent`.

    A prompt is what ``persona_eval`` would ask after the user's last train rating: what comes later isn't known.
    Of an item that the user has rated, that rating's memory isn't shown, however the item is given.

    Close an agent of a server when it isn't needed any more, or use it in a ``with`` block.

    Args:
        settings: Which agent it is.
        tokenizer: The base's.
        assignment: Each cohort user's adapter, ``SET/ADAPTER``; None for the base alone.
        score: Computes distributions.
        allow_paid_calls: Whether embedders may make calls that cost money.
        close: Lets go of what ``score`` holds.
    """

    def __init__(
        self,
        settings: AgentSettings,
        tokenizer: ChatTokenizer,
        assignment: Mapping[str, str] | None,
        score: Score,
        *,
        allow_paid_calls: bool = False,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self._close = close
        self._settings = settings
        self._tokenizer = tokenizer
        self._assignment = None if assignment is None else dict(assignment)
        self._adapters = frozenset(self._assignment.values()) if self._assignment is not None else frozenset()
        self._score = score
        self._allow_paid_calls = allow_paid_calls
        self._source = RatingSource(settings.workspace.root)
        self._catalogue = tuple(self._source.items)
        self._namesakes: dict[tuple[str, int | None], list[str]] = {}  # ids of items by title and year
        for item_id, item in self._source.items.items():
            self._namesakes.setdefault(_name_of(item), []).append(item_id)
        self._past = Past.of(settings, self._source.items, allow_paid_calls=allow_paid_calls)
        self._rated: dict[str, dict[str, int]] = {}  # positions of train ratings, by user and item
        for sample in self._source.samples("train"):
            self._rated.setdefault(sample.user_id, {})[sample.item_id] = sample.position
        for sample in self._source.samples("test"):  # a user may have test ratings only
            self._rated.setdefault(sample.user_id, {})
        self._n_cohort = len(self._rated)
        self._newcomers: dict[str, NewUser] = {}
        self._id_of: dict[ItemText, str] = {}
        self._new: set[str] = set()  # ids of items that aren't in the catalogue
        # The true rating isn't known: room is left for the longest answer.
        self._longest = float(max(self.labels, key=lambda label: len(tokenizer.answer_tokens(label))))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close an agent of a server, which then rates nothing more; again, or for one in this process, do nothing."""
        self._close()

    def __repr__(self) -> str:
        return f"<{self._where}, {len(self._rated)} users>"

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
        return list(self._catalogue)

    def rate(self, user: str | NewUser, items: Sequence[Item]) -> Ratings:
        """How a user would rate some items.

        Args:
            user: A cohort user's id, or a user from :meth:`meet`.
            items: Ids of the catalogue, or items as they shall stand in prompts; those with the title and year of
                a known item count as that one where it is left out what the user said of it.

        Raises:
            DataError: If the user or an item isn't known or can't be put into words.
            PromptError: If a prompt can't be shortened to fit the context.
            ServerError: If a server doesn't answer.
        """
        return self.rate_many([(user, items)])[0]

    def rate_many(self, pairs: Sequence[tuple[str | NewUser, Sequence[Item]]]) -> list[Ratings]:
        """:meth:`rate` for several users at once, which is quicker than one after the other."""
        given = [(user, listed(items, "a list of items")) for user, items in pairs_of(pairs, "[(user, items), ...]")]
        users = [self._known_user(user) for user, _ in given]
        item_ids = [[self._known_item(item) for item in items] for _, items in given]
        asked = [(user, item) for user, ids in zip(users, item_ids, strict=True) for item in ids]
        p = np.concatenate([np.empty((0, len(self.labels))), *self._distributions(self._samples(asked))])
        ends = np.cumsum([len(ids) for ids in item_ids])[:-1]
        return [
            Ratings(user, tuple(self._shown(item) for item in items), self.labels, part)
            for user, (_, items), part in zip(users, given, np.split(p, ends) if given else [], strict=True)
        ]

    def _distributions(self, samples: Sequence[Sample]) -> Iterator[Probabilities]:
        """Distributions of some samples after the other, so that prompts need not all be in memory."""
        calibration = self._settings.calibration
        for start in range(0, len(samples), ROWS_AT_ONCE):
            rows = samples[start : start + ROWS_AT_ONCE]
            dataset = RatingDataset(self._tokenizer, self._source, rows, self._settings.memories)
            p = self._score(dataset, self._assignment, self.labels)
            yield p if calibration is None else calibration.apply(p)

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
            DataError: If an item isn't known or rated twice, nothing is given, or anything isn't of its kind.
            PromptError: If a rating is off the scale.
            DistillError: If the template distiller would have to write what it may not.
            ClusteringError: If the profile has no word that the personas' embedder knows.
            AdapterError: If the agent's adapters can't be given to new users.
        """
        self._require_newcomers_allowed()
        given = pairs_of(ratings, "[(item, rating), ...]")
        require_ratings(given, self.labels)
        rated = [(self._known_item(item), float(rating)) for item, rating in given]
        self._require_rated_once([item_id for item_id, _ in rated])
        tiers = require_tiers(tiers)
        if not rated and profile is None:
            raise DataError("nothing is known of the user", where="ratings", remedy="give a few, or profile=...")
        if self._past.names_neighbours and not rated:
            raise DataError("no rating to find like-minded users by", where="ratings", remedy="give one or more")
        user_id = self._free_id()
        words, table = describe_newcomer(
            self._settings, user_id, rated, self._source.items,
            profile=profile, memories=memories, tiers=tiers, by_template=by_template,
        )  # fmt: skip
        place = place_newcomer(self._settings, user_id, words, allow_paid_calls=self._allow_paid_calls)
        newcomer = NewUser(user_id, words, tuple(table["memory"].to_pylist()), *place)
        if self._assignment is not None:
            newcomer = replace(newcomer, adapter=self._adapter_for(newcomer.persona))
            self._assignment[user_id] = str(newcomer.adapter)
        self._source.add_user(user_id, tiers, words, newcomer.memories)
        self._past.add_user(user_id, words, table)
        self._rated[user_id] = {item_id: position for position, (item_id, _) in enumerate(rated)}
        self._newcomers[user_id] = newcomer
        return newcomer

    def _samples(self, asked: Sequence[tuple[str, str]]) -> list[Sample]:
        """What is to be predicted, in the place behind each user's last rating."""
        own = [self._own_position(user, item) for user, item in asked]
        behind = {user: 1 + max(self._rated[user].values(), default=-1) for user in {user for user, _ in asked}}
        positions = [behind[user] for user, _ in asked]
        at = [position if mine is None else mine for mine, position in zip(own, positions, strict=True)]
        found = zip(asked, positions, self._past.memories_for(asked, own), self._past.neighbours_for(asked, at),
                    strict=True)  # fmt: skip
        return [
            Sample(user, item, position, self._longest, -1, memories, neighbours)
            for (user, item), position, memories, neighbours in found
        ]

    def _own_position(self, user: str, item_id: str) -> int | None:
        """Where a user has rated an item, be it under another id."""
        rated = self._rated[user]
        return next((rated[each] for each in self._same(item_id) if each in rated), None)

    def _same(self, item_id: str) -> list[str]:
        """The ids of an item, its own first: two of the catalogue are two items, whatever their names."""
        namesakes = self._namesakes[_name_of(self._source.items[item_id])]
        if item_id in self._new:
            return [item_id, *namesakes]
        return [item_id, *(each for each in namesakes if each in self._new)]

    def _require_rated_once(self, item_ids: Sequence[str]) -> None:
        seen: set[str] = set()
        for item_id in item_ids:
            if not seen.isdisjoint(self._same(item_id)):
                raise DataError("rated twice", where=f"item {item_id}", remedy="give the latest rating of each item")
            seen.add(item_id)

    def _known_user(self, user: str | NewUser) -> str:
        if isinstance(user, NewUser):
            if self._newcomers.get(user.user_id) is not user:
                raise DataError("this agent hasn't met the user", where=user.user_id, remedy="call its meet(...) first")
            return user.user_id
        if not isinstance(user, str) or user not in self._rated:
            known = list(self._rated)[: self._n_cohort]
            raise DataError(f"no user {user!r}", where=self._where, remedy=nearest(str(user), known, "users"))
        return user

    def _known_item(self, item: Item) -> str:
        if isinstance(item, ItemText):
            return self._id_of_new(item)
        if not isinstance(item, str) or item not in self._source.items:
            remedy = f"{nearest(str(item), self.items, 'items')}; a new item is given as an ItemText"
            raise DataError(f"no item {item!r}", where=self._where, remedy=remedy)
        return item

    def _id_of_new(self, item: ItemText) -> str:
        require_item(item, self.labels)
        if item not in self._id_of:
            item_id = f"{item.title} (new item {len(self._id_of) + 1})"
            self._id_of[item] = item_id
            self._new.add(item_id)
            self._namesakes.setdefault(_name_of(item), []).append(item_id)
            self._source.add_item(item_id, item)
            self._past.add_item(item_id, item)
        return self._id_of[item]

    def _free_id(self) -> str:
        number = len(self._newcomers) + 1
        while f"new user {number}" in self._rated:
            number += 1
        return f"new user {number}"

    def _require_newcomers_allowed(self) -> None:
        """Refuse new users, before the first, where the nearest persona says nothing of the adapters."""
        if self._assignment is None or self._settings.per == "all" or self._newcomers:
            return
        if self._settings.is_shuffled:
            raise AdapterError(
                f"adapter set {self._settings.adapters} deals users out at random", where=self._where,
                remedy="meet new users with an agent whose adapters belong to personas, or to all users",
            )  # fmt: skip
        rows = read_table(self._settings.workspace.personas, COLUMNS["personas"]).to_pylist()
        now = {row["user_id"]: f"{self._settings.adapters}/{row['persona']}" for row in rows}
        if any(now.get(user) != adapter for user, adapter in self._assignment.items()):
            raise AdapterError(
                f"adapter set {self._settings.adapters} was trained on another clustering",
                where=str(self._settings.workspace.personas),
                remedy="run `tune run persona_raft --config ...` and `tune run persona_lora --config ...` again",
            )

    def _adapter_for(self, persona: int) -> str:
        name = f"{self._settings.adapters}/{ALL_USERS if self._settings.per == 'all' else persona}"
        if name not in self._adapters:
            known = ", ".join(sorted(self._adapters))
            raise AdapterError(
                f"no adapter {name} for the nearest persona", where=self._where, remedy=f"it has {known}"
            )
        return name

    @property
    def _where(self) -> str:
        return f"agent {self.name} of {self._settings.workspace.root}"

    @staticmethod
    def _shown(item: Any) -> str:
        return item.title if isinstance(item, ItemText) else str(item)


def _name_of(item: ItemText) -> tuple[str, int | None]:
    return item.title.strip().casefold(), item.year
