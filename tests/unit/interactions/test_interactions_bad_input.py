import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path

import persona_prepare
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from personas_tune.errors import PersonasTuneError
from personas_tune.interactions.checking import build_log
from personas_tune.interactions.sources import find_log, read_item_metadata, read_log

HEADER = "user,item,rating,ts\n"
GOOD = HEADER + "1,a,3,10\n1,b,4,20\n2,a,5,30\n2,b,1,40\n"


def parquet(table: dict, cut: int | None = None) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(table), sink)
    return sink.getvalue().to_pybytes()[:cut]


def good_parquet(**columns) -> dict:
    return {"user": ["1", "1"], "item": ["a", "b"], "rating": [3.0, 4.0], "ts": [1, 2], **columns}


# name: file name, its content, more of the data section, what the one line must hold
LOGS = {
    "latin-1 where UTF-8 is wanted": (
        "l.csv",
        HEADER.encode() + b"1,a,3,1\n1,caf\xe9,3,2\n",
        {},
        ["row 3", "0xe9", "data.encoding"],
    ),
    "latin-1 in a JSON log": ("l.jsonl", b'{"user":"caf\xe9","item":"a","rating":3}\n', {}, ["row 1", "data.encoding"]),
    "utf-16 where UTF-8 is wanted": ("l.csv", GOOD.encode("utf-16"), {}, ["row 1", "0xff", "data.encoding"]),
    "an unknown encoding": ("l.csv", GOOD, {"encoding": "latin-99"}, ["data.encoding", "latin-99"]),
    "no rating column": ("l.csv", "user,item,grade\n1,a,3\n", {}, ["row 1", "'grade'", "data.columns.rating"]),
    "no user column": ("l.csv", "who,item,rating\n1,a,3\n", {}, ["row 1", "no user_id column", "data.columns.user_id"]),
    "a header that is a row": (
        "l.csv",
        "1,a,3,10\n1,b,4,20\n",
        {},
        ["row 1", "no user_id, item_id, rating column", "add a header line"],
    ),
    "an override of no column": (
        "l.csv",
        GOOD,
        {"columns": {"user_id": "usr"}},
        ["data.columns.user_id", "'usr'", "did you mean user?"],
    ),
    "a word as rating": ("l.csv", HEADER + "1,a,3,1\n1,b,five,2\n", {}, ["row 3", "rating 'five' is not a number"]),
    "an empty rating": ("l.csv", HEADER + "1,a,3,1\n1,b,,2\n", {}, ["row 3", "rating '' is not a number"]),
    "NaN": ("l.csv", HEADER + "1,a,3,1\n\n1,b,nan,2\n", {}, ["row 4", "rating nan"]),
    "infinity": ("l.csv", HEADER + "1,a,inf,1\n1,b,-inf,2\n", {}, ["row 2", "rating inf", "2 such rows"]),
    "a rating above the scale": (
        "l.csv",
        HEADER + "1,a,3,1\n1,b,7,2\n",
        {},
        ["row 3", "rating 7", "1 to 5", "data.rating_scale"],
    ),
    "a rating below the scale": ("l.csv", HEADER + "1,a,0,1\n", {}, ["row 2", "rating 0", "data.rating_scale"]),
    "a rating between the steps": (
        "l.csv",
        HEADER + "1,a,3.5,1\n",
        {},
        ["row 2", "rating 3.5", "steps of 1", "data.rating_scale"],
    ),
    "an empty user": ("l.csv", HEADER + "1,a,3,1\n,b,3,2\n", {}, ["row 3", "empty user_id"]),
    "a blank item": ("l.csv", HEADER + "1,a,3,1\n1,  ,3,2\n", {}, ["row 3", "empty item_id"]),
    "a repeated pair": (
        "l.csv",
        HEADER + "1,a,3,1\n2,a,3,1\n1,a,4,0\n",
        {},
        ["row 4", "'1'", "'a'", "after row 2", "data.duplicates"],
    ),
    "milliseconds": (
        "l.csv",
        HEADER + "1,a,3,1577836800000\n",
        {},
        ["row 2", "1577836800000", "data.timestamp_unit=ms"],
    ),
    "seconds taken for milliseconds": (
        "l.csv",
        HEADER + "1,a,3,1577836800\n",
        {"timestamp_unit": "ms"},
        ["data.timestamp_unit=s"],
    ),
    "nanoseconds": (
        "l.csv",
        HEADER + "1,a,3,1577836800000000000\n",
        {"timestamp_unit": "ms"},
        ["row 2", "too late for ms"],
    ),
    "a negative time": ("l.csv", HEADER + "1,a,3,1\n1,b,3,-5\n", {}, ["row 3", "timestamp -5"]),
    "a date before 1970": ("l.csv", HEADER + "1,a,3,1960-01-01\n", {}, ["row 2", "before 1970"]),
    "a word as time": ("l.csv", HEADER + "1,a,3,1\n1,b,3,noon\n", {}, ["row 3", "timestamp 'noon' is not a number"]),
    "a number among dates": (
        "l.csv",
        HEADER + "1,a,3,2020-01-01\n1,b,3,7\n",
        {},
        ["row 3", "timestamp '7' is not an ISO date"],
    ),
    "a date without its zone": (
        "l.csv",
        HEADER + "1,a,3,2020-01-01T00:00:00Z\n1,b,3,2020-01-01T00:00:01\n",
        {},
        ["row 3", "timestamp '2020-01-01T00:00:01' is not an ISO date with a zone"],
    ),
    "a day that no month has": (
        "l.csv",
        HEADER + "1,a,3,2020-01-01\n1,b,3,2020-02-30\n",
        {},
        ["row 3", "'2020-02-30'"],
    ),
    "an empty file": ("l.csv", "", {}, ["l.csv", "empty file"]),
    "a header only": ("l.csv", HEADER, {}, ["no interactions"]),
    "a row too long": ("l.csv", HEADER + "1,a,3,1\n1,b,3,2,9\n", {}, ["row 3", "5 values where 4 belong"]),
    "a row too short": ("l.csv", HEADER + "1,a,3,1\n1,b,3\n", {}, ["row 3", "3 values where 4 belong"]),
    "a torn gzip": ("l.csv.gz", gzip.compress(GOOD.encode() * 50)[:60], {}, ["l.csv.gz", "can't be read to its end"]),
    "no gzip at all": ("l.csv.gz", GOOD, {}, ["l.csv.gz", "can't be read to its end"]),
    "a truncated Parquet": (
        "l.parquet",
        parquet(good_parquet(), 200),
        {},
        ["l.parquet", "not a readable Parquet file"],
    ),
    "Parquet without ratings": ("l.parquet", parquet({"user": ["1"], "item": ["a"]}), {}, ["no rating column"]),
    "a null in Parquet": ("l.parquet", parquet(good_parquet(rating=[3.0, None])), {}, ["row 2", "rating is missing"]),
    "truth values as ratings": ("l.parquet", parquet(good_parquet(rating=[True, False])), {}, ["rating can't be read"]),
    "lists as ids": ("l.parquet", parquet(good_parquet(user=[["1"], ["2"]])), {}, ["user_id can't be read"]),
    "fractions as ids": ("l.parquet", parquet(good_parquet(user=[1.0, 2.5])), {}, ["user_id can't be read"]),
    "Parquet without rows": (
        "l.parquet",
        parquet({name: pa.array([], pa.string()) for name in HEADER.strip().split(",")}),
        {},
        ["no interactions"],
    ),
    "text among Parquet numbers": (
        "l.parquet",
        parquet(good_parquet(rating=["3", "x"])),
        {},
        ["row 2", "rating 'x' is not a number"],
    ),
    "a line that is no JSON": ("l.jsonl", '{"user":1,"item":"a","rating":3}\n{"user":1,\n', {}, ["row 2", "not JSON"]),
    "a JSON array": ("l.jsonl", "[1, 2]\n", {}, ["row 1", "not a JSON object"]),
    "a JSON row without its rating": (
        "l.jsonl",
        '{"user":1,"item":"a","rating":3}\n\n{"user":1,"item":"b"}\n',
        {},
        ["row 3", "rating is missing"],
    ),
    "a JSON list as item": (
        "l.jsonl",
        '{"user":1,"item":"a","rating":3}\n{"user":1,"item":[],"rating":3}\n',
        {},
        ["row 2", "item_id"],
    ),
    "a JSON rating in words": (
        "l.jsonl",
        '{"user":1,"item":"a","rating":"3"}\n{"user":1,"item":"b","rating":"x"}\n',
        {},
        ["row 2", "rating 'x'"],
    ),
    "half a character in a JSON log": (
        "l.jsonl",
        '{"user":1,"item":"a","rating":3}\n{"user":1,"item":"b\\ud83d","rating":3}\n',
        {},
        ["row 2", "half a character", "\\ud83d"],
    ),
    "an empty JSON log": ("l.jsonl", "\n", {}, ["empty file"]),
    "a short row in ratings.dat": ("ratings.dat", "1::a::3::1\n1::b::3\n", {}, ["row 2", "3 values where 4 belong"]),
    "a word in ratings.dat": ("ratings.dat", "1::a::3::1\n1::b::x::2\n", {}, ["row 2", "rating 'x'"]),
    "commas in ratings.dat": ("ratings.dat", "1,a,3,1\n", {}, ["row 1", "1 values where 4 belong"]),
    "a short row in u.data": ("u.data", "1\ta\t3\t1\n1\tb\t3\n", {}, ["row 2", "3 values where 4 belong"]),
    "an override where there are no names": (
        "u.data",
        "1\ta\t3\t1\n",
        {"columns": {"user_id": "u"}},
        ["data.columns.user_id", "'u'"],
    ),
    "a word in .inter": (
        "x.inter",
        "user_id:token\titem_id:token\trating:float\n1\ta\tx\n",
        {},
        ["row 2", "rating 'x'"],
    ),
    ".inter without ratings": ("x.inter", "user_id:token\titem_id:token\n1\ta\n", {}, ["row 1", "no rating column"]),
    "a file that MovieLens doesn't have": (
        "scores.csv",
        GOOD,
        {"format": "movielens"},
        ["not one of MovieLens's", "data.format"],
    ),
    "nobody in range": (
        "l.csv",
        GOOD,
        {"cohort": {"min_interactions": 100}},
        ["data.cohort", "no user has 100", "have 2 to 2"],
    ),
    "one interaction each": ("l.csv", HEADER + "1,a,3,1\n2,a,3,1\n", {}, ["data.cohort", "at least 2 interactions"]),
    "too many users": ("l.csv", GOOD, {"cohort": {"n_users": 3}}, ["data.cohort.n_users", "and 2 have", "n_users=2"]),
    "too many test rows": ("l.csv", GOOD, {"split": {"test_rows": 9}}, ["data.split.test_rows", "there are 2"]),
    "too few test rows": ("l.csv", GOOD, {"split": {"test_rows": 1}}, ["data.split.test_rows", "2 users"]),
    "no train rows before a time": (
        "l.csv",
        HEADER + "1,a,3,5\n1,b,3,5\n",
        {"split": {"by": "global_time"}},
        ["data.split", "none of 1 users"],
    ),
}

