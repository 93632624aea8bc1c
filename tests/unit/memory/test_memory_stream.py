import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from memory_tables import counted_users, interactions_table, items_table, random_log

from personas_tune.errors import DataError, MissingInputError, PersonasTuneError
from personas_tune.memory import stream
from personas_tune.memory.history import read_histories
from personas_tune.memory.stream import RatedItem, UserHistory, count_train_rows, stream_histories
from personas_tune.workspace import read_table

Paths = tuple[Path, Path, Path]
HEAT = {
    "item_id": "a", "title": "Heat", "year": 1995, "genres": ["Action", "Crime"], "summary": "A heist.",
    "cast": ["Al Pacino"], "mean_rating": 3.9, "n_ratings": 12,
}  # fmt: skip


def write_tables(folder: Path, interactions: pa.Table, items: pa.Table, users: pa.Table, **options: Any) -> Paths:
    paths = tuple(folder / "data" / f"{name}.parquet" for name in ("interactions", "items", "users"))
    paths[0].parent.mkdir(exist_ok=True)
    for path, table in zip(paths, (interactions, items, users), strict=True):
        pq.write_table(table, path, **options)
    return paths  # type: ignore[return-value]


def write_random(folder: Path, seed: int) -> Paths:
    log, items, _ = random_log(seed)
    return write_tables(folder, log, items, counted_users(log))


def write_log(folder: Path, *rows: tuple[str, str, float, int, str], users: tuple[str, ...] = ("u",)) -> Paths:
    items = [{"item_id": item_id} for item_id in sorted({row[1] for row in rows} - {"unknown"})]
    counts = Counter(row[0] for row in rows if row[4] == "train")
    user_table = pa.table({"user_id": list(users), "n_train": [counts[user_id] for user_id in users]})
    return write_tables(folder, interactions_table(rows), items_table(items), user_table)


def test_a_rated_item_has_what_is_known_of_it(tmp_path: Path) -> None:
    log = interactions_table([("u", "a", 4.5, 0, "train")])
    paths = write_tables(tmp_path, log, items_table([HEAT]), counted_users(log))
    rated = RatedItem("a", 0, 4.5, "Heat (1995)", ("Action", "Crime"), "A heist.", ("Al Pacino",), 3.9)
    assert list(stream_histories(*paths)) == [UserHistory("u", (rated,))]


def test_what_is_unknown_of_an_item_is_empty(tmp_path: Path) -> None:
    log = interactions_table([("u", "a", 4.0, 0, "train"), ("u", "b", 4.0, 1, "train")])
    blank = {"title": None, "genres": None, "cast": [None], "mean_rating": float("nan")}
    items = items_table([{"item_id": "a", **blank}, {"item_id": "b"}])
    (history,) = stream_histories(*write_tables(tmp_path, log, items, counted_users(log)))
    assert history.rated[0] == RatedItem("a", 0, 4.0, "a", (), "", (), None)
    assert history.rated[1] == RatedItem("b", 1, 4.0, "b", (), "", (), None)


@pytest.mark.parametrize("batch_rows", [1, 7, 10_000])
def test_the_stream_agrees_with_the_tables_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_rows: int
) -> None:
    monkeypatch.setattr(stream, "BATCH_ROWS", batch_rows)
    log, items, _ = random_log(seed=3, n_users=9)
    streamed = list(stream_histories(*write_tables(tmp_path, log, items, counted_users(log), row_group_size=50)))
    histories, catalogue = read_histories(log, items, sorted(set(log["user_id"].to_pylist())))
    assert [user.user_id for user in streamed] == [history.user_id for history in histories]
    for user, history in zip(streamed, histories, strict=True):
        assert [each.item_id for each in user.rated] == [catalogue.ids[item] for item in history.items]
        assert [each.title for each in user.rated] == [catalogue.titles[item] for item in history.items]
        assert [each.rating for each in user.rated] == history.ratings.tolist()
        assert [each.position for each in user.rated] == history.positions.tolist()
        means = [np.nan if each.mean_rating is None else each.mean_rating for each in user.rated]
        np.testing.assert_array_equal(means, catalogue.means[history.items])


