import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from personas_tune.interactions.catalogue import place_items
from personas_tune.interactions.checking import build_log
from personas_tune.interactions.items import Item
from personas_tune.interactions.log import Log
from personas_tune.interactions.sources import find_log, read_item_metadata, read_log, read_own_items

SCALE = {"rating_min": 0.5, "rating_max": 5, "rating_step": 0.5}
# What every well-formed log below says, in the order of a Log.
ROWS = [("1", "10", 4.0, 100), ("1", "20", 3.5, 200), ("2", "10", 5.0, 50)]


def load(data_format: str, path: Path, columns=None, encoding=None, **checks) -> Log:
    return build_log(read_log(find_log(data_format, str(path)), columns or {}, encoding), **{**SCALE, **checks})


def rows_of(log: Log) -> list[tuple]:
    users, items = log.user_ids.to_pylist(), log.item_ids.to_pylist()
    columns = (log.user, log.item, log.rating.tolist(), log.timestamp.tolist())
    return [(users[user], items[item], rating, time) for user, item, rating, time in zip(*columns, strict=True)]


def items_of(path: Path, data_format: str = "movielens", ids=("10", "20"), encoding=None) -> list[Item]:
    return place_items(ids, read_own_items(find_log(data_format, str(path)), encoding), "items")


def test_movielens_1m_folder_is_recognised_and_its_titles_read_as_latin_1(tmp_path):
    (tmp_path / "ratings.dat").write_text("1::20::3.5::200\n2::10::5::50\n1::10::4::100\n")
    movies = "10::Misérables, Les (1995)::Drama|Musical\n20::Big Lebowski, The (1998)::Comedy\n"
    (tmp_path / "movies.dat").write_bytes(movies.encode("latin-1"))
    assert rows_of(load("movielens", tmp_path)) == ROWS
    assert items_of(tmp_path) == [
        Item("Les Misérables", 1995, ("Drama", "Musical")),
        Item("The Big Lebowski", 1998, ("Comedy",)),
    ]


def test_movielens_10m_titles_are_read_as_utf_8(tmp_path):
    (tmp_path / "ratings.dat").write_text("1::10::0.5::1\n")
    (tmp_path / "movies.dat").write_text("10::Amélie (2001)::Comedy\n", encoding="utf-8")
    assert items_of(tmp_path, ids=["10"])[0].title == "Amélie"


def test_movielens_100k_flags_become_genres(tmp_path):
    (tmp_path / "u.data").write_text("1\t20\t3.5\t200\n2\t10\t5\t50\n1\t10\t4\t100\n")
    drama_and_war = ["1" if index in (8, 17) else "0" for index in range(19)]
    unknown = ["1" if index == 0 else "0" for index in range(19)]
    lines = [
        ["10", "Été (1983)", "01-Jan-1983", "", "http://a", *drama_and_war],
        ["20", "unknown", "", "", "", *unknown],
    ]
    (tmp_path / "u.item").write_bytes("".join("|".join(line) + "\n" for line in lines).encode("latin-1"))
    assert rows_of(load("movielens", tmp_path)) == ROWS
    assert items_of(tmp_path) == [Item("Été", 1983, ("Drama", "War")), Item("unknown", None, ())]


def test_movielens_csv_folder_with_quoted_titles_and_no_genres_listed(tmp_path):
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n1,20,3.5,200\n2,10,5.0,50\n1,10,4.0,100\n")
    (tmp_path / "movies.csv").write_text(
        'movieId,title,genres\n10,"American President, The (1995)",Comedy|Drama\n20,Kid A,(no genres listed)\n'
    )
    assert rows_of(load("movielens", tmp_path)) == ROWS
    assert items_of(tmp_path) == [Item("The American President", 1995, ("Comedy", "Drama")), Item("Kid A", None, ())]


def test_movielens_path_may_be_the_ratings_file_and_compressed(tmp_path):
    with gzip.open(tmp_path / "ratings.dat.gz", "wt") as stream:
        stream.write("1::20::3.5::200\n2::10::5::50\n1::10::4::100\n")
    assert rows_of(load("movielens", tmp_path / "ratings.dat.gz")) == ROWS
    assert rows_of(load("movielens", tmp_path)) == ROWS


@pytest.mark.parametrize(
    "header",
    [
        "user_id,item_id,rating,timestamp",
        "userId,movieId,rating,ts",
        "userID,itemID,score,time",
        "user,parent_asin,stars,datetime",
        "uid;movie_id;rating;timestamp",
        "user_id\titem\trating\tts",
    ],
)
def test_csv_columns_go_by_any_of_their_usual_names(tmp_path, header):
    text = f"{header},note\n1,20,3.5,200,x\n\n2,10,5,50,y\n1,10,4,100,z\n"
    delimiter = next(mark for mark in ";\t," if mark in header)
    (tmp_path / "log.csv").write_text(text.replace(",", delimiter))
    assert rows_of(load("csv", tmp_path / "log.csv")) == ROWS


