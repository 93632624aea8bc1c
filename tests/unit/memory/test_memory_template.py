import io

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_tables import interactions_table, items_table, random_items, random_log, users_table

from personas_tune.memory.tables import MEMORIES, PROFILES, Distilled
from personas_tune.memory.taste import Scale
from personas_tune.memory.template import distill_by_template

N_TRAIN = 17
seeds = st.integers(0, 10**6)
quick = settings(max_examples=20, deadline=None)


def distill(interactions: pa.Table, items: pa.Table, users: pa.Table, **changes: object) -> Distilled:
    usual = {"scale": Scale(1, 5, 1), "template": "movies", "batch_size": 5, "max_words": 2000}
    return distill_by_template(interactions, items, users, **{**usual, **changes})  # type: ignore[arg-type]


def bytes_of(distilled: Distilled) -> tuple[bytes, bytes]:
    def parquet(table: pa.Table) -> bytes:
        stream = io.BytesIO()
        pq.write_table(table, stream)
        return stream.getvalue()

    return parquet(distilled.profiles), parquet(distilled.memories)


def replace_rows(interactions: pa.Table, chosen: list[bool], seed: int, item_prefix: str) -> pa.Table:
    """Give the chosen rows other ratings and other items."""
    rng = np.random.default_rng(seed)
    rows = interactions.to_pylist()
    for row, is_chosen in zip(rows, chosen, strict=True):
        if is_chosen:
            row["rating"] = float(rng.integers(1, 6))
            row["item_id"] = f"{item_prefix}{row['position']}"
    return pa.Table.from_pylist(rows, schema=interactions.schema)


def with_new_items(items: pa.Table, ids: set[str], seed: int) -> pa.Table:
    made = random_items(np.random.default_rng(seed), len(ids))
    new = [{**item, "item_id": item_id} for item, item_id in zip(made, sorted(ids), strict=True)]
    return pa.concat_tables([items, items_table(new)])


def small_log() -> tuple[pa.Table, pa.Table, pa.Table]:
    """Six crime films at 5 and six horror films at 2, then a test row; others give all of them 3.5."""
    items = [
        {"item_id": f"i{n:02}", "title": f"Film {n}", "year": 1990 + n, "genres": ["Crime" if n < 6 else "Horror"],
         "mean_rating": 3.5, "n_ratings": 20}
        for n in range(13)
    ]  # fmt: skip
    rows = [("u", f"i{n:02}", 5.0 if n < 6 else 2.0, n, "train") for n in range(12)] + [("u", "i12", 1.0, 12, "test")]
    interactions = interactions_table(rows)
    return interactions, items_table(items), users_table(interactions)


def test_the_profile_of_a_small_log_is_as_computed_by_hand() -> None:
    profiles = distill(*small_log()).profiles.to_pylist()
    # Residuals are 1.5 and -1.5; sd = sqrt((12 * 2.25 + 5 * 0.64) / 17) = 1.33; score = 9 / 11 / 1.33 = 0.61.
    # 1990s: (6 - 4) * 1.5 / (10 + 5) / 1.33 = 0.15. The last third is four films, too few to speak of a change.
    assert profiles[-1]["profile"] == (
        "I have rated 12 films and give 3.50 on average, the same as others. "
        "I mostly give 2; 50 percent are 5 and 50 percent 2 or less, a wide spread. "
        "I love Crime. I dislike Horror. I like films from the 1990s. "
        "I watch few films, partly agree with the crowd and have a broad taste."
    )


def test_memories_of_a_small_log_are_as_computed_by_hand() -> None:
    memories = distill(*small_log()).memories.to_pylist()
    assert memories[0]["memory"] == "I gave Film 0 (1990) 5 of 5; others give it 3.5. Better than I expected."
    assert memories[6]["memory"] == "I gave Film 6 (1996) 2 of 5; others give it 3.5. Worse than I expected."
    assert (
        memories[-1]["memory"]
        == "I gave Film 11 (2001) 2 of 5; others give it 3.5. Worse than I expected: I dislike Horror."
    )


def test_profiles_stand_after_each_batch_and_after_all() -> None:
    distilled = distill(*random_log(seed=0))
    uptos = [row["upto_position"] for row in distilled.profiles.to_pylist() if row["user_id"] == "u1"]
    assert uptos == [0, 5, 10, 15, 17]
    assert distill(*random_log(seed=0, n_train=15)).profiles["upto_position"].to_pylist()[:5] == [0, 5, 10, 15, 0]


def test_a_user_without_history_has_a_profile() -> None:
    interactions = interactions_table([("u", "a", 3.0, 0, "train"), ("v", "a", 3.0, 0, "test")])
    profiles = distill(interactions, items_table([{"item_id": "a"}]), users_table(interactions)).profiles.to_pylist()
    assert [(row["user_id"], row["upto_position"]) for row in profiles] == [("u", 0), ("u", 1), ("v", 0)]
    assert profiles[-1]["profile"] == "I have not rated any films yet."


