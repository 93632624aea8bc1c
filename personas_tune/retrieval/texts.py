"""What is embedded: the texts of items, of memories and of the samples that look for memories."""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from personas_tune.errors import DataError

Query = Literal["item", "user_and_item"]


def item_text(item: Mapping[str, Any]) -> str:
    """An item in words: title, year, genres, summary, cast, whichever are known. No rating is among them.

    Example:
        >>> item_text({"title": "Heat", "year": 1995, "genres": ["Crime"], "summary": None, "cast": ["Al Pacino"]})
        'Heat. 1995. Crime. Al Pacino'
    """
    year = "" if item["year"] is None else str(item["year"])
    parts = [item["title"], year, ", ".join(item["genres"] or ()), item["summary"], ", ".join(item["cast"] or ())]
    return ". ".join(part.rstrip(". ") for part in parts if part)


def item_texts(items: pa.Table) -> dict[str, str]:
    """Each item's text by item id."""
    return {item["item_id"]: item_text(item) for item in items.to_pylist()}


class ProfilesInTime:
    """Each user's profile as it stood before any position."""

    def __init__(self, profiles: pa.Table) -> None:
        self._of_user: dict[str, tuple[list[int], list[str]]] = {}
        in_order = profiles.sort_by([("user_id", "ascending"), ("upto_position", "ascending")])
        columns = (in_order[name].to_pylist() for name in ("user_id", "upto_position", "profile"))
        for user_id, upto, text in zip(*columns, strict=True):
            uptos, texts = self._of_user.setdefault(user_id, ([], []))
            uptos.append(upto)
            texts.append(text or "")

    def add(self, user_id: str, profile: str) -> None:
        """Take in the profile of a user who has none; it holds at every position."""
        self._of_user[user_id] = ([0], [profile])

    def final(self, user_id: str) -> str:
        """The last profile; empty for a user without one."""
        _, texts = self._of_user.get(user_id, ([], [""]))
        return texts[-1]

    def before(self, user_id: str, position: int) -> str:
        """The last profile that was written without the interaction at ``position`` or a later one."""
        uptos, texts = self._of_user.get(user_id, ([], []))
        n_written = bisect_right(uptos, position)
        return texts[n_written - 1] if n_written else ""


@dataclass(frozen=True)
class RetrievalTexts:
    """The texts that one setting of ``retrieval.query`` embeds.

    ``item`` compares items with items. ``user_and_item`` compares profile and item with the items
    and memories of the user's past: e(U + I) against e(I + I') in section 3.2 of the paper.

    Args:
        query: ``item`` or ``user_and_item``.
        of_item: Each item's text by id.
        profiles: Needed by ``user_and_item``.
        profile: Which profile a query shows: the ``final`` one, or that ``before_target``.
    """

    query: Query
    of_item: Mapping[str, str]
    profiles: ProfilesInTime | None = None
    profile: Literal["final", "before_target"] = "final"

    def to_fit(self, train: pa.Table, memories: pa.Table) -> list[str]:
        """What the embedder learns its words from: nothing but train interactions."""
        if self.query == "user_and_item":
            return self.keys(memories)
        item_ids = sorted(set(train["item_id"].to_pylist()))
        return [self._item(item_id) for item_id in item_ids]

    def keys(self, memories: pa.Table) -> list[str]:
        """One text a memory, by which it is found."""
        items = [self._item(item_id) for item_id in memories["item_id"].to_pylist()]
        if self.query == "item":
            return items
        return [f"{item}. {memory or ''}" for item, memory in zip(items, memories["memory"].to_pylist(), strict=True)]

    def queries(self, samples: pa.Table) -> list[str]:
        """One text a sample, with which it looks for memories; no rating is among them."""
        items = [self._item(item_id) for item_id in samples["item_id"].to_pylist()]
        if self.query == "item":
            return items
        who = zip(samples["user_id"].to_pylist(), samples["position"].to_pylist(), strict=True)
        profiles = [self._profile(user_id, position) for user_id, position in who]
        return [f"{profile} {item}" for profile, item in zip(profiles, items, strict=True)]

    def _item(self, item_id: str) -> str:
        try:
            return self.of_item[item_id]
        except KeyError:
            raise DataError(
                "this item has no row in data/items.parquet",
                where=f"item {item_id}",
                remedy="run `tune run persona_prepare --config ...` again",
            ) from None

    def _profile(self, user_id: str, position: int) -> str:
        assert self.profiles is not None, "query user_and_item needs profiles"
        if self.profile == "before_target":
            return self.profiles.before(user_id, position)
        return self.profiles.final(user_id)
