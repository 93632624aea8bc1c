import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import persona_prepare
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from personas_tune.errors import DataError
from personas_tune.interactions.items import Item
from personas_tune.interactions.log import Log, drop_users
from personas_tune.interactions.prepare import Prepared, prepare
from personas_tune.interactions.world_log import select_oracle

N_USERS, N_ITEMS = 20, 40


def random_log(seed: int = 0) -> Log:
    """Twenty users of 4 to 23 interactions, times with many ties."""
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(N_USERS), np.arange(4, 4 + N_USERS))
    item = np.concatenate([rng.choice(N_ITEMS, n, replace=False) for n in np.bincount(user)])
    time = rng.integers(1000, 1100, len(user))
    order = np.lexsort((time, user))
    return Log(
        pa.array([f"u{number:02d}" for number in range(N_USERS)], pa.string()),
        pa.array([f"i{number:02d}" for number in range(N_ITEMS)], pa.string()),
        user[order].astype(np.int32),
        item[order].astype(np.int32),
        rng.integers(1, 6, len(user)).astype(np.float64),
        time[order],
    )


CATALOGUE = [Item(f"Film {n}", 1950 + n, ("Drama", "War")[: 1 + n % 2], None, ()) for n in range(N_ITEMS)]
TABLES = ("interactions", "items", "users", "outside")


def test_a_small_log_gives_the_tables_worked_out_by_hand():
    # a: x 5, y 3, z 1 (cut after 1); b: x 4, z 2 (cut after 1); c: y 2, outside the range.
    log = Log(
        pa.array(["a", "b", "c"]),
        pa.array(["x", "y", "z"]),
        np.array([0, 0, 0, 1, 1, 2], np.int32),
        np.array([0, 1, 2, 2, 0, 1], np.int32),
        np.array([5.0, 3, 1, 2, 4, 2]),
        np.array([10, 20, 30, 5, 5, 7]),
    )
    catalogue = [Item("X", 1999, ("Drama",), "sum", ("P", "Q")), Item(), Item("Z")]
    prepared = prepare(log, catalogue, min_interactions=2, historical_average="train")
    assert prepared.interactions.to_pydict() == {
        "user_id": ["a", "a", "a", "b", "b"],
        "item_id": ["x", "y", "z", "z", "x"],
        "rating": [5.0, 3.0, 1.0, 2.0, 4.0],
        "timestamp": [10, 20, 30, 5, 5],
        "position": [0, 1, 2, 0, 1],
        "split": ["train", "test", "test", "train", "test"],
    }
    assert prepared.items.to_pydict() == {
        "item_id": ["x", "y", "z"],
        "title": ["X", "y", "Z"],
        "year": [1999, None, None],
        "genres": [["Drama"], [], []],
        "summary": ["sum", None, None],
        "cast": [["P", "Q"], [], []],
        "mean_rating": [5.0, 2.0, 2.0],
        "n_ratings": [1, 1, 1],
    }
    assert prepared.users.to_pydict() == {
        "user_id": ["a", "b"],
        "n_train": [1, 1],
        "n_test": [2, 1],
        "mean_rating": [5.0, 2.0],
        "activity": [1.0, 1.0],
        "activity_tier": [3, 3],
        "conformity": [0.0, 0.0],
        "conformity_tier": [3, 3],
        "diversity": [0.0, 0.0],
        "diversity_tier": [1, 2],
    }
    assert prepared.outside.to_pydict() == {"user_id": ["c"], "item_id": ["y"], "rating": [2.0], "timestamp": [7]}


def test_columns_have_the_types_that_later_stages_read():
    prepared = prepare(random_log(), CATALOGUE)
    texts = pa.list_(pa.string())
    tiers = [(f"{name}{end}", kind) for name in ("activity", "conformity", "diversity")
             for end, kind in (("", pa.float64()), ("_tier", pa.int32()))]  # fmt: skip
    log = [("user_id", pa.string()), ("item_id", pa.string()), ("rating", pa.float64()), ("timestamp", pa.int64())]
    assert prepared.interactions.schema == pa.schema([*log, ("position", pa.int32()), ("split", pa.string())])
    assert prepared.outside.schema == pa.schema(log)
    assert prepared.items.schema == pa.schema(
        [("item_id", pa.string()), ("title", pa.string()), ("year", pa.int32()), ("genres", texts),
         ("summary", pa.string()), ("cast", texts), ("mean_rating", pa.float64()), ("n_ratings", pa.int32())]
    )  # fmt: skip
    assert prepared.users.schema == pa.schema(
        [
            ("user_id", pa.string()),
            ("n_train", pa.int32()),
            ("n_test", pa.int32()),
            ("mean_rating", pa.float64()),
            *tiers,
        ]
    )