def test_columns_override_the_aliases(tmp_path):
    (tmp_path / "log.csv").write_text(
        "user,reviewer,book,rating,user_rating,day\n9,1,10,1,4,100\n9,1,20,1,3.5,200\n9,2,10,1,5,50\n"
    )
    columns = {"user_id": "reviewer", "item_id": "book", "rating": "user_rating", "timestamp": "day"}
    assert rows_of(load("csv", tmp_path / "log.csv", columns)) == ROWS


def test_quoted_values_may_hold_delimiters_and_line_ends(tmp_path):
    (tmp_path / "log.csv").write_text(
        'user,text,item,rating,ts\r\n1,"a, ""b""\nc",10,4,100\r\n1,x,20,3.5,200\r\n2,"\n",10,5,50\r\n', newline=""
    )
    assert rows_of(load("csv", tmp_path / "log.csv")) == ROWS


def test_line_ends_in_quotes_are_no_rows_wherever_a_block_of_the_file_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("personas_tune.interactions.delimited._BLOCK_BYTES", 100)
    rows = [f'{number},"{number}\n9,1,a,5\n",a,3\n' for number in range(100, 180)]
    (tmp_path / "log.csv").write_text("user,text,item,rating\n" + "".join(rows))
    log = load("csv", tmp_path / "log.csv")
    assert log.user_ids.to_pylist() == [str(number) for number in range(100, 180)]
    assert log.rating.tolist() == [3.0] * 80


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-8-sig"])
def test_encodings_are_read_when_named(tmp_path, encoding):
    (tmp_path / "log.csv").write_text("user,item,rating\nZoë,Émile,4\n", encoding=encoding)
    log = load("csv", tmp_path / "log.csv", encoding=encoding)
    assert (log.user_ids.to_pylist(), log.item_ids.to_pylist()) == (["Zoë"], ["Émile"])


def test_a_byte_order_mark_is_no_part_of_the_first_column_s_name(tmp_path):
    (tmp_path / "log.csv").write_text("user,item,rating\n1,10,4\n", encoding="utf-8-sig")
    assert rows_of(load("csv", tmp_path / "log.csv")) == [("1", "10", 4.0, 0)]


def test_dates_and_milliseconds_become_seconds_and_keep_their_order_within_one(tmp_path):
    (tmp_path / "dates.csv").write_text(
        "user,item,rating,time\n1,10,4,2020-01-01 00:00:00.9\n1,20,3,2020-01-01 00:00:00.1\n"
    )
    expected = [("1", "20", 3.0, 1577836800), ("1", "10", 4.0, 1577836800)]
    assert rows_of(load("csv", tmp_path / "dates.csv")) == expected
    (tmp_path / "ms.csv").write_text("user,item,rating,time\n1,10,4,1577836800900\n1,20,3,1577836800100\n")
    assert rows_of(load("csv", tmp_path / "ms.csv", timestamp_unit="ms")) == expected