# name: the item file, its content, what the one line must hold
ITEMS = {
    "no id column": ("m.csv", "name,summary\nA,s\n", ["no item_id column", "'name'"]),
    "nothing about the items": ("m.csv", "item_id,price\na,3\n", ["nothing about the items", "'price'"]),
    "an item twice": ("m.csv", "item_id,summary\na,s\nb,s\na,t\n", ["row 4", "item 'a' again"]),
    "an empty id": ("m.csv", "item_id,summary\na,s\n ,s\n", ["row 3", "empty item_id"]),
    "no item of the log": ("m.csv", "item_id,summary\nA,s\nB,s\n", ["none of its 2 items", "'a'"]),
    "a ragged row": ("m.csv", "item_id,summary\na,s\nb,s,t\n", ["row 3", "3 values where 2 belong"]),
    "no year": ("m.csv", "item_id,year\na,1990\nb,soon\n", ["row 3", "year 'soon'"]),
    "a header only": ("m.csv", "item_id,summary\n", ["m.csv", "no items"]),
    "an empty file": ("m.csv", "", ["m.csv", "empty file"]),
    "latin-1": ("m.csv", b"item_id,summary\na,caf\xe9\n", ["row 2", "0xe9", "data.encoding"]),
    "an unclosed quote": ("m.csv", 'item_id,summary\na,"' + "x" * 200_000, ["m.csv", "field larger"]),
    "no JSON": ("m.jsonl", "item_id\n", ["row 1", "not JSON"]),
    "half a character": ("m.jsonl", '{"item_id": "a", "title": "\\ud83d"}\n', ["row 1", "half a character"]),
    "a truncated Parquet": (
        "m.parquet",
        parquet({"item_id": ["a"], "summary": ["s"]}, 100),
        ["not a readable Parquet"],
    ),
    "another kind of file": ("m.xlsx", "PK", ["'.xlsx'", ".csv, .jsonl or .parquet"]),
}