def means_by_item(user_ids, item_ids, ratings, keep) -> dict[str, float]:
    ratings_of = {}
    for user, item, rating in zip(user_ids, item_ids, ratings, strict=True):
        if keep(user, item):
            ratings_of.setdefault(item, []).append(rating)
    return {item: sum(values) / len(values) for item, values in ratings_of.items()}


@pytest.mark.parametrize("which", ["outside", "train", "all", "none"])
def test_averages_are_of_the_rows_they_are_named_after(which):
    log = random_log()
    prepared = prepare(log, CATALOGUE, n_users=6, test_rows=20, historical_average=which, seed=3)
    cohort = set(prepared.users["user_id"].to_pylist())
    rows = prepared.interactions.to_pylist()
    train = {(row["user_id"], row["item_id"]) for row in rows if row["split"] == "train"}
    keep = {
        "outside": lambda user, item: user not in cohort,
        "train": lambda user, item: user not in cohort or (user, item) in train,
        "all": lambda user, item: True,
        "none": lambda user, item: False,
    }[which]
    ids = [log.user_ids.to_pylist()[code] for code in log.user], [log.item_ids.to_pylist()[code] for code in log.item]
    expected = means_by_item(*ids, log.rating, keep)
    items = prepared.items.to_pydict()
    assert dict(zip(items["item_id"], items["mean_rating"], strict=True)) == pytest.approx(
        {item: expected.get(item) for item in items["item_id"]}
    )
    assert sum(items["n_ratings"]) == sum(
        keep(*pair) and pair[1] in items["item_id"] for pair in zip(*ids, strict=True)
    )


def with_other_test_ratings(log: Log, prepared: Prepared, new_ratings: list[float]) -> Log:
    """The log with other ratings in the cohort's rows behind the cut."""
    n_train = dict(zip(*(prepared.users[name].to_pylist() for name in ("user_id", "n_train")), strict=True))
    cut = np.array([n_train.get(user, N_ITEMS) for user in log.user_ids.to_pylist()])
    rows = np.flatnonzero(log.position >= cut[log.user])
    rating = log.rating.copy()
    rating[rows] = np.resize(new_ratings, len(rows))
    return dataclasses.replace(log, rating=rating)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([1.0, 2.0, 3.0, 4.0, 5.0]), min_size=1, max_size=80), st.integers(0, 5))
def test_no_rating_of_a_test_row_reaches_anything_but_its_own_row(new_ratings, seed):
    log = random_log(seed)
    for which in ("outside", "train"):
        options = {"n_users": 8, "test_rows": 30, "historical_average": which, "seed": seed}
        before = prepare(log, CATALOGUE, **options)
        after = prepare(with_other_test_ratings(log, before, new_ratings), CATALOGUE, **options)
        for name in ("items", "users", "outside"):
            assert getattr(after, name).equals(getattr(before, name))
        train = pc.equal(before.interactions["split"], "train")
        assert after.interactions.filter(train).equals(before.interactions.filter(train))


def test_the_leaky_options_do_leak():
    log = random_log()
    for option in ({"historical_average": "all"}, {"traits": "all"}):
        before = prepare(log, CATALOGUE, n_users=8, **option)
        after = prepare(with_other_test_ratings(log, before, [1.0]), CATALOGUE, n_users=8, **option)
        assert not (after.items.equals(before.items) and after.users.equals(before.users))


def test_every_interaction_lands_in_one_place():
    log = random_log()
    prepared = prepare(log, CATALOGUE, n_users=7, seed=1)
    assert prepared.interactions.num_rows + prepared.outside.num_rows == len(log.user)
    cohort, others = (set(table["user_id"].to_pylist()) for table in (prepared.interactions, prepared.outside))
    assert cohort == set(prepared.users["user_id"].to_pylist())
    assert not cohort & others


def test_drawing_test_rows_leaves_train_rows_and_positions_as_they_were():
    log = random_log()
    whole, drawn = prepare(log, CATALOGUE, n_users=7), prepare(log, CATALOGUE, n_users=7, test_rows=15)
    rows, kept = whole.interactions.to_pylist(), drawn.interactions.to_pylist()
    assert all(row in rows for row in kept)
    assert [row for row in kept if row["split"] == "train"] == [row for row in rows if row["split"] == "train"]
    assert sum(drawn.users["n_test"].to_pylist()) == 15
    assert min(drawn.users["n_test"].to_pylist()) >= 1
    assert drawn.outside.equals(whole.outside)


def test_a_seed_draws_the_same_and_another_draws_others():
    log = random_log()
    one, again, other = (prepare(log, CATALOGUE, n_users=5, test_rows=12, seed=seed) for seed in (4, 4, 5))
    assert all(getattr(one, name).equals(getattr(again, name)) for name in TABLES)
    assert not one.users["user_id"].equals(other.users["user_id"])


