import asyncio
import hashlib

from personas_tune.llm.journal import Attempt, Journal, Usage
from personas_tune.llm.parts import find_parts


def sha(word):
    return hashlib.sha256(str(word).encode()).hexdigest()


def record(journal, body, *words, status="answered"):
    names = tuple(map(sha, words))
    asyncio.run(
        journal.record(Attempt(sha(words), status, 200, body, Usage(), None, "m", "online", 0.0, 0.0, parts=names))
    )


def test_each_answer_comes_once_with_the_places_of_the_parts_asked_for(tmp_path):
    with Journal.open(tmp_path / "journal.sqlite") as journal:
        record(journal, "one", "a", "b", "c")
        record(journal, "two", "d", "e")
        found = list(find_parts(journal, [sha(word) for word in ("e", "c", "unheard-of", "a")]))
    assert found == [("one", {sha("a"): 0, sha("c"): 2}), ("two", {sha("e"): 1})]


def test_the_newest_answer_counts_and_failures_hold_nothing(tmp_path):
    with Journal.open(tmp_path / "journal.sqlite") as journal:
        record(journal, "old", "a", "b")
        record(journal, "new", "b", "x")
        record(journal, "failed", "a", status="failed")
        found = list(find_parts(journal, [sha("a"), sha("b")]))
    assert found == [("old", {sha("a"): 0}), ("new", {sha("b"): 0})]
    with Journal.open(tmp_path / "journal.sqlite") as journal:
        assert list(find_parts(journal, [])) == []


def test_more_names_than_a_statement_takes_are_found(tmp_path):
    with Journal.open(tmp_path / "journal.sqlite") as journal:
        record(journal, "long", *range(40_000))
        found = list(find_parts(journal, [sha(number) for number in range(40_000)]))
    assert {body for body, _ in found} == {"long"}
    assert {name: place for _, places in found for name, place in places.items()} == {
        sha(number): number for number in range(40_000)
    }
