import doctest
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from memory_tables import interactions_table, items_table
from show_tables import TITLES_OF_TEST_ROWS, write_run

from personas_tune.errors import ConfigError, DataError, MissingInputError
from personas_tune.memory import changes
from personas_tune.memory.changes import compare_profiles, split_sentences
from personas_tune.memory.lookup import read_column, read_matching
from personas_tune.memory.show import find_experiment, show_user
from personas_tune.memory.user_tables import UserTables, read_user, read_user_ids
from personas_tune.memory.user_text import write_user
from personas_tune.workspace import Workspace


@pytest.fixture
def run(tmp_path: Path) -> Workspace:
    return write_run(tmp_path / "run")


def view_of(run: Workspace, user_id: str = "ann"):
    return read_user(user_id, UserTables.of(run))


# The text

ANN = """\
USER ann
  rated       3 items, 3.33 on average
  to predict  2 ratings, not shown
  activity    12, tier 1 of 3
  conformity  0.75, tier 2 of 3
  diversity   4, tier 3 of 3
  persona     1 (1 of 2 users), 0.25 from its centre

PROFILE after 3 ratings, 11 words, by openai
  I like War. I love slow noir. I leave comedies early.

HOW IT GREW

-- Before any rating ---------------------------------------
  Profile before any rating, 4 words:
    I am new here.

-- Ratings 1-2 ---------------------------------------------
   1  Heat (1995): rated 4, others 3.9
      A memory of Heat.
   2  Up (2009): rated 1.5
  Profile after 2 ratings, 6 words, against the one before:
    - I am new here.
    + I like War.
    + I love noir.

-- Rating 3 ------------------------------------------------
   3  i3: rated 4.5
      A memory of a nameless one, which is so long that it
      goes over two lines.
  Profile after 3 ratings, 11 words, against the one before:
    = 1 sentence unchanged
    - I love noir.
    + I love slow noir.
    + I leave comedies early.
"""


def test_the_text_of_a_user_has_all_that_is_known(run):
    assert write_user(view_of(run), 60) == ANN


def test_no_test_row_is_shown(run):
    text = write_user(view_of(run), 100)
    assert not [title for title in TITLES_OF_TEST_ROWS if title in text]
    assert "2 ratings, not shown" in text


@pytest.mark.parametrize("width", [0, 40, 41, 57, 80, 100, 500])
def test_lines_keep_within_the_width(run, width):
    longest = max(map(len, write_user(view_of(run), width).splitlines()))
    assert longest == min(max(width, 40), 100)


def test_control_characters_of_titles_and_texts_do_not_reach_the_terminal(tmp_path):
    evil = "\x1b[31mred\x1b[0m \u202eback\x07 \u200b"
    run = write_run(tmp_path, title=evil, profile=evil, memory=evil, distiller="x")
    assert all(line.isprintable() for line in write_user(view_of(run), 80).splitlines())
    assert "[31mred[0m back" in write_user(view_of(run), 80)


def test_a_profile_of_several_paragraphs_keeps_them(tmp_path):
    run = write_run(tmp_path, profile="Tastes:\n- War\n- Noir\n")
    assert "  Tastes:\n  - War\n  - Noir\n" in write_user(view_of(run), 80)


# What isn't there


def test_stages_that_have_not_run_are_named_with_their_recipes(run):
    for path in (run.personas, run.memories, run.items, run.users):
        path.unlink()
    text = write_user(view_of(run), 80)
    assert "persona     persona_cluster hasn't run (no personas/personas.parquet)" in text
    assert "memories    persona_distill hasn't run (no memory/memories.parquet)" in text
    assert "titles      persona_prepare hasn't run (no data/items.parquet)" in text
    assert "traits      persona_prepare hasn't run (no data/users.parquet)" in text
    assert "i1: rated 4\n" in text


def test_profiles_are_shown_without_the_history(run):
    run.interactions.unlink()
    text = write_user(view_of(run), 80)
    assert "history     persona_prepare hasn't run (no data/interactions.parquet)" in text
    assert "-- Up to rating 2 ---" in text
    assert "+ I love noir." in text