def test_a_global_cut_puts_all_train_before_all_test():
    prepared = prepare(random_log(), CATALOGUE, n_users=10, split_by="global_time", train_fraction=0.5)
    rows = prepared.interactions.to_pylist()
    last_train = max(row["timestamp"] for row in rows if row["split"] == "train")
    assert last_train < min(row["timestamp"] for row in rows if row["split"] == "test")
    assert min(prepared.users["n_train"].to_pylist()) >= 1
    assert min(prepared.users["n_test"].to_pylist()) >= 1


def test_a_global_cut_puts_all_rows_of_its_second_into_test():
    # Half of 8 rows lie before the fifth time, 20; of its ties none may be train.
    times = np.array([10, 20, 20, 30, 10, 11, 20, 40])
    user = np.repeat(np.array([0, 1], np.int32), 4)
    item = np.tile(np.arange(4, dtype=np.int32), 2)
    log = Log(pa.array(["a", "b"]), pa.array(["w", "x", "y", "z"]), user, item, np.full(8, 3.0), times)
    prepared = prepare(log, CATALOGUE[:4], split_by="global_time", train_fraction=0.5)
    assert prepared.interactions["split"].to_pylist() == [
        "train",
        "test",
        "test",
        "test",
        "train",
        "train",
        "test",
        "test",
    ]


def test_a_global_cut_counts_whom_it_leaves_out_and_puts_them_outside():
    log = random_log()
    late = dataclasses.replace(log, timestamp=np.where(log.user == 19, 5000, log.timestamp))
    prepared = prepare(late, CATALOGUE, split_by="global_time", train_fraction=0.5)
    assert prepared.n_left_out >= 1
    assert prepared.users.num_rows == N_USERS - prepared.n_left_out
    assert "u19" in prepared.outside["user_id"].to_pylist()


def test_a_global_cut_that_leaves_nobody_is_an_error():
    log = random_log()
    with pytest.raises(DataError, match="the time cut leaves none of 20 users"):
        prepare(
            dataclasses.replace(log, timestamp=np.zeros(len(log.user), np.int64)), CATALOGUE, split_by="global_time"
        )