def test_users_without_train_rows_have_an_empty_history_wherever_they_stand(tmp_path: Path) -> None:
    rows = [("b", "x", 3.0, 0, "train"), ("c", "x", 3.0, 0, "test"), ("d", "x", 1.0, 0, "train")]
    paths = write_log(tmp_path, *rows, users=("a", "b", "c", "d", "e"))
    assert [(user.user_id, len(user.rated)) for user in stream_histories(*paths)] == [
        ("a", 0), ("b", 1), ("c", 0), ("d", 1), ("e", 0),
    ]  # fmt: skip


def test_interactions_of_others_are_passed_over(tmp_path: Path) -> None:
    rows = [(user_id, "x", 3.0, 0, "train") for user_id in "abcd"]
    histories = stream_histories(*write_log(tmp_path, *rows, users=("b", "d")))
    assert [(user.user_id, len(user.rated)) for user in histories] == [("b", 1), ("d", 1)]


def test_nothing_of_a_test_row_comes_through(tmp_path: Path) -> None:
    log = interactions_table([("u", "a", 4.0, 0, "train"), ("u", "canary", 1.25, 1, "test")])
    items = items_table([HEAT, {**HEAT, "item_id": "canary", "title": "Canary", "cast": ["Canary"]}])
    (history,) = stream_histories(*write_tables(tmp_path, log, items, counted_users(log)))
    assert len(history.rated) == 1
    assert "canary" not in repr(history).lower()
    assert "1.25" not in repr(history)


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ([("u", 1), ("u", 0)], "train row 0 of user u has position 1"),
        ([("u", 0), ("u", 0)], "train row 1 of user u has position 0"),
        ([("u", 0), ("u", 2)], "train row 1 of user u has position 2"),
        ([("u", 0), ("t", 0)], "user t has 0 train rows where users.parquet counts 1"),
        ([("u", 0), ("v", 0), ("u", 1)], "user u has 1 train rows where users.parquet counts 2"),
        ([("t", 0), ("s", 0), ("u", 0)], "user s follows user t"),
    ],
)
def test_interactions_out_of_order_are_refused(tmp_path: Path, rows: list[tuple[str, int]], what: str) -> None:
    log = [(user_id, "x", 3.0, position, "train") for user_id, position in rows]
    paths = write_log(tmp_path, *log, users=("t", "u", "v"))
    with pytest.raises(DataError) as caught:
        list(stream_histories(*paths))
    remedy = "run `tune run persona_prepare --config ...` again"
    assert str(caught.value) == f"{paths[0]}: rows are missing or out of order: {what}; {remedy}"


@pytest.mark.parametrize("users", [("v", "u"), ("u", "u")])
def test_users_out_of_order_or_twice_are_refused(tmp_path: Path, users: tuple[str, ...]) -> None:
    paths = write_log(tmp_path, ("u", "x", 3.0, 0, "train"), users=users)
    with pytest.raises(
        DataError, match=f"users.parquet: rows are missing or out of order: user u follows user {users[0]}"
    ):
        list(stream_histories(*paths))


def test_interactions_that_lack_rows_are_refused(tmp_path: Path) -> None:
    paths = write_log(tmp_path, ("u", "x", 3.0, 0, "train"), ("v", "x", 3.0, 0, "train"), users=("u", "v"))
    pq.write_table(pq.read_table(paths[0]).slice(0, 1), paths[0])
    histories = stream_histories(*paths)
    assert next(histories).user_id == "u"
    with pytest.raises(DataError, match=r"user v has 0 train rows where users.parquet counts 1; run `tune run"):
        next(histories)


def test_an_unknown_item_is_named(tmp_path: Path) -> None:
    paths = write_log(tmp_path, ("u", "unknown", 3.0, 0, "train"))
    with pytest.raises(DataError, match=r"1 items of the interactions are missing, such as unknown"):
        list(stream_histories(*paths))