def test_tables_have_the_columns_order_and_types_of_the_workspace() -> None:
    distilled = distill(*random_log(seed=0))
    assert distilled.profiles.schema == PROFILES
    assert distilled.memories.schema == MEMORIES
    for table, key in ((distilled.profiles, "upto_position"), (distilled.memories, "position")):
        keys = list(zip(table["user_id"].to_pylist(), table[key].to_pylist(), strict=True))
        assert keys == sorted(set(keys))
    assert distilled.profiles["n_words"].to_pylist() == [
        len(text.split()) for text in distilled.profiles["profile"].to_pylist()
    ]


def test_every_train_interaction_has_one_memory() -> None:
    interactions, items, users = random_log(seed=3)
    memories = distill(interactions, items, users).memories
    train = interactions.filter(pc.equal(interactions["split"], "train"))
    columns = ["user_id", "item_id", "position", "rating"]
    assert memories.select(columns).equals(train.select(columns))


def test_only_the_final_profile_names_the_traits() -> None:
    profiles = distill(*random_log(seed=0)).profiles.to_pylist()
    assert {row["upto_position"] for row in profiles if "crowd" in row["profile"]} == {N_TRAIN}


@quick
@given(seed=seeds)
def test_order_of_input_rows_changes_no_byte(seed: int) -> None:
    interactions, items, users = random_log(seed)
    rng = np.random.default_rng(seed)
    shuffled = (table.take(rng.permutation(table.num_rows)) for table in (interactions, items, users))
    assert bytes_of(distill(*shuffled)) == bytes_of(distill(interactions, items, users))


@quick
@given(seed=seeds, other=seeds)
def test_test_rows_and_their_items_change_no_byte(seed: int, other: int) -> None:
    interactions, items, users = random_log(seed)
    in_test = [split == "test" for split in interactions["split"].to_pylist()]
    changed = replace_rows(interactions, in_test, other, item_prefix="canary")
    ids = {item_id for item_id in changed["item_id"].to_pylist() if item_id.startswith("canary")}
    rows = with_new_items(items, ids, other).to_pylist()
    train_ids = {row["item_id"] for row in interactions.to_pylist() if row["split"] == "train"}
    for row in rows:
        if row["item_id"] not in train_ids:
            row.update(title="canary", summary="canary canary", genres=["Canary"], cast=["C Canary"], mean_rating=1.25)
    planted = pa.Table.from_pylist(rows, schema=items.schema)
    distilled = distill(changed, planted, users)
    assert bytes_of(distilled) == bytes_of(distill(interactions, items, users))
    assert "canary" not in str(distilled.profiles.to_pylist() + distilled.memories.to_pylist()).lower()


@quick
@given(seed=seeds, other=seeds, upto=st.integers(0, N_TRAIN - 1))
def test_later_interactions_change_no_earlier_profile_or_memory(seed: int, other: int, upto: int) -> None:
    interactions, items, users = random_log(seed)
    later = [upto <= position < N_TRAIN for position in interactions["position"].to_pylist()]
    changed = replace_rows(interactions, later, other, item_prefix="new")
    ids = {item_id for item_id in changed["item_id"].to_pylist() if item_id.startswith("new")}
    before = distill(interactions, items, users)
    after = distill(changed, with_new_items(items, ids, other), users)
    assert before.profiles.filter(pc.less_equal(before.profiles["upto_position"], upto)).equals(
        after.profiles.filter(pc.less_equal(after.profiles["upto_position"], upto))
    )
    assert before.memories.filter(pc.less(before.memories["position"], upto)).equals(
        after.memories.filter(pc.less(after.memories["position"], upto))
    )


@quick
@given(seed=seeds, max_words=st.integers(20, 120), batch_size=st.integers(1, 10))
def test_texts_keep_to_the_word_bound(seed: int, max_words: int, batch_size: int) -> None:
    distilled = distill(*random_log(seed), max_words=max_words, batch_size=batch_size)
    assert min(distilled.profiles["n_words"].to_pylist()) >= 1
    assert max(distilled.profiles["n_words"].to_pylist()) <= max_words
    assert max(len(text.split()) for text in distilled.memories["memory"].to_pylist()) <= min(max_words, 35)


@pytest.mark.parametrize("batch_size", [1, 4, 10])
def test_batch_size_changes_when_profiles_are_written_and_nothing_else(batch_size: int) -> None:
    log = random_log(seed=5)
    reference = {
        row["upto_position"]: row["profile"] for row in distill(*log, batch_size=1).profiles.to_pylist()[: N_TRAIN + 1]
    }
    profiles = [row for row in distill(*log, batch_size=batch_size).profiles.to_pylist() if row["user_id"] == "u0"]
    assert all(row["profile"] == reference[row["upto_position"]] for row in profiles)
    assert distill(*log, batch_size=batch_size).memories.equals(distill(*log, batch_size=1).memories)


def test_the_generic_domain_does_not_speak_of_films() -> None:
    texts = distill(*random_log(seed=2), template="generic").profiles["profile"].to_pylist()
    assert all("film" not in text and "watch" not in text for text in texts)
    assert "items" in texts[-1]