FORMATS = {
    ".csv": "csv",
    ".gz": "csv",
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".dat": "movielens",
    ".data": "movielens",
    ".inter": "recbole",
}


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


@pytest.fixture
def refusal(tmp_path, monkeypatch, capsys):
    """Run the recipe on a data section that can't work; give its one line."""

    def run(data: dict) -> str:
        (tmp_path / "config.yaml").write_text(json.dumps({"output_dir": str(tmp_path / "run"), "data": data}))
        monkeypatch.setattr(sys, "argv", ["persona_prepare", "--config", str(tmp_path / "config.yaml")])
        with pytest.raises(SystemExit) as stop:
            persona_prepare.recipe_main()
        lines = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2
        assert len(lines) == 1, lines
        assert not (tmp_path / "run").exists()
        return lines[0]

    return run


@pytest.mark.parametrize("case", LOGS)
def test_a_bad_log_is_refused_in_one_line(case, tmp_path, refusal):
    name, content, more, fragments = LOGS[case]
    path = write(tmp_path / name, content)
    line = refusal({"format": FORMATS[Path(name).suffix], "path": path, **more})
    assert all(fragment in line for fragment in fragments), line


@pytest.mark.parametrize("case", ITEMS)
def test_bad_item_metadata_is_refused_in_one_line(case, tmp_path, refusal):
    name, content, fragments = ITEMS[case]
    metadata = write(tmp_path / name, content)
    line = refusal({"format": "csv", "path": write(tmp_path / "log.csv", GOOD), "item_metadata": metadata})
    assert all(fragment in line for fragment in fragments), line


