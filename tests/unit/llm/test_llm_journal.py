import asyncio
import os
import signal
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from llm_calls import attempt

from personas_tune.errors import JournalError
from personas_tune.llm.journal import Journal, Total, Usage

WRITER = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, {folder!r})
from llm_calls import attempt
from personas_tune.llm.journal import Journal

async def record(journal, number):
    name = f"{{number:064}}"
    await journal.record(attempt(name, f"answer {{number}} " * 50))
    print(name, flush=True)

async def main(start):
    with Journal.open(Path({path!r})) as journal:
        print("open", flush=True)
        while True:
            await asyncio.gather(*(record(journal, start + n) for n in range(7)))
            start += 7

asyncio.run(main(int(sys.argv[1])))
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "memory" / "journal.sqlite"


def record(journal: Journal, *attempts) -> None:
    async def work() -> None:
        await asyncio.gather(*(journal.record(each) for each in attempts))

    asyncio.run(work())


def test_answers_come_back_oldest_first_and_no_other_status_does(path):
    with Journal.open(path) as journal:
        record(journal, attempt(response="first"), attempt("b" * 64))
        record(journal, attempt(status="failed", http_status=500, response="oh"))
        record(journal, attempt(status="lost", http_status=None, response=None))
        record(journal, attempt(response="second"))
        assert journal.answers("a" * 64) == ["first", "second"]
    with Journal.open(path) as journal:
        assert journal.answers("a" * 64) == ["first", "second"]
        assert journal.answers("c" * 64) == []


def test_all_that_is_known_of_an_attempt_is_kept(path):
    with Journal.open(path) as journal:
        record(journal, attempt(response='{"text": "ä \\u0000 \U0001f600"}\x00'))
        rows = journal.execute(
            "SELECT request, attempt, status, http_status, response, input_tokens, cached_tokens, output_tokens, "
            "request_id, model, via, started, ended FROM attempts"
        )
    expected = (
        "a" * 64, 1, "answered", 200, '{"text": "ä \\u0000 \U0001f600"}\x00', 10, 2, 3,
        "req_1", "gpt-4o", "online", 1.5, 2.5,
    )  # fmt: skip
    assert rows == [expected]


def test_attempts_at_a_request_are_numbered_even_if_committed_together(path):
    with Journal.open(path) as journal:
        record(journal, *(attempt(response=str(n)) for n in range(5)), attempt("b" * 64))
        journal.record_all([attempt(response="5")])
        rows = journal.execute("SELECT request, attempt, response FROM attempts ORDER BY request, attempt")
    assert rows == [("a" * 64, n + 1, str(n)) for n in range(6)] + [("b" * 64, 1, "body")]


def test_a_request_has_no_attempt_twice(path):
    with Journal.open(path) as journal:
        record(journal, attempt())
        with pytest.raises(JournalError, match="UNIQUE"):
            journal.execute("INSERT INTO attempts SELECT 99, request, 1, status, http_status, 0, 0, 0, '', '', via, 0, 0, '' FROM attempts")  # noqa: E501  # fmt: skip


@pytest.mark.parametrize("parts", [(), ("p",)], ids=["chat", "embeddings"])
def test_attempts_that_wait_are_committed_together(path, parts):
    with Journal.open(path) as journal:
        record(journal, *(attempt(f"{n:064}", parts=parts) for n in range(200)))
        pages_written = Path(f"{path}-wal").stat().st_size / 4096
        assert len(journal.answers(f"{199:064}")) == 1
    assert pages_written < 150  # a commit of its own for each would write 200 pages at the least


def test_an_attempt_is_kept_though_nobody_waits_for_it_any_more(path):
    async def work() -> None:
        waiting = asyncio.create_task(journal.record(attempt()))
        await asyncio.sleep(0)
        waiting.cancel()
        journal.record_soon(attempt("b" * 64))
        await journal.settle()
        assert len(journal.answers("a" * 64)) == len(journal.answers("b" * 64)) == 1

    with Journal.open(path) as journal:
        asyncio.run(work())


def test_closing_commits_what_waits(path):
    async def work() -> None:
        journal.record_soon(attempt())
        await asyncio.sleep(0)  # the first is on its way now
        journal.record_soon(attempt("b" * 64))

    with Journal.open(path) as journal:
        asyncio.run(work())
    with Journal.open(path) as journal:
        assert journal.answers("a" * 64) == journal.answers("b" * 64) == ["body"]