def test_traits_of_train_are_those_of_the_log_cut_at_the_same_place():
    log = random_log()
    prepared = prepare(log, CATALOGUE, n_users=5, train_fraction=0.5)
    n_train = np.maximum(log.n_per_user // 2, 1)
    cut = prepare(log.rows(log.position < n_train[log.user]), CATALOGUE, traits="all")
    for name in ("activity", "conformity", "diversity"):
        one, other = getattr(prepared.traits, name), getattr(cut.traits, name)
        np.testing.assert_array_equal(one.value, other.value)
        np.testing.assert_array_equal(one.tier, other.tier)
    assert (
        prepared.users["activity"].to_pylist()
        != prepare(log, CATALOGUE, n_users=5, traits="all").users["activity"].to_pylist()
    )


def test_excluded_users_leave_no_trace():
    log = random_log()
    gone = ["u03", "u19", "nobody"]
    kept = ~np.isin(log.user, [3, 19])
    without = prepare(drop_users(log, gone, "list"), CATALOGUE, n_users=6, historical_average="all", traits="all")
    expected = prepare(log.rows(kept), CATALOGUE, n_users=6, historical_average="all", traits="all")
    assert all(getattr(without, name).equals(getattr(expected, name)) for name in TABLES)
    assert not set(gone) & {*without.users["user_id"].to_pylist(), *without.outside["user_id"].to_pylist()}


# The recipe


def run_recipe(monkeypatch, folder: Path, config: dict, *overrides: str) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(json.dumps({"output_dir": str(folder / "run"), "data": config}))
    monkeypatch.setattr(sys, "argv", ["persona_prepare", "--config", str(folder / "config.yaml"), *overrides])
    with pytest.raises(SystemExit) as stop:
        persona_prepare.recipe_main()
    return int(stop.value.code)


def write_csv_log(folder: Path, order: np.ndarray | None = None) -> Path:
    log = random_log()
    times = np.random.default_rng(1).permutation(len(log.user))
    lines = [f"u{u:02d},i{i:02d},{r:g},{t}\n" for u, i, r, t in zip(log.user, log.item, log.rating, times, strict=True)]
    lines = lines if order is None else [lines[index] for index in order]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.csv").write_text("user,item,rating,ts\n" + "".join(lines))
    return folder / "log.csv"


def hashes(folder: Path) -> dict:
    return json.loads((folder / "run/data/manifest.json").read_text())["outputs"]


def test_two_runs_of_one_seed_write_the_same_bytes_whatever_the_file_s_order(tmp_path, monkeypatch):
    config = {"format": "csv", "cohort": {"n_users": 6}, "split": {"test_rows": 15}}
    n_rows = sum(range(4, 4 + N_USERS))
    for name, order in (("one", None), ("two", None), ("shuffled", np.random.default_rng(2).permutation(n_rows))):
        path = write_csv_log(tmp_path / name, order)
        assert run_recipe(monkeypatch, tmp_path / name, {**config, "path": str(path)}) == 0
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two") == hashes(tmp_path / "shuffled")
    assert sorted(hashes(tmp_path / "one")) == sorted(f"{name}.parquet" for name in TABLES)


def test_a_finished_stage_says_so_and_a_changed_log_is_prepared_again(tmp_path, monkeypatch, capsys):
    config = {"format": "csv", "path": str(write_csv_log(tmp_path))}
    assert run_recipe(monkeypatch, tmp_path, config) == 0
    assert "20 users" in capsys.readouterr().out
    assert run_recipe(monkeypatch, tmp_path, config) == 0
    assert "up to date" in capsys.readouterr().out
    with (tmp_path / "log.csv").open("a") as stream:
        stream.write("u99,i01,3,1\nu99,i02,3,2\n")
    assert run_recipe(monkeypatch, tmp_path, config) == 0
    assert "21 users" in capsys.readouterr().out


def test_metadata_is_joined_and_counted(tmp_path, monkeypatch, capsys):
    path = write_csv_log(tmp_path)
    (tmp_path / "items.csv").write_text("item_id,summary\ni01,first\ni02,second\nelsewhere,third\n")
    config = {"format": "csv", "path": str(path), "item_metadata": str(tmp_path / "items.csv")}
    assert run_recipe(monkeypatch, tmp_path, config) == 0
    assert (
        "2 items joined, 0 left out for another year, 1 rows about items that nobody rated" in capsys.readouterr().out
    )
    items = pq.read_table(tmp_path / "run/data/items.parquet").to_pydict()
    summaries = dict(zip(items["item_id"], items["summary"], strict=True))
    assert (summaries["i01"], summaries["i03"]) == ("first", None)


def test_excluding_another_experiment_s_cohort_leaves_it_out(tmp_path, monkeypatch):
    path = str(write_csv_log(tmp_path))
    assert run_recipe(monkeypatch, tmp_path / "one", {"format": "csv", "path": path, "cohort": {"n_users": 9}}) == 0
    first = tmp_path / "one/run/data/users.parquet"
    config = {"format": "csv", "path": path, "cohort": {"exclude": str(first)}}
    assert run_recipe(monkeypatch, tmp_path / "two", config) == 0
    users = [
        pq.read_table(tmp_path / name / "run/data/users.parquet")["user_id"].to_pylist() for name in ("one", "two")
    ]
    assert len(users[1]) == N_USERS - 9
    assert not set(users[0]) & set(users[1])


def test_a_cohort_without_anybody_outside_is_told_that_it_has_no_averages(tmp_path, monkeypatch, capsys):
    config = {"format": "csv", "path": str(write_csv_log(tmp_path))}
    assert run_recipe(monkeypatch, tmp_path, config) == 0
    assert "averages (outside): of 0 items; nobody is outside the cohort" in capsys.readouterr().out
    assert run_recipe(monkeypatch, tmp_path, config, "data.historical_average=train") == 0
    assert "averages (train): of 40 items\n" in capsys.readouterr().out


def test_a_world_writes_the_oracle_of_the_cohort_s_test_rows_only(tmp_path, monkeypatch):
    world = {"n_users": 40, "n_items": 60, "n_groups": 3, "mean_interactions": 25}
    config = {"format": "world", "world": world, "cohort": {"n_users": 10}, "split": {"test_rows": 50}}
    assert run_recipe(monkeypatch, tmp_path, config) == 0
    oracle = pq.read_table(tmp_path / "run/data/oracle.parquet")
    interactions = pq.read_table(tmp_path / "run/data/interactions.parquet")
    test = interactions.filter(pc.equal(interactions["split"], "test"))
    assert oracle.num_rows == 50
    assert oracle.select(["user_id", "item_id"]).equals(test.select(["user_id", "item_id"]))
    assert oracle["optimal"].null_count == 0
    assert all(1 <= value <= 5 for value in oracle["optimal"].to_pylist())


def test_oracle_rows_follow_the_test_rows():
    oracle = pa.table({"user_id": ["a", "a", "b"], "item_id": ["x", "y", "x"], "optimal": [1.0, 2.0, 3.0]})
    rows = {"user_id": ["b", "a", "a"], "item_id": ["x", "x", "y"], "split": ["test", "train", "test"]}
    assert select_oracle(oracle, pa.table(rows)).to_pydict() == {
        "user_id": ["b", "a"],
        "item_id": ["x", "y"],
        "optimal": [3.0, 2.0],
    }