def test_a_log_that_is_not_there_says_how_to_get_movielens(tmp_path, refusal):
    unset = refusal({"format": "movielens"})
    assert "data.path" in unset
    missing = refusal({"format": "movielens", "path": str(tmp_path / "ml-1m")})
    assert str(tmp_path / "ml-1m") in missing
    (tmp_path / "empty").mkdir()
    unknown = refusal({"format": "movielens", "path": str(tmp_path / "empty")})
    assert "none of ratings.dat, u.data, ratings.csv" in unknown
    assert all("ml-1m.zip" in line for line in (unset, missing, unknown))


def test_paths_of_the_wrong_kind_are_refused(tmp_path, refusal):
    assert "set data.path to the log" in refusal({"format": "csv"})
    assert "no such file" in refusal({"format": "csv", "path": str(tmp_path / "absent.csv")})
    assert "a folder where a file is wanted" in refusal({"format": "csv", "path": str(tmp_path)})
    assert "0 .inter files" in refusal({"format": "recbole", "path": str(tmp_path)})


def test_other_inputs_that_are_not_there_are_named(tmp_path, refusal):
    data = {"format": "csv", "path": write(tmp_path / "log.csv", GOOD)}
    metadata = str(tmp_path / "data" / "absent.csv")
    assert f"{metadata}: file not found; check data.item_metadata" in refusal({**data, "item_metadata": metadata})
    exclude = str(tmp_path / "data" / "users.parquet")
    assert f"{exclude}: file not found; check data.cohort.exclude" in refusal({**data, "cohort": {"exclude": exclude}})


