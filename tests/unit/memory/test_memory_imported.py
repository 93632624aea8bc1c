import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from memory_tables import interactions_table, users_table

from personas_tune.errors import ConfigError, DistillError, MissingInputError, PersonasTuneError
from personas_tune.memory.imported import MAX_ERRORS, distill_from_files, find_file
from personas_tune.memory.tables import MEMORIES, PROFILES, Distilled

ROWS = [
    ("u", "a", 4.0, 0, "train"), ("u", "b", 2.0, 1, "train"), ("u", "c", 5.0, 2, "test"), ("v", "a", 3.0, 0, "train"),
]  # fmt: skip
PROFILE_CSV = 'user_id,profile\nu,"I like war, mostly."\nv,I like peace.\n'
MEMORY_CSV = "user_id,item_id,memory\nu,b,Too long.\nv,a,So-so.\nu,a,Great.\n"


def write(folder: Path, text: str, name: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def import_texts(
    folder: Path, profiles: str | Path = PROFILE_CSV, memories: str | Path | None = None, max_words: int = 50
) -> Distilled:
    interactions = interactions_table(ROWS)
    if isinstance(profiles, str):
        profiles = write(folder, profiles, "profiles.csv")
    if isinstance(memories, str):
        memories = write(folder, memories, "memories.csv")
    return distill_from_files(
        interactions, users_table(interactions), profiles_path=profiles, memories_path=memories, max_words=max_words
    )


def lines_of_failure(folder: Path, **texts: object) -> list[str]:
    with pytest.raises(PersonasTuneError) as failure:
        import_texts(folder, **texts)  # type: ignore[arg-type]
    return failure.value.lines


def test_profiles_without_upto_position_are_final(tmp_path: Path) -> None:
    distilled = import_texts(tmp_path)
    assert distilled.profiles.to_pylist() == [
        {"user_id": "u", "upto_position": 2, "profile": "I like war, mostly.", "distiller": "file", "n_words": 4},
        {"user_id": "v", "upto_position": 1, "profile": "I like peace.", "distiller": "file", "n_words": 3},
    ]
    assert distilled.profiles.schema == PROFILES


def test_without_a_memory_file_there_are_no_memories(tmp_path: Path) -> None:
    memories = import_texts(tmp_path).memories
    assert memories.num_rows == 0
    assert memories.schema == MEMORIES


def test_memories_get_position_and_rating_from_the_log(tmp_path: Path) -> None:
    memories = import_texts(tmp_path, memories=MEMORY_CSV).memories.to_pylist()
    assert [(row["user_id"], row["item_id"], row["position"], row["rating"], row["memory"]) for row in memories] == [
        ("u", "a", 0, 4.0, "Great."), ("u", "b", 1, 2.0, "Too long."), ("v", "a", 0, 3.0, "So-so."),
    ]  # fmt: skip


def test_profiles_as_they_stood_before_are_kept_in_order(tmp_path: Path) -> None:
    text = "user,persona,upto_position\nu,Final.,\nu,Nothing yet.,0\nv,Final.,1\nu,After one.,1\n"
    profiles = import_texts(tmp_path, text).profiles.to_pylist()
    assert [(row["user_id"], row["upto_position"], row["profile"]) for row in profiles] == [
        ("u", 0, "Nothing yet."), ("u", 1, "After one."), ("u", 2, "Final."), ("v", 1, "Final."),
    ]  # fmt: skip


def test_the_three_formats_and_column_aliases_give_the_same_tables(tmp_path: Path) -> None:
    rows = [{"userId": "u", "description": "I like war, mostly."}, {"userId": "v", "description": "I like peace."}]
    jsonl = write(tmp_path, "\n".join(json.dumps(row) for row in rows) + "\n\n", "p.jsonl")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    expected = import_texts(tmp_path)
    assert import_texts(tmp_path, jsonl) == expected
    assert import_texts(tmp_path, tmp_path / "p.parquet") == expected


def test_numeric_ids_of_json_and_parquet_match_ids_as_text(tmp_path: Path) -> None:
    interactions = interactions_table([("7", "1", 4.0, 0, "train"), ("8", "1", 4.0, 0, "train")])
    path = write(tmp_path, '{"user_id": 7, "profile": "x"}\n{"user_id": 8.0, "profile": "y"}\n', "p.jsonl")
    distilled = distill_from_files(
        interactions, users_table(interactions), profiles_path=path, memories_path=None, max_words=50
    )
    assert distilled.profiles["user_id"].to_pylist() == ["7", "8"]


def test_users_outside_the_cohort_are_ignored_and_counted(tmp_path: Path) -> None:
    distilled = import_texts(tmp_path, PROFILE_CSV + "w,Who?\nx,\n", MEMORY_CSV + "w,a,Hm.\nu,z,Not in the log.\n")
    assert distilled.profiles.num_rows == 2
    assert [note.split(": ")[1] for note in distilled.notes] == [
        "2 rows of users outside the cohort ignored",
        "1 rows of users outside the cohort ignored",
        "1 rows of pairs not in data/interactions.parquet ignored",
    ]


PROFILE_FAULTS = {
    "user_id,profile\nu,Hi.\n": "profiles.csv: 1 of 2 users of the cohort lack a profile: v;",
    "user_id,profile\nu,Hi.\nv,\n": "profiles.csv line 3: profile is empty;",
    "user_id,profile\nu,Hi.\nv,  \n": "profiles.csv line 3: profile is empty;",
    "user_id,profile\nu,Hi.\n,Ho.\nv,Hi.\n": "profiles.csv line 3: user_id is empty;",
    "user_id,profile\nu,Hi.\nv,Ho.\nu,Hi.\n": "profiles.csv line 4: second profile of user u;",
    f"user_id,profile\nu,Hi.\nv,{'word ' * 51}\n": "profiles.csv line 3: profile has 51 words, more than 50;",
    "user_id,profile,upto_position\nu,Hi.,3\nv,Ho.,1\n": "upto_position 3 is not a number from 0 to the user's 2 train",
    "user_id,profile,upto_position\nu,Hi.,-1\nv,Ho.,1\n": "line 2: upto_position -1 is not a number",
    "user_id,profile,upto_position\nu,Hi.,one\nv,Ho.,1\n": "line 2: upto_position one is not a number",
    "user_id,text\nu,Hi.\n": "profiles.csv line 2: no column profile (there are: user_id, text); name it profile",
    "user_id,profile\nu,Hi,there\n": "profiles.csv line 2: 3 cells, but the header has 2;",
    'user_id,profile\nu,"Hi\n': "profiles.csv line 2: not CSV (unexpected end of data);",
    "user_id,profile\n": "profiles.csv: no rows;",
    "": "profiles.csv: no rows;",
}  # fmt: skip


@pytest.mark.parametrize("text", PROFILE_FAULTS)
def test_a_fault_in_the_profiles_is_one_line(tmp_path: Path, text: str) -> None:
    lines = lines_of_failure(tmp_path, profiles=text)
    assert len(lines) == 1
    assert PROFILE_FAULTS[text] in lines[0]


MEMORY_FAULTS = {
    MEMORY_CSV + "u,c,Loved it.\n": "memories.csv: 1 memories are of test interactions, such as user u item c in",
    "user_id,item_id,memory\nu,a,Hm.\n": "2 of 3 train interactions lack a memory, such as user u item b;",
    MEMORY_CSV + "u,a,Again.\n": "memories.csv line 5: second memory of user u item a;",
    MEMORY_CSV.replace("Great.", ""): "memories.csv line 4: memory is empty;",
    MEMORY_CSV.replace("Great.", "word " * 51): "memories.csv line 4: memory has 51 words, more than 50;",
    MEMORY_CSV.replace("u,a", "u,"): "memories.csv line 4: item_id is empty;",
    "user_id,memory\nu,Hm.\n": "memories.csv line 2: no column item_id",
}


@pytest.mark.parametrize("text", MEMORY_FAULTS)
def test_a_fault_in_the_memories_is_named(tmp_path: Path, text: str) -> None:
    assert MEMORY_FAULTS[text] in lines_of_failure(tmp_path, memories=text)[0]


def test_several_faults_are_told_at_once(tmp_path: Path) -> None:
    lines = lines_of_failure(tmp_path, profiles="user_id,profile\nu,\nu,\n")
    assert [line.split(": ", 1)[1].split(";")[0] for line in lines] == [
        "profile is empty",
        "profile is empty",
        "1 of 2 users of the cohort lack a profile: v",
    ]


def test_very_many_faults_are_cut_short(tmp_path: Path) -> None:
    lines = lines_of_failure(tmp_path, profiles=PROFILE_CSV + "u,\n" * 100)
    assert len(lines) == MAX_ERRORS + 1
    assert lines[-1] == "and 80 more mistakes of these kinds"


def test_a_file_in_another_encoding_is_named_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_bytes("user_id,profile\nu,Amélie\n".encode("latin-1"))
    assert "p.csv line 2: not UTF-8 (byte 0xe9); save it as UTF-8" in lines_of_failure(tmp_path, profiles=path)[0]


def test_a_byte_order_mark_is_no_part_of_the_header(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_bytes(PROFILE_CSV.encode("utf-8-sig"))
    assert import_texts(tmp_path, path) == import_texts(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("p.jsonl", '{"user_id": "u"', "p.jsonl line 1: not JSON"),
        ("p.jsonl", '["u", "Hi."]', "p.jsonl line 1: not a JSON object"),
        ("p.jsonl", '{"user_id": "u", "profile": "\\ud83d"}', "p.jsonl line 1: half a character, '\\ud83d'"),
        ("p.parquet", "not parquet", "p.parquet: not a readable Parquet file"),
        ("p.xlsx", "sheet", "p.xlsx: unknown file type '.xlsx'; use .csv, .jsonl, .ndjson, .parquet"),
    ],
)
def test_an_unreadable_file_is_one_line(tmp_path: Path, name: str, content: str, line: str) -> None:
    lines = lines_of_failure(tmp_path, profiles=write(tmp_path, content, name))
    assert len(lines) == 1
    assert line in lines[0]


def test_faults_of_files_are_distill_errors(tmp_path: Path) -> None:
    with pytest.raises(DistillError):
        import_texts(tmp_path, "user_id,profile\n")


def test_find_file_names_the_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^distill\.path: is not set"):
        find_file(None, "distill.path")
    with pytest.raises(MissingInputError, match=r"^distill\.memories_path: nowhere\.csv not found"):
        find_file("nowhere.csv", "distill.memories_path")
    assert find_file(str(write(tmp_path, "x", "p.csv")), "distill.path") == tmp_path / "p.csv"