def test_dates_with_a_zone_are_that_instant(tmp_path):
    times = ["2020-01-01T02:00:00+02:00", "2020-01-01T00:00:01Z", "2019-12-31 19:00:02.5-0500"]
    lines = [f"1,{item},3,{time}\n" for item, time in enumerate(times)]
    (tmp_path / "log.csv").write_text("user,item,rating,time\n" + "".join(lines))
    records = [{"user": 1, "item": item, "rating": 3, "time": time} for item, time in enumerate(times)]
    (tmp_path / "log.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    expected = [("1", str(item), 3.0, 1577836800 + item) for item in range(3)]
    assert rows_of(load("csv", tmp_path / "log.csv")) == expected
    assert rows_of(load("jsonl", tmp_path / "log.jsonl")) == expected


@pytest.mark.parametrize("kind", [pa.float32(), pa.float64()])
def test_ratings_lie_on_the_scale_to_the_last_bit(tmp_path, kind):
    ratings = [round(number * 0.1, 1) for number in range(101)]
    columns = {"user": ["1"] * 101, "item": list(range(101)), "rating": pa.array(ratings, kind)}
    pq.write_table(pa.table(columns), tmp_path / "log.parquet")
    log = load("parquet", tmp_path / "log.parquet", rating_min=0, rating_max=10, rating_step=0.1)
    assert log.rating.tolist() == ratings


def test_without_times_file_order_stands_in(tmp_path):
    (tmp_path / "log.csv").write_text("user,item,rating\n2,10,4\n1,30,3\n2,20,5\n1,10,1\n")
    assert rows_of(load("csv", tmp_path / "log.csv")) == [
        ("1", "30", 3.0, 1), ("1", "10", 1.0, 3), ("2", "10", 4.0, 0), ("2", "20", 5.0, 2),
    ]  # fmt: skip


def test_recbole_types_are_cut_from_the_names(tmp_path):
    (tmp_path / "ml.inter").write_text(
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\t20\t3.5\t2.0e2\n2\t10\t5\t50\n1\t10\t4\t100\n"
    )
    header = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    (tmp_path / "ml.item").write_text(header + '10\tToy "Story"\t1995\tAnimation Comedy\n')
    assert rows_of(load("recbole", tmp_path)) == ROWS
    assert rows_of(load("recbole", tmp_path / "ml.inter", {"rating": "rating:float"})) == ROWS
    assert items_of(tmp_path, "recbole") == [Item('Toy "Story"', 1995, ("Animation", "Comedy")), Item()]


@pytest.mark.parametrize("as_text", [False, True])
def test_jsonl_takes_ids_and_numbers_as_numbers_or_text(tmp_path, as_text):
    def shown(value):
        return str(value) if as_text else value

    records = [
        {
            "user_id": shown(user),
            "parent_asin": shown(item),
            "rating": shown(rating),
            "timestamp": shown(time),
            "title": "x",
        }
        for user, item, rating, time in [(1, 20, 3.5, 200), (2, 10, 5, 50), (1, 10, 4, 100)]
    ]
    lines = "\n\n".join(json.dumps(record) for record in records)
    (tmp_path / "log.jsonl").write_text(lines)
    assert rows_of(load("jsonl", tmp_path / "log.jsonl")) == ROWS
    (tmp_path / "other.jsonl").write_text(lines, encoding="utf-16")
    assert rows_of(load("jsonl", tmp_path / "other.jsonl", encoding="utf-16")) == ROWS


def test_whole_floats_as_ids_lose_their_point_in_jsonl_too(tmp_path):
    (tmp_path / "log.jsonl").write_text(
        '{"user": 1.0, "item": 20, "rating": 3.5, "ts": 200}\n{"user": 2, "item": 10, "rating": 5, "ts": 50}\n'
        '{"user": 1, "item": 10.0, "rating": 4, "ts": 100.0}\n'
    )
    assert rows_of(load("jsonl", tmp_path / "log.jsonl")) == ROWS


@pytest.mark.parametrize(
    ("user", "time"),
    [
        (pa.array([1, 2, 1]), pa.array([200, 50, 100])),
        (pa.array([1.0, 2.0, 1.0]), pa.array([200.0, 50.0, 100.0])),
        (pa.array(["1", "2", "1"]).dictionary_encode(), pa.array([200, 50, 100], pa.int32())),
        (pa.array(["1", "2", "1"], pa.large_string()), pa.array([200, 50, 100], pa.timestamp("s"))),
        (pa.array([1, 2, 1], pa.int8()), pa.array([200 * 10**9 + 7, 50 * 10**9, 100 * 10**9], pa.timestamp("ns"))),
        (pa.array([1, 2, 1]), pa.array(["200", "50", "100"])),
    ],
)
def test_parquet_takes_any_type_that_can_be_an_id_or_a_time(tmp_path, user, time):
    rating = pa.array([3.5, 5, 4], pa.float32())
    table = pa.table({"user_id": user, "item_id": pa.array([20, 10, 10]), "rating": rating, "timestamp": time})
    pq.write_table(table, tmp_path / "log.parquet")
    assert rows_of(load("parquet", tmp_path / "log.parquet")) == ROWS


def test_ties_in_time_keep_file_order(tmp_path):
    rng = np.random.default_rng(0)
    items = rng.permutation(500)
    (tmp_path / "log.csv").write_text("user,item,rating,ts\n" + "".join(f"1,{item},3,7\n" for item in items))
    assert [row[1] for row in rows_of(load("csv", tmp_path / "log.csv"))] == [str(item) for item in items]


def test_ids_stay_text_and_are_in_order_of_their_characters(tmp_path):
    (tmp_path / "log.csv").write_text("user,item,rating\n10,007,3\n9,7,3\n010,7.0,3\n")
    log = load("csv", tmp_path / "log.csv")
    assert log.user_ids.to_pylist() == ["010", "10", "9"]
    assert log.item_ids.to_pylist() == ["007", "7", "7.0"]


@pytest.mark.parametrize(("duplicates", "kept"), [("first", 2.0), ("last", 5.0)])
def test_of_a_repeated_pair_the_first_or_last_in_time_is_kept(tmp_path, duplicates, kept):
    (tmp_path / "log.csv").write_text("user,item,rating,ts\n1,10,5,300\n1,20,1,50\n1,10,2,100\n1,10,3,200\n")
    rows = rows_of(load("csv", tmp_path / "log.csv", duplicates=duplicates))
    assert [row[2] for row in rows if row[1] == "10"] == [kept]
    assert len(rows) == 2


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".jsonl", ".parquet"])
def test_item_metadata_says_the_same_in_every_format(tmp_path, suffix):
    path = tmp_path / f"items{suffix}"
    record = {"movie_id": "10", "title": "Jumanji (1995)", "summary": "A game, alive.", "cast": "R. W.|K. D."}
    header, values = ",".join(record), "A game, alive."
    text = f'{header}\n10,Jumanji (1995),"{values}",R. W.|K. D.\n'
    if suffix == ".jsonl":
        path.write_text(json.dumps({**record, "cast": ["R. W.", "K. D."]}) + "\n")
    elif suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([{**record, "movie_id": 10.0, "cast": ["R. W.", "K. D."]}]), path)
    else:
        path.write_bytes(gzip.compress(text.encode()) if suffix == ".csv.gz" else text.encode())
    expected = Item("Jumanji", 1995, (), "A game, alive.", ("R. W.", "K. D."))
    assert place_items(["10"], read_item_metadata(path), "items") == [expected]