def test_an_exclusion_that_fits_another_log_is_refused(tmp_path, refusal):
    data = {"format": "csv", "path": write(tmp_path / "log.csv", GOOD)}
    users = tmp_path / "users.parquet"
    pq.write_table(pa.table({"user_id": ["x", "y"]}), users)
    assert "none of its 2 users is in the log" in refusal({**data, "cohort": {"exclude": str(users)}})
    pq.write_table(pa.table({"user_id": ["1", "2"]}), users)
    assert "excludes every user" in refusal({**data, "cohort": {"exclude": str(users)}})


def test_movielens_item_files_are_checked_too(tmp_path, refusal):
    write(tmp_path / "ratings.dat", "1::a::3::1\n1::b::3::2\n")
    write(tmp_path / "movies.dat", "a::A (1990)::Drama\nb::B (1991)\n")
    line = refusal({"format": "movielens", "path": str(tmp_path)})
    assert "movies.dat row 2" in line
    assert "2 values where 3 belong" in line


def test_mistakes_in_several_columns_come_together(tmp_path):
    path = write(tmp_path / "log.csv", HEADER + ",a,9,-1\n")
    with pytest.raises(PersonasTuneError) as caught:
        build_log(read_log(find_log("csv", path), {}), rating_min=1, rating_max=5, rating_step=1)
    assert len(caught.value.lines) == 3


def mistakes_in(read: Callable[[], object]) -> list[str]:
    """The lines of our own error, if there is one; any other error is a bug and passes through."""
    try:
        read()
    except PersonasTuneError as error:
        return error.lines
    return []


def read_whole_log(path: Path, data_format: str) -> None:
    build_log(read_log(find_log(data_format, str(path)), {}), rating_min=1, rating_max=5, rating_step=1)


def damage(content: bytes, cuts: list[tuple[int, bytes]]) -> bytes:
    for place, junk in cuts:
        place %= len(content) + 1
        content = content[:place] + junk + content[place + len(junk) // 2 :]
    return content


SEEDS = {
    "csv": ("log.csv", GOOD.encode()),
    "movielens": ("ratings.dat", b"1::a::3::10\n1::b::4::20\n2::a::5::30\n"),
    "recbole": ("x.inter", b"user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\ta\t3\t10\n2\tb\t4\t20\n"),
    "jsonl": (
        "log.jsonl",
        b'{"user": "1", "item": "a", "rating": 3, "ts": 10}\n{"user": "2", "item": "b", "rating": 4, "ts": 20}\n',
    ),
    "parquet": ("log.parquet", parquet(good_parquet())),
}
JUNK = st.one_of(
    st.binary(max_size=6),
    st.sampled_from([b",", b'"', b"\n", b"\r", b"::", b"\t", b"\x00", b"nan", b"1e999", b"-", b"[", b"{}"]),
)


@pytest.mark.parametrize("data_format", SEEDS)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.tuples(st.integers(0, 2000), JUNK), min_size=1, max_size=4))
@example(cuts=[(0, b"\r\n")])
def test_damaged_logs_raise_nothing_but_our_errors(data_format, tmp_path, cuts):
    name, content = SEEDS[data_format]
    write(tmp_path / name, damage(content, cuts))
    lines = mistakes_in(lambda: read_whole_log(tmp_path / name, data_format))
    assert all(line and "\n" not in line for line in lines)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cuts=st.lists(st.tuples(st.integers(0, 200), JUNK), min_size=1, max_size=4),
    kind=st.sampled_from([".csv", ".jsonl"]),
)
def test_damaged_item_files_raise_nothing_but_our_errors(tmp_path, cuts, kind):
    content = {
        ".csv": b"item_id,title,year\na,A (1990),1990\nb,B,\n",
        ".jsonl": b'{"item_id": "a", "genres": ["x"]}\n',
    }[kind]
    write(tmp_path / f"items{kind}", damage(content, cuts))
    lines = mistakes_in(lambda: list(read_item_metadata(tmp_path / f"items{kind}")))
    assert len(lines) <= 1