def test_recorded_attempts_outlive_kill_9(path):
    promised: set[str] = set()
    writer = WRITER.format(folder=str(Path(__file__).parent), path=str(path))
    for kill in range(4):
        process = subprocess.Popen([sys.executable, "-c", writer, str(kill * 10**6)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        for _ in range(3 + 17 * kill):
            promised.add(process.stdout.readline().strip())
        process.kill()
        promised.update(line.strip() for line in process.stdout if line.endswith("\n"))
        process.wait()
        process.stdout.close()
        with Journal.open(path) as journal:
            assert journal.execute("PRAGMA integrity_check") == [("ok",)]
            kept = {request for (request,) in journal.execute("SELECT request FROM attempts WHERE status = 'answered'")}
            assert promised <= kept
    assert len(promised) > 80


def test_a_second_process_is_told_who_has_the_journal(path):
    with Journal.open(path):
        program = (
            "import sys, pathlib; from personas_tune.llm.journal import Journal as J; J.open(pathlib.Path(sys.argv[1]))"
        )
        second = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True)
    expected = f"{path}: process {os.getpid()} is using it; wait until it is done, or stop it"
    assert second.stderr.splitlines()[-1] == f"personas_tune.errors.JournalError: {expected}"
    Journal.open(path).close()


def test_a_killed_process_leaves_no_lock(path):
    writer = WRITER.format(folder=str(Path(__file__).parent), path=str(path))
    process = subprocess.Popen([sys.executable, "-c", writer, "0"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    with pytest.raises(JournalError, match=f"process {process.pid} is using it"):
        Journal.open(path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    Journal.open(path).close()


def test_only_the_owner_can_read_the_files(path):
    before = os.umask(0)
    try:
        with Journal.open(path) as journal:
            record(journal, attempt())
            assert modes(path) == {"journal.sqlite": 0o600, "journal.sqlite-wal": 0o600, "journal.sqlite-shm": 0o600,
                                   "journal.sqlite.lock": 0o600}  # fmt: skip
        path.chmod(0o644)
        with Journal.open(path) as journal:
            record(journal, attempt())
            assert set(modes(path).values()) == {0o600}
    finally:
        os.umask(before)


def modes(path: Path) -> dict[str, int]:
    return {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}


def test_commits_are_flushed_to_the_disk(path):
    with Journal.open(path) as journal:
        assert journal.execute("PRAGMA journal_mode") == [("wal",)]
        assert journal._writer.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"user_id,item_id\n" * 200, "no journal, or a damaged one"),
        (b"SQLite format 3\x00" + b"\x10" * 500, "no journal, or a damaged one"),
    ],
    ids=["text", "half a header"],
)
def test_a_file_that_is_none_of_ours_is_refused_and_left_alone(path, content, words):
    path.parent.mkdir()
    path.write_bytes(content)
    path.chmod(0o644)
    with pytest.raises(JournalError, match=words) as told:
        Journal.open(path)
    assert str(told.value).startswith(f"{path}: ")
    assert path.read_bytes() == content
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_another_programs_database_is_refused_and_left_alone(path):
    path.parent.mkdir()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE attempts (id INTEGER)")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(JournalError, match="an SQLite file, but no journal of answers"):
        Journal.open(path)
    assert path.read_bytes() == before


def test_a_journal_of_a_later_version_is_refused(path):
    with Journal.open(path) as journal:
        journal.execute("PRAGMA user_version = 7")
    with pytest.raises(JournalError, match="schema 7, this version reads 1"):
        Journal.open(path)


def test_a_folder_is_no_journal(tmp_path):
    with pytest.raises(JournalError, match="Is a directory"):
        Journal.open(tmp_path)


def test_a_file_in_the_place_of_a_folder_is_told(tmp_path):
    (tmp_path / "memory").touch()
    with pytest.raises(JournalError, match=r"File exists|Not a directory"):
        Journal.open(tmp_path / "memory" / "journal.sqlite")


def test_damage_that_shows_later_is_told_in_one_line(path):
    with Journal.open(path) as journal:
        journal.record_all(attempt(f"{n:064}", "x" * 500) for n in range(300))
    content = bytearray(path.read_bytes())
    for start in range(4096, len(content), 4096):
        content[start : start + 200] = b"\xff" * 200
    path.write_bytes(content)
    with pytest.raises(JournalError, match="no journal, or a damaged one"), Journal.open(path) as journal:
        _ = [journal.answers(f"{n:064}") for n in range(300)]


def test_a_full_disk_is_told_to_whoever_records(path):
    with Journal.open(path) as journal:
        journal._writer.execute("PRAGMA max_page_count = 12")
        with pytest.raises(JournalError, match="database or disk is full"):
            record(journal, *(attempt(f"{n:064}", "x" * 4000) for n in range(50)))
        assert journal.totals("gpt-4o") == []


def test_an_answer_that_no_row_can_hold_is_told_to_all_who_record_with_it(path):
    async def work() -> list[object]:
        attempts = [attempt(), attempt("b" * 64, usage=Usage(10**30)), attempt("c" * 64)]
        return await asyncio.gather(*map(journal.record, attempts), return_exceptions=True)

    with Journal.open(path) as journal:
        outcomes = asyncio.run(asyncio.wait_for(work(), 30))
        assert [type(outcome) for outcome in outcomes] == [JournalError] * 3
        assert str(outcomes[0]).startswith(f"{path}: 3 answers can't be kept: OverflowError(")
        record(journal, attempt("d" * 64))
        assert [total.n for total in journal.totals("gpt-4o")] == [1]


def test_all_results_are_kept_or_none(path):
    with Journal.open(path) as journal:
        with pytest.raises(JournalError):
            journal.record_all([attempt(), attempt(status="unheard of")])
        assert journal.totals("gpt-4o") == []


def test_a_transaction_inside_another_ends_with_it(path):
    def fail() -> None:
        with journal.transaction():
            journal.execute("CREATE TABLE more (id INTEGER)")
            journal.record_all([attempt()])
            raise KeyError

    with Journal.open(path) as journal:
        with pytest.raises(KeyError):
            fail()
        assert journal.totals("gpt-4o") == []
        assert journal.execute("SELECT name FROM sqlite_master WHERE name = 'more'") == []


def test_totals_are_sums_by_way_and_status(path):
    with Journal.open(path) as journal:
        assert journal.totals("gpt-4o") == []
        record(journal, attempt(), attempt("b" * 64), attempt("c" * 64, status="lost", usage=Usage(7, 0, 1)))
        journal.record_all([attempt("d" * 64, via="batch"), attempt("e" * 64, model="other")])
        answered, lost = Total("online", "answered", 2, Usage(20, 4, 6)), Total("online", "lost", 1, Usage(7, 0, 1))
        assert journal.totals("gpt-4o") == [Total("batch", "answered", 1, Usage(10, 2, 3)), answered, lost]


def test_the_journal_does_without_the_openai_library():
    program = "import sys, personas_tune.llm.journal, personas_tune.llm.settings; sys.exit('openai' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