def test_an_unknown_item_of_a_test_row_is_not_missed(tmp_path: Path) -> None:
    paths = write_log(tmp_path, ("u", "x", 3.0, 0, "train"), ("u", "unknown", 3.0, 1, "test"))
    assert len(next(stream_histories(*paths)).rated) == 1


def test_an_empty_cell_is_refused(tmp_path: Path) -> None:
    paths = write_log(tmp_path, ("u", "x", None, 0, "train"))  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"interactions.parquet: column rating has empty cells; run `tune run"):
        list(stream_histories(*paths))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_missing_file_is_told_as_everywhere(tmp_path: Path, number: int) -> None:
    paths = write_log(tmp_path, ("u", "x", 3.0, 0, "train"))
    paths[number].unlink()
    with pytest.raises(MissingInputError) as expected:
        read_table(paths[number])
    with pytest.raises(MissingInputError) as caught:
        list(stream_histories(*paths))
    assert str(caught.value) == str(expected.value)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_missing_column_is_told_as_everywhere(tmp_path: Path, number: int) -> None:
    paths = write_log(tmp_path, ("u", "x", 3.0, 0, "train"))
    column = ("position", "title", "user_id")[number]
    table = pq.read_table(paths[number])
    pq.write_table(table.drop_columns([column]).append_column("other", pa.nulls(len(table))), paths[number])
    with pytest.raises(DataError) as expected:
        read_table(paths[number], [column])
    with pytest.raises(DataError) as caught:
        list(stream_histories(*paths))
    assert str(caught.value) == str(expected.value)


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_an_error_of_one_line(tmp_path: Path, number: int, share: float) -> None:
    paths = write_random(tmp_path, seed=1)
    raw = paths[number].read_bytes()
    paths[number].write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(DataError, match=r"parquet: not a readable Parquet file \(.*\); run `tune run persona_pre") as e:
        list(stream_histories(*paths))
    assert len(str(e.value).splitlines()) == 1


def test_a_flipped_byte_gives_our_error_or_a_readable_table(tmp_path: Path) -> None:
    paths = write_random(tmp_path, seed=1)
    rng = np.random.default_rng(0)
    raw = paths[0].read_bytes()
    errors = []
    for place in rng.integers(0, len(raw), size=150):
        paths[0].write_bytes(raw[:place] + bytes([raw[place] ^ 0x5A]) + raw[place + 1 :])
        try:
            list(stream_histories(*paths))
        except PersonasTuneError as error:
            errors.append(str(error))
    assert len(errors) > 50
    assert not any("\n" in error for error in errors)


def test_memory_does_not_grow_with_the_number_of_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BATCH_ROWS", 256)
    rng = np.random.default_rng(0)
    python_peaks, arrow_peaks = [], []
    for n_users in (300, 1200):
        rows = [(f"u{user:05}", "a", rng.random(), row, "train") for user in range(n_users) for row in range(30)]
        log = interactions_table(rows)
        paths = write_tables(tmp_path, log, items_table([HEAT]), counted_users(log), row_group_size=1000)
        tracemalloc.start()
        before = pa.total_allocated_bytes()
        arrow_peaks.append(max(pa.total_allocated_bytes() - before for _ in stream_histories(*paths)))
        python_peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert python_peaks[1] < 1.2 * python_peaks[0]
    assert arrow_peaks[1] < 2 * arrow_peaks[0]  # the file's own index grows


def test_train_rows_are_counted_from_the_users_alone(tmp_path: Path) -> None:
    path = tmp_path / "users.parquet"
    pq.write_table(pa.table({"user_id": ["a", "b"], "n_train": pa.array([3, 0], pa.int32())}), path)
    assert count_train_rows(path).tolist() == [3, 0]
    pq.write_table(pa.table({"n_train": pa.array([], pa.int32())}), path)
    assert count_train_rows(path).tolist() == []
    path.unlink()
    with pytest.raises(MissingInputError, match=r"users.parquet: file not found; run `tune run persona_prepare"):
        count_train_rows(path)
