from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from personas_tune.memory import tables
from personas_tune.memory.tables import MEMORIES, PROFILES, Reflected, memories_table, profiles_table, write_distilled


def reflected(number: int) -> Reflected:
    user_id = f"u{number:03}"
    n = number % 4
    return Reflected(
        user_id,
        tuple((upto, f"Profile {upto} of {user_id}.") for upto in range(n + 1)),
        tuple((user_id, f"i{position}", position, 3.5, f"Memory {position}.") for position in range(n)),
    )


USERS = [reflected(number) for number in range(10)]


@pytest.fixture(autouse=True)
def small_row_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "USERS_PER_ROW_GROUP", 3)


def write(folder: Path, users: Iterator[Reflected] | list[Reflected], name: str = "") -> tuple[Path, Path]:
    paths = folder / f"profiles{name}.parquet", folder / f"memories{name}.parquet"
    write_distilled(users, *paths, "openai")
    return paths


def test_what_is_streamed_is_what_the_tables_written_whole_would_be(tmp_path: Path) -> None:
    profiles, memories = write(tmp_path, USERS)
    rows = [(user.user_id, upto, text) for user in USERS for upto, text in user.profiles]
    assert pq.read_table(profiles).equals(profiles_table(rows, "openai"))
    assert pq.read_table(memories).equals(memories_table(row for user in USERS for row in user.memories))
    assert pq.read_table(profiles).schema.equals(PROFILES)
    assert pq.read_table(memories).schema.equals(MEMORIES)


def test_rows_written_are_counted(tmp_path: Path) -> None:
    assert write_distilled(USERS, tmp_path / "p", tmp_path / "m", "openai") == (
        sum(len(user.profiles) for user in USERS),
        sum(len(user.memories) for user in USERS),
    )


def test_equal_results_give_equal_bytes(tmp_path: Path) -> None:
    first, second = write(tmp_path, USERS), write(tmp_path, iter(USERS), "_again")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_a_row_group_holds_a_fixed_number_of_users(tmp_path: Path) -> None:
    file = pq.ParquetFile(write(tmp_path, USERS)[0])
    users = [set(file.read_row_group(group)["user_id"].to_pylist()) for group in range(file.num_row_groups)]
    assert [len(each) for each in users] == [3, 3, 3, 1]


def test_results_are_pulled_as_they_are_written(tmp_path: Path) -> None:
    sizes = []

    def users() -> Iterator[Reflected]:
        for number in range(400):
            sizes.append((tmp_path / "profiles.parquet").stat().st_size)
            yield reflected(number)

    write(tmp_path, users())
    assert sizes[0] < sizes[200] < sizes[-1]


@pytest.mark.parametrize("users", [[], [Reflected("u", ((0, "Nothing yet."),), ())]])
def test_tables_without_rows_can_be_read(tmp_path: Path, users: list[Reflected]) -> None:
    profiles, memories = write(tmp_path, users)
    assert pq.read_table(profiles).num_rows == len(users)
    assert pq.read_table(memories).num_rows == 0
    assert pq.read_table(memories).schema.equals(MEMORIES)