def test_without_profiles_the_recipe_that_makes_them_is_named(run):
    run.profiles.unlink()
    with pytest.raises(MissingInputError, match=r"profiles\.parquet: .*tune run persona_distill "):
        view_of(run)


def test_a_user_without_texts_is_shown_with_the_reason(run):
    assert "profile     this user has none" in write_user(view_of(run, "zoe"), 80)
    run.left_out.write_text(json.dumps({"zoe": "refused 3 times"}), encoding="utf-8")
    text = write_user(view_of(run, "zoe"), 80)
    assert "profile     left out (refused 3 times)" in text
    assert "   1  Heat (1995): rated 2, others 3.9\n  No profile was written after these.\n" in text
    assert "persona     this user has none" in text


def test_ratings_after_the_last_profile_are_shown_too(run):
    table = pq.read_table(run.profiles)
    pq.write_table(table.filter(pc.less(table["upto_position"], 3)), run.profiles)
    assert view_of(run).steps[-1].profile is None
    assert [rated.number for rated in view_of(run).rated] == [1, 2, 3]
    assert view_of(run).final.upto == 2


def test_a_user_without_memories_is_told_of(run):
    table = pq.read_table(run.memories)
    pq.write_table(table.filter(pc.equal(table["user_id"], "bob")), run.memories)
    assert view_of(run).notes == ("memories: this user has none",)


# Unknown users and damaged tables


@pytest.mark.parametrize(("asked", "hint"), [("anne", "did you mean ann?"), ("7", "it has ann, bob, zoe")])
def test_an_unknown_user_is_answered_with_the_nearest_or_the_first(run, asked, hint):
    with pytest.raises(ConfigError) as caught:
        view_of(run, asked)
    assert str(caught.value).startswith(f"{run.users}: no user '{asked}' among its 3 users; {hint}")


def test_an_unknown_user_is_looked_for_among_the_profiles_where_there_are_no_users(run):
    run.users.unlink()
    with pytest.raises(ConfigError, match=r"profiles\.parquet: no user 'zoe' among its 2 users"):
        view_of(run, "zoe")


@pytest.mark.parametrize("name", ["interactions", "items", "users", "profiles", "memories", "personas"])
def test_a_damaged_table_is_named_in_one_line(run, name):
    path = getattr(run, name)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError) as caught:
        view_of(run)
    assert str(caught.value).startswith(f"{path}: can't be read (")
    assert "again" in caught.value.remedy
    pq.write_table(pa.table({"user_id": ["ann"], "item_id": ["i1"]}), path)
    with pytest.raises(DataError, match="can't be read"):
        view_of(run)


def test_user_ids_are_sorted_and_each_comes_once(tmp_path):
    pq.write_table(pa.table({"user_id": ["b", "a", "c", "a"]}), tmp_path / "t.parquet", row_group_size=2)
    assert read_user_ids(tmp_path / "t.parquet").to_pylist() == ["a", "b", "c"]
    with pytest.raises(DataError, match="item_id"):
        read_column(tmp_path / "t.parquet", "item_id")


# Looking rows up


@given(
    keys=st.lists(st.sampled_from(["", "a", "b", "ba", "ä", "z", None]), max_size=30),
    wanted=st.lists(st.sampled_from(["", "a", "b", "bb", "ä", "zz"]), min_size=1, max_size=3),
    group_size=st.integers(1, 9),
)
def test_a_lookup_finds_what_a_full_reading_finds(tmp_path_factory, keys, wanted, group_size):
    path = tmp_path_factory.mktemp("lookup") / "t.parquet"
    columns = {"tags": [["x"]] * len(keys), "key": pa.array(keys, pa.string()), "row": range(len(keys))}
    pq.write_table(pa.table(columns), path, row_group_size=group_size)
    found = read_matching(path, ["row", "key"], "key", wanted)
    assert found.column_names == ["row", "key"]
    assert found.to_pylist() == [{"row": row, "key": key} for row, key in enumerate(keys) if key in wanted]


