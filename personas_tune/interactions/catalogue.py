"""What is known of every item of a log, own files and the user's metadata together."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from personas_tune.errors import DataError
from personas_tune.interactions.items import Item, ItemRow


@dataclass(frozen=True)
class MetadataCounts:
    """How a metadata file fits a log.

    Args:
        n_joined: Items of the log that the file tells about.
        n_other_year: Items not joined because the file's year isn't the log's: another item of that id.
        n_unknown: Rows about items that nobody in the log rated.
    """

    n_joined: int
    n_other_year: int
    n_unknown: int

    def __str__(self) -> str:
        return (
            f"{self.n_joined} items joined, {self.n_other_year} left out for another year, "
            f"{self.n_unknown} rows about items that nobody rated"
        )


def place_items(item_ids: Sequence[str], rows: Iterable[ItemRow], where: str) -> list[Item]:
    """One item per id, in the ids' order; an empty one where no row tells about it.

    Args:
        item_ids: Ids of the log.
        rows: What the log's own item file tells.
        where: That file's name for messages.

    Raises:
        DataError: If there are rows, but none about an item of the log.
    """
    items, _ = _place(item_ids, rows, where)
    return [item or Item() for item in items]


def join_metadata(
    item_ids: Sequence[str], own: Sequence[Item], rows: Iterable[ItemRow], where: str
) -> tuple[list[Item], MetadataCounts]:
    """Fill what a log doesn't tell of its items from the user's metadata.

    What the log tells itself stays. A row of another year than the log's is about another item, since
    editions of MovieLens number their films differently, and isn't joined.

    Args:
        item_ids: Ids of the log.
        own: What the log tells, an item per id.
        rows: The metadata.
        where: The metadata file's name for messages.

    Raises:
        DataError: If no row is about an item of the log.
    """
    extra, n_unknown = _place(item_ids, rows, where)
    other_year = [new is not None and _years_differ(old, new) for old, new in zip(own, extra, strict=True)]
    joined = [
        _fill(old, new) if new is not None and not differs else old
        for old, new, differs in zip(own, extra, other_year, strict=True)
    ]
    n_told = sum(item is not None for item in extra)
    return joined, MetadataCounts(n_told - sum(other_year), sum(other_year), n_unknown)


def _place(item_ids: Sequence[str], rows: Iterable[ItemRow], where: str) -> tuple[list[Item | None], int]:
    place = {item_id: index for index, item_id in enumerate(item_ids)}
    items: list[Item | None] = [None] * len(item_ids)
    n_unknown = n_rows = 0
    for item_id, item in rows:
        n_rows += 1
        if item_id in place:
            items[place[item_id]] = item
        else:
            n_unknown += 1
    if n_unknown == n_rows > 0:
        what = f"none of its {n_rows} items is in the log, whose first id is {item_ids[0]!r}"
        raise DataError(what, where=where, remedy="use a file with the log's own item ids")
    return items, n_unknown


def _years_differ(old: Item, new: Item) -> bool:
    return old.year is not None and new.year is not None and old.year != new.year


def _fill(old: Item, new: Item) -> Item:
    return Item(
        title=old.title or new.title,
        year=old.year if old.year is not None else new.year,
        genres=old.genres or new.genres,
        summary=old.summary or new.summary,
        cast=old.cast or new.cast,
    )
