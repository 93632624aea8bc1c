"""Finds journalled answers by their parts, and reads each of them once however many of its parts are asked for."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from personas_tune.llm.journal import Journal

_NAMES_AT_ONCE = 10_000  # SQLite takes 32,766 values in a statement


def find_parts(journal: Journal, names: Sequence[str]) -> Iterator[tuple[str, dict[str, int]]]:
    """The bodies of the newest answers that hold the named parts, each with the parts' places in it.

    An answer may come several times, each time with other parts. Names that no answer holds are passed over.
    """
    for start in range(0, len(names), _NAMES_AT_ONCE):
        some = names[start : start + _NAMES_AT_ONCE]
        marks = ", ".join("?" * len(some))
        rows = journal.execute(
            f"SELECT attempt_id, name, place FROM parts WHERE name IN ({marks}) ORDER BY attempt_id, place", some
        )
        for attempt_id, group in groupby(rows, key=lambda row: row[0]):
            places = {name: place for _, name, place in group}
            ((body,),) = journal.execute("SELECT response FROM attempts WHERE id = ?", (attempt_id,))
            yield body, places