def test_a_lookup_reads_no_other_row_group(tmp_path):
    path = tmp_path / "t.parquet"
    table = pa.table({"user_id": ["a", "b", "c"], "text": ["one", "two", "three"]})
    pq.write_table(table, path, row_group_size=1, compression="zstd")
    content = bytearray(path.read_bytes())
    second = pq.ParquetFile(path).metadata.row_group(1).column(0).dictionary_page_offset
    content[4:second] = b"\xff" * (second - 4)  # all of the first row group
    path.write_bytes(content)
    assert read_matching(path, ["user_id", "text"], "user_id", ["b"])["text"].to_pylist() == ["two"]
    with pytest.raises(DataError, match="can't be read"):
        read_matching(path, ["user_id", "text"], "user_id", ["a"])


def test_a_flipped_bit_in_a_text_is_told_in_one_line(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"user_id": ["a"], "text": ["harmless"]}), path, compression="none")
    path.write_bytes(path.read_bytes().replace(b"harmless", b"h\xffrmless"))
    for read in (lambda: read_matching(path, ["user_id", "text"], "user_id", ["a"]), lambda: read_column(path, "text")):
        with pytest.raises(DataError, match=r"t\.parquet: can't be read \("):
            read()


# What changed

TEXTS = st.lists(st.sampled_from(["I like War.", "I like Noir.", "I like War and Noir.", "Never!", "So 3.5 it is."]))


@given(before=TEXTS, after=TEXTS)
def test_kept_and_gone_sentences_are_the_old_profile_and_kept_and_new_ones_the_new(before, after):
    found = compare_profiles(" ".join(before), "\n".join(after))
    assert [change.sentence for change in found if change.mark != "+"] == before
    assert [change.sentence for change in found if change.mark != "-"] == after


def test_a_reworded_sentence_follows_what_it_was():
    before = "I rate 10 films. I like War. I hate Noir."
    after = "I rate 20 films. Dogs bore me. I like War and dogs. I hate Noir."
    assert [(change.mark, change.sentence) for change in compare_profiles(before, after)] == [
        ("-", "I rate 10 films."),
        ("+", "I rate 20 films."),
        ("+", "Dogs bore me."),
        ("-", "I like War."),
        ("+", "I like War and dogs."),
        ("=", "I hate Noir."),
    ]


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("", []),
        ("  One.  Two? ", ["One.", "Two?"]),
        ("It has 3.5 stars vs. others. (Really!) Yes", ["It has 3.5 stars vs. others. (Really!)", "Yes"]),
        ('I say "never!" Then I do.', ['I say "never!"', "Then I do."]),
        ("Tastes:\n\n- War\n- Noir", ["Tastes:", "- War", "- Noir"]),
        ("我喜欢战争片。我讨厌喜剧。", ["我喜欢战争片。", "我讨厌喜剧。"]),
    ],
)
def test_sentences_end_where_a_reader_says(text, sentences):
    assert split_sentences(text) == sentences


def test_the_examples_in_docstrings_hold():
    assert doctest.testmod(changes).failed == 0
    assert doctest.testmod(changes).attempted == 2


# Finding the experiment


def test_the_current_folder_comes_before_the_only_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^current folder: no experiment here, nor in runs/; add --in DIR"):
        find_experiment()
    only = write_run(Path("runs/one"))
    Path("runs/notes").mkdir()
    Path("data").mkdir()  # a folder of raw logs makes no experiment
    assert find_experiment() == only
    write_run(Path("runs/two"))
    with pytest.raises(ConfigError, match=r"^current folder: 2 experiments \(runs/one, runs/two\); add --in DIR"):
        find_experiment()
    assert find_experiment(Path("runs/two")) == Workspace.at("runs/two")
    here = write_run(Path())
    assert find_experiment() == here


def test_a_folder_that_is_not_there_is_said_to_be(tmp_path):
    with pytest.raises(ConfigError, match="gone: no such folder; give the output_dir"):
        find_experiment(tmp_path / "gone")


def test_an_experiment_without_a_cohort_needs_profiles(tmp_path):
    with pytest.raises(MissingInputError, match="persona_distill"):
        show_user("ann", tmp_path)


def test_a_user_without_any_row_is_shown(tmp_path):
    run = write_run(tmp_path)
    pq.write_table(interactions_table([]), run.interactions)
    pq.write_table(items_table([{"item_id": "i1"}]), run.items)
    assert write_user(view_of(run, "zoe"), 80).startswith("USER zoe\n  activity")
