from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from memory_tables import random_log
from show_tables import TITLES_OF_TEST_ROWS, write_run

from personas_tune.errors import ConfigError, DataError, MissingInputError
from personas_tune.memory.page import render_page, render_users_page
from personas_tune.memory.show import show_user
from personas_tune.memory.tables import memories_table, profiles_table
from personas_tune.memory.user_tables import UserTables, read_user
from personas_tune.workspace import Workspace

EVIL = "</p></style><script>alert('x')</script>\"><img src=x onerror=alert(1)> & <b>"
WITHOUT_END = {"meta"}


class Page(HTMLParser):
    """A page as a browser sees it: its tags with attributes, and all its text; every tag must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.parts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in WITHOUT_END:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.parts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.parts).split())

    def names(self) -> set[str]:
        return {name for name, _ in self.tags}

    def n(self, tag: str, **attributes: str | None) -> int:
        return sum(name == tag and attributes.items() <= own.items() for name, own in self.tags)


def view_of(run: Workspace, user_id: str = "ann"):
    return read_user(user_id, UserTables.of(run))


def users_page(run: Workspace, n_users: int = 24) -> str:
    return render_users_page(run.interactions, run.items, run.users, run.profiles, run.memories, n_users)


def write_cohort(root: Path, n_users: int) -> Workspace:
    """The tables of a random cohort, u0 and so on, each with one profile and a memory."""
    run = Workspace.at(root)
    run.users.parent.mkdir(parents=True)
    run.profiles.parent.mkdir()
    interactions, items, users = random_log(seed=1, n_users=n_users)
    for name in ("activity", "conformity", "diversity"):
        users = users.append_column(name, users["activity_tier"])
    pq.write_table(interactions, run.interactions)
    pq.write_table(items, run.items)
    pq.write_table(users, run.users)
    pq.write_table(profiles_table([(f"u{n}", 17, f"Taste of u{n}.") for n in range(n_users)], "file"), run.profiles)
    pq.write_table(memories_table([]), run.memories)
    return run


# One user


def test_a_page_of_one_user_has_all_that_is_known(tmp_path):
    page = Page(render_page([view_of(write_run(tmp_path))], "User ann"))
    assert page.text.startswith("User ann User ann rated 3 items, 3.33 on average to predict 2 ratings, not shown ")
    assert "persona 1 (1 of 2 users), 0.25 from its centre Profile after 3 ratings, 11 words, by openai" in page.text
    assert "Ratings 1-2 profile: 2 sentences new, 1 gone Heat (1995) 4 others 3.9 A memory of Heat." in page.text
    assert "= 1 sentence unchanged \N{MINUS SIGN} I love noir. + I love slow noir. + I leave comedies" in page.text
    assert page.n("details") == 5  # three batches, two of them with a whole profile folded away
    assert page.n("ol", start="3") == 1


def test_no_test_row_is_on_a_page(tmp_path):
    run = write_run(tmp_path)
    for text in (render_page([view_of(run)], "ann"), users_page(run)):
        assert not [title for title in TITLES_OF_TEST_ROWS if title in text]


def test_a_user_without_profiles_is_on_a_page_too(tmp_path):
    page = Page(render_page([view_of(write_run(tmp_path), "zoe")], "User zoe"))
    assert "profile this user has none" in page.text
    assert "Rating 1 no profile after these Heat (1995) 2 others 3.9" in page.text


# Safety


def test_titles_and_texts_stay_text(tmp_path):
    run = write_run(tmp_path, title=EVIL, profile=EVIL, memory=EVIL, distiller=EVIL)
    view = view_of(run)
    harmless = Page(render_page([view_of(write_run(tmp_path / "harmless"))], "User ann"))
    page = Page(render_page([view], EVIL, EVIL))
    assert page.names() <= harmless.names() | {"p"}
    assert "script" not in page.names()
    # As page title (twice), note, item, memory, distiller, final profile whole, its last step new and whole.
    assert page.text.count(EVIL) == 9


def test_ids_stay_text(tmp_path):
    run = write_run(tmp_path)
    for path in (run.users, run.profiles):
        table = pq.read_table(path)
        ids = [EVIL if user_id == "ann" else user_id for user_id in table["user_id"].to_pylist()]
        pq.write_table(table.set_column(0, "user_id", pa.array(ids)), path)
    page = Page(users_page(run))
    assert EVIL in page.text
    assert page.names().isdisjoint({"script", "img"})


def test_control_characters_are_left_out(tmp_path):
    text = render_page([view_of(write_run(tmp_path, memory="a\x00b\x1b[0m\u202ec"))], "ann")
    assert "ab[0mc" in text
    assert all(letter.isprintable() or letter == "\n" for letter in text)


def test_a_page_asks_for_nothing_and_runs_nothing(tmp_path):
    text = users_page(write_cohort(tmp_path / "run", 3))
    page = Page(text)
    assert page.names().isdisjoint({"script", "link", "img", "iframe", "object", "a", "form"})
    used = {name for _, attributes in page.tags for name in attributes}
    assert used <= {"lang", "charset", "name", "content", "http-equiv", "class", "dir", "start", "open"}
    assert not [word for word in ("http:", "https:", "url(", "@import", "javascript:") if word in text]
    policy = {"http-equiv": "Content-Security-Policy", "content": "default-src 'none'; style-src 'unsafe-inline'"}
    assert page.n("meta", **policy) == 1


def test_a_page_follows_the_readers_colours_and_width(tmp_path):
    text = users_page(write_cohort(tmp_path / "run", 1))
    assert "@media (prefers-color-scheme: dark)" in text
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text


# Some of many users


def test_a_page_of_many_shows_some_at_even_distances_and_says_how_the_others_are_seen(tmp_path):
    run = write_cohort(tmp_path / "run", 9)
    page = Page(users_page(run, n_users=3))
    assert "3 of 9 users, spread evenly over the sorted ids. personas-tune show USER prints any of them" in page.text
    assert [f"u{n}" for n in range(9) if f"Taste of u{n}." in page.text] == ["u0", "u4", "u8"]
    assert page.n("details", **{"class": "user"}) == 3
    assert page.n("details", open=None) == 0


@pytest.mark.parametrize(("length", "gist"), [(160, "喜" * 160), (161, "喜" * 160 + " ...")])
def test_a_folded_user_shows_how_the_profile_begins(tmp_path, length, gist):
    run = write_run(tmp_path, profile="喜" * length)
    assert f'<small class="gist" dir="auto">{gist}</small>' in users_page(run)


@pytest.mark.parametrize("n_users", [1, 2, 9, 24])
def test_no_more_users_are_shown_than_asked_for_and_each_once(tmp_path, n_users):
    run = write_cohort(tmp_path / "run", 9)
    page = Page(users_page(run, n_users))
    shown = [n for n in range(9) if f"Taste of u{n}." in page.text]
    assert len(shown) == min(n_users, 9)
    assert page.n("blockquote") == 2 * len(shown)
    assert (" of 9 users" in page.text) == (n_users < 9)


def test_the_same_tables_give_the_same_bytes_wherever_they_lie(tmp_path):
    first, second = (users_page(write_cohort(tmp_path / name, 5)) for name in ("one", "two"))
    assert first == second
    assert str(tmp_path) not in first


def test_an_empty_cohort_gives_an_empty_page(tmp_path):
    run = write_cohort(tmp_path / "run", 1)
    for path in (run.users, run.profiles):
        pq.write_table(pq.read_table(path).slice(0, 0), path)
    assert Page(users_page(run)).n("details") == 0


def test_missing_and_damaged_tables_are_named(tmp_path):
    run = write_cohort(tmp_path / "run", 1)
    run.users.write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"users\.parquet: can't be read"):
        users_page(run)
    run.items.unlink()
    with pytest.raises(MissingInputError, match="persona_prepare"):
        users_page(run)


# Written by the command


def test_the_command_writes_the_page_of_one_user_with_the_persona(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    show_user("ann", run.root, tmp_path / "ann.html")
    assert capsys.readouterr().out == f"written to {tmp_path / 'ann.html'}\n"
    assert (tmp_path / "ann.html").read_text(encoding="utf-8") == render_page([view_of(run)], "User ann")
    with pytest.raises(ConfigError, match=r"can't be written \(Is a directory\); write it elsewhere"):
        show_user("ann", run.root, tmp_path)
