"""Waves of the Batch API against a server on a real socket."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Thread, Timer
from typing import Any

import pytest
from batch_jobs import N_USERS, Job, chains, question, run_job, start_host, start_job
from openai_server import Server, start_server
from openai_server import __file__ as openai_server_file

from personas_tune.errors import BudgetError, ConfigError, JournalError, ServerError
from personas_tune.llm.batch_collect import Gain
from personas_tune.llm.batch_files import Bounds, DamagedFileError, read_answers, write_input_files
from personas_tune.llm.batch_ledger import Ledger
from personas_tune.llm.batch_stop import Stop, Stopped
from personas_tune.llm.batches import refuse_open_batches, run_batches
from personas_tune.llm.budget import Prices
from personas_tune.llm.calls import Call, Request
from personas_tune.llm.journal import Attempt, Journal, Usage
from personas_tune.llm.online import run_online
from personas_tune.llm.replay import finished_chains
from personas_tune.llm.settings import ServerSettings

Start = Callable[..., Server]
N_CALLS, N_BATCHES = 12, 4  # of the job, when a file holds four requests


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the job comes to online, call by call."""
    with start_server() as server, Journal.open(tmp_path_factory.mktemp("online") / "journal.sqlite") as journal:
        settings = ServerSettings("gpt-4o", base_url=server.base_url)
        assert run_online(chains(), journal=journal, server=settings, max_tries=1, n_calls=None, what="job") == {}
        return list(finished_chains(chains(), journal))


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[..., Job]]:
    """Start the job in a process of its own; takes what :func:`run_job` takes."""
    with start_host() as host:
        yield lambda folder, server, **options: start_job(host, folder, server.base_url, **options)


@pytest.fixture(scope="module")
def be_killed(start: Callable[..., Job]) -> Callable[..., None]:
    """Run the job until it kills itself."""

    def run(folder: Path, server: Server, **options: Any) -> None:
        status, words = start(folder, server, **options).wait()
        assert status == -signal.SIGKILL, words

    return run


def wait_until(fact: Callable[[], Any]) -> None:
    for _ in range(6_000):
        if fact():
            return
        time.sleep(0.01)
    raise TimeoutError


def asked(server: Server, method: str, path: str) -> int:
    return sum(each["method"] == method and each["path"].startswith(f"/v1/{path}") for each in server.requests())


def labels(server: Server) -> Counter[tuple[str, str, str]]:
    """How many batches there are of each job, shard and number."""
    names = ("personas_tune_job", "personas_tune_shard", "personas_tune_try")
    return Counter(tuple(batch["metadata"][name] for name in names) for batch in server.batches())


def input_names(server: Server) -> list[str]:
    return [file["filename"] for file in server.files() if file["purpose"] == "batch"]


def lines_of(server: Server, file_id: str) -> list[dict[str, Any]]:
    with urllib.request.urlopen(f"{server.base_url}/files/{file_id}/content") as answer:
        return [json.loads(line) for line in answer]


def assert_nothing_was_done_twice(server: Server) -> None:
    assert max(labels(server).values()) == 1
    assert max(Counter(input_names(server)).values()) == 1
    assert max(Counter(each["request"] for each in server.billed()).values()) == 1


def test_a_job_in_waves_comes_to_what_it_comes_to_online(openai_server: Start, tmp_path, expected, capsys):
    server = openai_server()
    assert run_job(tmp_path, server.base_url) == expected
    assert_nothing_was_done_twice(server)
    assert len(server.billed()) == N_CALLS
    assert len(server.batches()) == N_BATCHES
    assert {batch["completion_window"] for batch in server.batches()} == {"24h"}
    assert list((tmp_path / "batches").iterdir()) == []
    assert "wave 3: 2 of 2 requests sent are answered, batches left: 0" in capsys.readouterr().err


def test_a_finished_job_asks_nothing(openai_server: Start, tmp_path, expected):
    server = openai_server()
    run_job(tmp_path, server.base_url)
    n_requests = len(server.requests())
    assert run_job(tmp_path, server.base_url) == expected
    assert len(server.requests()) == n_requests


def test_a_finished_job_needs_no_key(openai_server: Start, tmp_path, expected, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    run_job(tmp_path, openai_server().base_url)
    assert run_job(tmp_path, "https://api.openai.com/v1") == expected
    with pytest.raises(ServerError, match="no key"):
        run_job(tmp_path, "https://api.openai.com/v1", n_users=N_USERS + 1)


def test_a_further_user_costs_that_user_only(openai_server: Start, tmp_path, expected):
    server = openai_server()
    run_job(tmp_path, server.base_url)
    assert run_job(tmp_path, server.base_url, n_users=N_USERS + 1)[:N_USERS] == expected
    assert len(server.billed()) == N_CALLS + 1


def test_files_hold_only_so_many_requests(openai_server: Start, tmp_path):
    server = openai_server()
    run_job(tmp_path, server.base_url, max_requests=5)
    assert [batch["request_counts"]["total"] for batch in server.batches()] == [5, 1, 4, 2]


def test_files_hold_only_so_many_bytes(openai_server: Start, tmp_path, expected):
    server = openai_server()
    assert run_job(tmp_path, server.base_url, max_requests=50, max_bytes=1000) == expected
    sizes = [file["bytes"] for file in server.files() if file["purpose"] == "batch"]
    assert max(sizes) <= 1000
    assert len(sizes) > 3
    assert len(server.billed()) == N_CALLS


def test_a_request_larger_than_a_file_goes_alone(tmp_path):
    calls = [(question("word " * n), None) for n in (1, 500, 2)]
    files = list(write_input_files(calls, tmp_path, Bounds(10, 1000)))
    assert [len(file.requests) for file in files] == [1, 1, 1]
    assert [path.stat().st_size for path in sorted(tmp_path.iterdir())] == [
        file.n_bytes for file in sorted(files, key=lambda file: file.sha256)
    ]


def test_a_file_holds_requests_of_one_model_only(tmp_path):
    models = ["gpt-4o", "gpt-4o", "gpt-4o-mini"]
    bodies = [{"model": model, "messages": [{"role": "user", "content": str(n)}]} for n, model in enumerate(models)]
    calls = [(Call(Request("/chat/completions", body, "v1"), json.loads, 1), None) for body in bodies]
    files = list(write_input_files(calls, tmp_path, Bounds(10, 10_000)))
    assert [(file.model, len(file.requests)) for file in files] == [("gpt-4o", 2), ("gpt-4o-mini", 1)]


def test_input_files_are_for_our_eyes_only(tmp_path):
    list(write_input_files([(question("a"), None)], tmp_path, Bounds(10, 1000)))
    (path,) = tmp_path.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_users_who_ask_the_same_share_an_answer(openai_server: Start, tmp_path):
    server = openai_server()

    def ask(text: str) -> Iterator[Call]:
        return (yield question(text))

    with Journal.open(tmp_path / "journal.sqlite") as journal:
        twins = [(f"u{n}", text) for n, text in enumerate(["same", "other", "same", "same"])]
        settings = ServerSettings("gpt-4o", base_url=server.base_url)
        options = {"journal": journal, "server": settings, "max_tries": 1, "folder": tmp_path / "b", "poll_s": 0.01}
        run_batches(lambda: ((name, ask(text)) for name, text in twins), max_requests=2, **options)
    assert len(server.billed()) == 2


@pytest.mark.parametrize("state", ["intended", "uploading", "uploaded", "creating", "created", "collected"])
def test_a_kill_before_a_step_is_noted_repeats_nothing(openai_server: Start, be_killed, tmp_path, expected, state):
    server = openai_server()
    be_killed(tmp_path, server, die_before=state)
    assert run_job(tmp_path, server.base_url) == expected
    assert_nothing_was_done_twice(server)
    assert len(server.batches()) == N_BATCHES
    assert len(server.billed()) == N_CALLS


def test_a_kill_while_batches_are_looked_after_repeats_nothing(openai_server: Start, start, tmp_path, expected):
    server = openai_server(in_progress_s=60)
    job = start(tmp_path, server)
    wait_until(lambda: asked(server, "GET", "batches/") >= 3)
    job.kill(signal.SIGKILL)
    job.wait()
    server.set(in_progress_s=0)
    assert run_job(tmp_path, server.base_url) == expected
    assert_nothing_was_done_twice(server)
    assert len(server.batches()) == N_BATCHES


@pytest.mark.parametrize("path", ["files", "batches"])
def test_what_arrives_after_the_process_was_killed_is_found(openai_server: Start, start, tmp_path, expected, path):
    server = openai_server(before_commit_s=0.3)
    job = start(tmp_path, server, max_requests=50)
    wait_until(lambda: asked(server, "POST", path))
    job.kill(signal.SIGKILL)
    job.wait()
    server.set(before_commit_s=0)
    assert run_job(tmp_path, server.base_url, max_requests=50, poll_s=0.4) == expected
    assert_nothing_was_done_twice(server)
    assert len(server.batches()) == 3


@pytest.mark.parametrize("lost", ["files", "batches"])
@pytest.mark.parametrize("fault", ["reset", "half_body"])
def test_a_lost_answer_is_looked_for_before_asking_again(openai_server: Start, tmp_path, lost, fault):
    before = {"files": ["ok", "ok"], "batches": ["ok", "ok", "ok"]}[lost]  # two listings, then an upload
    server = openai_server(batch_plan=[*before, fault])
    run_job(tmp_path, server.base_url)
    assert_nothing_was_done_twice(server)
    assert len(server.batches()) == len(input_names(server)) == N_BATCHES


@pytest.mark.parametrize("fault", ["reset", "half_body", "server_error"])
def test_answers_that_did_not_arrive_whole_are_fetched_again(openai_server: Start, tmp_path, expected, fault):
    server = openai_server(batch_plan=["ok"] * 5 + [fault])  # two listings, upload, creation, look, download
    assert run_job(tmp_path, server.base_url, max_requests=50) == expected
    assert asked(server, "GET", "files/") == 4
    assert_nothing_was_done_twice(server)


def test_faults_on_the_way_repeat_nothing(openai_server: Start, tmp_path, expected):
    faults = {"reset": 0.15, "half_body": 0.1, "server_error": 0.1, "rate_limited": 0.1}
    server = openai_server(batch_faults=faults, retry_after_s=0.01, seed=3)
    assert run_job(tmp_path, server.base_url, max_requests=1) == expected
    assert_nothing_was_done_twice(server)
    assert len(server.batches()) == N_CALLS
    assert {"reset", "half_body", 500, 429} <= {each["outcome"] for each in server.requests()}


def make_batches(server: Server, n: int) -> None:
    """Batches of somebody else, on files of somebody else."""
    import openai

    line = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions"}
    content = json.dumps({**line, "body": {"model": "gpt-4o", "messages": [{"role": "user", "content": "a"}]}})
    with openai.OpenAI(base_url=server.base_url, api_key="any") as client:
        for number in range(n):
            file = client.files.create(file=(f"{number}.jsonl", content.encode()), purpose="batch")
            client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")


@pytest.mark.parametrize("state", ["uploaded", "created"])
def test_a_long_listing_is_read_to_its_end(openai_server: Start, be_killed, tmp_path, state):
    server = openai_server()
    be_killed(tmp_path, server, die_before=state, max_requests=50)
    make_batches(server, 110)
    run_job(tmp_path, server.base_url, max_requests=50)
    ours = [batch for batch in server.batches() if batch["metadata"]]
    assert len(ours) == 3
    assert len(server.files()) == 2 * (110 + 3)


def test_two_jobs_on_one_account_leave_each_other_alone(openai_server: Start, be_killed, tmp_path, expected):
    server = openai_server()
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    be_killed(tmp_path / "first", server, die_before="created")
    assert run_job(tmp_path / "second", server.base_url) == expected
    assert run_job(tmp_path / "first", server.base_url) == expected
    assert max(labels(server).values()) == 1
    assert Counter(job for job, _, _ in labels(server)) == {job: N_BATCHES for job, _, _ in labels(server)}
    assert len(server.billed()) == 2 * N_CALLS


def test_an_older_copy_of_the_journal_adopts_what_was_paid_for_since(
    openai_server: Start, be_killed, tmp_path, expected
):
    server = openai_server()
    be_killed(tmp_path, server, die_before="intended")
    with Journal.open(tmp_path / "journal.sqlite"):
        pass  # brings the write-ahead log in
    copy = (tmp_path / "journal.sqlite").read_bytes()
    run_job(tmp_path, server.base_url)
    (tmp_path / "journal.sqlite").write_bytes(copy)
    assert run_job(tmp_path, server.base_url) == expected
    assert_nothing_was_done_twice(server)
    assert len(server.billed()) == N_CALLS


def test_questions_that_changed_before_they_were_sent_are_not_sent(openai_server: Start, be_killed, tmp_path):
    server = openai_server()
    be_killed(tmp_path, server, die_before="uploading")
    run_job(tmp_path, server.base_url, version=", second edition")
    assert len(server.billed()) == N_CALLS
    assert all("second edition" in json.dumps(line) for name in first_files(server) for line in lines_of(server, name))
    assert list((tmp_path / "batches").iterdir()) == []


def first_files(server: Server) -> list[str]:
    return [file["id"] for file in server.files() if file["purpose"] == "batch"][:2]


def test_a_damaged_input_file_is_not_sent(openai_server: Start, be_killed, tmp_path, expected):
    server = openai_server()
    be_killed(tmp_path, server, die_before="uploading")
    for path in (tmp_path / "batches").iterdir():
        path.write_bytes(b"")
    assert run_job(tmp_path, server.base_url) == expected


def test_rejected_answers_are_asked_for_again_with_the_complaint(openai_server: Start, tmp_path):
    server = openai_server(line_faults={"not_json": 1.0})
    server_says = run_job(tmp_path, server.base_url, n_users=1, max_tries=2)
    assert server_says == ["2 answers rejected, the last: there is no JSON with a profile"]
    first, second = first_files(server)
    (line,), (again,) = lines_of(server, first), lines_of(server, second)
    assert line["custom_id"] == again["custom_id"]
    assert "there is no JSON with a profile" in again["body"]["messages"].pop()["content"]
    assert line["body"] == again["body"]


def test_a_further_run_asks_again_for_what_was_given_up(openai_server: Start, tmp_path):
    server = openai_server(line_faults={"not_json": 1.0})
    run_job(tmp_path, server.base_url, n_users=1, max_tries=2)
    assert run_job(tmp_path, server.base_url, n_users=1, max_tries=1) == [
        "3 answers rejected, the last: there is no JSON with a profile"
    ]
    server.set(line_faults={})
    (profile,) = run_job(tmp_path, server.base_url, n_users=1)
    assert "Film 0 of u0" in profile
    assert len(server.billed()) == 4


def test_spoilt_answers_cost_waves_and_change_nothing(openai_server: Start, tmp_path, expected):
    server = openai_server(line_faults={"not_json": 0.3, "expired": 0.2, "server_error": 0.1}, seed=1)
    assert run_job(tmp_path, server.base_url, max_tries=9) == expected
    assert {"not_json", "ok"} == {each["what"] for each in server.billed()}
    assert {"expired", "completed"} == {batch["status"] for batch in server.batches()}
    assert max(labels(server).values()) == 1


def test_requests_that_fail_again_and_again_are_given_up(openai_server: Start, tmp_path):
    server = openai_server(line_faults={"server_error": 1.0})
    why = run_job(tmp_path, server.base_url, n_users=2)
    assert why == ["no answer in 3 attempts, the last: HTTP 500: The server had an error"] * 2
    assert server.billed() == []


def test_requests_that_always_expire_are_given_up_in_the_end(openai_server: Start, tmp_path):
    server = openai_server(line_faults={"expired": 1.0})
    (why,) = run_job(tmp_path, server.base_url, n_users=1)
    assert why.startswith("no answer in 10 attempts, the last: batch_expired: ")


def test_a_batch_for_which_there_is_no_room_is_asked_for_again(openai_server: Start, tmp_path, expected):
    server = openai_server(batch_failures=["ok", "token_limit_exceeded", "token_limit_exceeded"])
    assert run_job(tmp_path, server.base_url) == expected
    assert_nothing_was_done_twice(server)
    assert sorted(number for _, _, number in labels(server)) == ["1", "1", "1", "1", "2", "3"]


def test_batches_wait_for_room(openai_server: Start, tmp_path, expected, capsys):
    server = openai_server(enqueued_tokens=90, in_progress_s=0.1)
    assert run_job(tmp_path, server.base_url, max_requests=1) == expected
    assert "Enqueued token limit reached" in capsys.readouterr().err
    assert_billed_once(server)


def assert_billed_once(server: Server) -> None:
    assert max(Counter(each["request"] for each in server.billed()).values()) == 1


def test_shards_that_would_never_fit_are_made_smaller(openai_server: Start, tmp_path, expected):
    server = openai_server(enqueued_tokens=150)
    assert run_job(tmp_path, server.base_url, n_users=6, max_requests=50) == expected
    assert_billed_once(server)
    assert [batch["status"] for batch in server.batches()].count("failed") >= 1


def test_a_batch_that_is_refused_stops_the_run_and_leaves_no_trace(openai_server: Start, tmp_path, expected):
    server = openai_server(batch_failures=["invalid_request"])
    with pytest.raises(ServerError, match="batch batch_000001 failed: The batch failed: invalid_request"):
        run_job(tmp_path, server.base_url, max_requests=50)
    assert run_job(tmp_path, server.base_url, max_requests=50) == expected
    assert_billed_once(server)


def test_a_batch_that_somebody_cancelled_stops_the_run(openai_server: Start, start, tmp_path, expected):
    server = openai_server(in_progress_s=60)
    job = start(tmp_path, server, max_requests=50)
    wait_until(lambda: asked(server, "GET", "batches/"))
    (batch,) = server.batches()
    urllib.request.urlopen(f"{server.base_url}/batches/{batch['id']}/cancel", b"").close()
    status, words = job.wait()
    assert status == 2
    assert f"error: batch {batch['id']}: cancelled at the server; its answers are kept" in words
    server.set(in_progress_s=0)
    assert run_job(tmp_path, server.base_url, max_requests=50) == expected


def test_a_budget_stops_new_batches_and_keeps_what_is_under_way(openai_server: Start, tmp_path, expected):
    server = openai_server()
    with pytest.raises(
        BudgetError, match=r"max_tokens=500: \d+ tokens are spent, the next batch of 4 requests takes about"
    ):
        run_job(tmp_path, server.base_url, bounds={"max_tokens": 500})
    n_billed = len(server.billed())
    assert 0 < n_billed < N_CALLS
    assert n_billed == sum(batch["request_counts"]["completed"] for batch in server.batches())
    assert run_job(tmp_path, server.base_url) == expected
    assert len(server.billed()) == N_CALLS


@pytest.mark.parametrize("bounds", [{"max_tokens": 200}, {"max_usd": 0.1, "prices": Prices(input=1e3, output=1e3)}])
def test_a_budget_smaller_than_a_file_is_used_all_the_same(openai_server: Start, tmp_path, expected, bounds):
    server = openai_server()
    with pytest.raises(BudgetError, match=r"the next batch of 4 requests (takes|costs) about"):
        run_job(tmp_path, server.base_url, bounds=bounds, max_requests=50)
    assert [batch["request_counts"]["total"] for batch in server.batches()] == [2]
    assert run_job(tmp_path, server.base_url, max_requests=50) == expected
    assert len(server.billed()) == N_CALLS


def test_a_budget_counts_what_an_earlier_run_left_under_way(openai_server: Start, be_killed, tmp_path):
    server = openai_server()
    be_killed(tmp_path, server, die_before="created")
    with pytest.raises(BudgetError):
        run_job(tmp_path, server.base_url, bounds={"max_tokens": 450})
    assert len(server.batches()) == 1


def test_a_budget_in_money_counts_batches_at_their_price(openai_server: Start, tmp_path, expected):
    server = openai_server()
    run_job(tmp_path, server.base_url)
    with Journal.open(tmp_path / "journal.sqlite") as journal:
        (total,) = journal.totals("gpt-4o")
    full_price = Prices(input=1e3, output=1e3, batch_share=1.0).cost_usd(total.usage, "batch")
    (tmp_path / "again").mkdir()
    bounds = {"prices": Prices(input=1e3, output=1e3, batch_share=0.25), "max_usd": full_price / 2}
    assert run_job(tmp_path / "again", server.base_url, bounds=bounds) == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_and_the_next_one_comes_back(openai_server: Start, start, tmp_path, expected, number):
    server = openai_server(in_progress_s=60)
    job = start(tmp_path, server, poll_s=30)
    wait_until(lambda: len(server.batches()) == 2)
    job.kill(number)
    status, words = job.wait()
    assert status == 128 + number
    assert "error: interrupted: batches that go on at the server: 2; run the same command to go on" in words
    server.set(in_progress_s=0)
    assert run_job(tmp_path, server.base_url) == expected
    assert_nothing_was_done_twice(server)


def test_a_signal_waits_for_the_batch_that_is_being_made(openai_server: Start, start, tmp_path):
    server = openai_server(after_commit_s=0.5)
    job = start(tmp_path, server, max_requests=50)
    wait_until(lambda: asked(server, "POST", "batches"))
    job.kill(signal.SIGTERM)
    assert job.wait()[0] == 128 + signal.SIGTERM
    with Journal.open(tmp_path / "journal.sqlite") as journal:
        assert [shard.batch_id for shard in Ledger(journal).shards("created")] == ["batch_000001"]


def test_online_calls_are_refused_while_batches_are_under_way(openai_server: Start, be_killed, tmp_path):
    server = openai_server()
    be_killed(tmp_path, server, die_before="uploading")
    with Journal.open(tmp_path / "journal.sqlite") as journal:
        refuse_open_batches(journal)
    be_killed(tmp_path, server, die_before="created")
    with (
        Journal.open(tmp_path / "journal.sqlite") as journal,
        pytest.raises(JournalError, match=r"not collected yet: 1; collect them with distill.batch_api"),
    ):
        refuse_open_batches(journal)
    run_job(tmp_path, server.base_url)
    with Journal.open(tmp_path / "journal.sqlite") as journal:
        refuse_open_batches(journal)


def test_a_key_that_the_server_does_not_take_is_not_told(openai_server: Start, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary-of-the-test")
    server = openai_server(api_key="sk-another-one")
    with pytest.raises(ServerError, match="HTTP 401: Incorrect API key provided") as told:
        run_job(tmp_path, server.base_url)
    assert "canary" not in str(told.value)
    assert not any(b"canary" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_a_batch_that_is_not_made_leaves_the_online_mode_free(openai_server: Start, start, tmp_path):
    server = openai_server(after_commit_s=0.3)
    job = start(tmp_path, server)
    wait_until(lambda: asked(server, "POST", "files"))
    server.set(api_key="sk-another-one")
    status, words = job.wait()
    assert status == 2
    assert "HTTP 401" in words
    assert asked(server, "POST", "batches") == 1
    with Journal.open(tmp_path / "journal.sqlite") as journal:
        refuse_open_batches(journal)


def test_an_address_that_is_none_is_told_of(tmp_path):
    with pytest.raises(ConfigError, match="can't connect: "):
        run_job(tmp_path, "http://localhost/v1\x7f")


def test_a_server_that_is_not_there_is_told_of(tmp_path):
    with pytest.raises(ServerError, match=r"127.0.0.1:9/v1: no answer in 3 attempts, the last: the connection broke"):
        run_job(tmp_path, "http://127.0.0.1:9/v1", bounds={"max_retries": 2})


def test_a_server_without_batches_is_told_of(openai_server: Start, tmp_path):
    server = openai_server()
    with pytest.raises(ServerError, match=r"HTTP 404: Invalid URL .*distill.batch_api=false"):
        run_job(tmp_path, f"{server.root}/v2")


def delete_output_file(server: Server) -> None:
    output = next(file for file in server.files() if file["purpose"] == "batch_output")
    request = urllib.request.Request(f"{server.base_url}/files/{output['id']}", method="DELETE")
    urllib.request.urlopen(request).close()


def test_what_was_in_an_output_file_that_is_gone_is_asked_again(
    openai_server: Start, be_killed, tmp_path, expected, capsys
):
    server = openai_server()
    be_killed(tmp_path, server, die_before="collected")
    delete_output_file(server)
    assert run_job(tmp_path, server.base_url) == expected
    words = (
        "batch_000001, or a file of its answers, is not at this server any more; 4 of its 4 requests are asked again"
    )
    assert words in capsys.readouterr().err
    assert max(labels(server).values()) == 1
    assert len(server.billed()) == N_CALLS + 4


def test_an_output_file_that_is_gone_counts_against_the_budget(openai_server: Start, be_killed, tmp_path):
    server = openai_server()
    be_killed(tmp_path, server, die_before="collected")
    delete_output_file(server)
    run_job(tmp_path, server.base_url)
    with Journal.open(tmp_path / "journal.sqlite") as journal:
        lost = next(total for total in journal.totals("gpt-4o") if total.status == "lost")
    assert lost.usage.output_tokens == 4 * 60
    assert lost.usage.input_tokens > 0


@pytest.fixture
def restart() -> Iterator[Callable[[Server], Server]]:
    """Start a server that knows nothing at the address of one that is over."""
    with ExitStack() as stack:

        def start(server: Server) -> Server:
            command = [sys.executable, openai_server_file, "--until-stdin-closes", "--port", str(server.port)]
            pipe = subprocess.PIPE
            process = stack.enter_context(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True))
            assert process.stdout is not None
            assert process.stdout.readline().strip().endswith(f":{server.port}")
            return server

        yield start


def leave_batches(be_killed: Callable[..., None], folder: Path) -> Server:
    """A job of which two batches are under way at a server that is over."""
    with start_server() as server:
        be_killed(folder, server, die_before="collected")
        assert len(server.batches()) == 2
    return server


@pytest.mark.parametrize("n_of_others", [0, 2])  # under the ids of the lost ones
def test_batches_that_the_server_lost_are_asked_again(be_killed, restart, tmp_path, expected, capsys, n_of_others):
    server = restart(leave_batches(be_killed, tmp_path))
    make_batches(server, n_of_others)
    assert run_job(tmp_path, server.base_url) == expected
    words = capsys.readouterr().err
    assert "batch batch_000001, or a file of its answers, is not at this server any more; 4 of its 4 requests" in words
    assert "batch batch_000002, or a file of its answers, is not at this server any more; 2 of its 2 requests" in words
    assert len(server.billed()) == N_CALLS + n_of_others
    with Journal.open(tmp_path / "journal.sqlite") as journal:
        assert len(Ledger(journal).shards("gone")) == 2
        refuse_open_batches(journal)


def test_batches_are_not_gone_because_another_server_lacks_them(openai_server: Start, be_killed, tmp_path):
    made_at, other = openai_server(), openai_server()
    be_killed(tmp_path, made_at, die_before="collected")
    for n_batches_of_others in (0, 2):
        make_batches(other, n_batches_of_others)
        words = f"has no batch batch_000001 of this job, which was made at {made_at.base_url}; use the base_url and key"
        with pytest.raises(ServerError, match=words):
            run_job(tmp_path, other.base_url)
    with Journal.open(tmp_path / "journal.sqlite") as journal:
        assert len(Ledger(journal).shards("created")) == 2
    assert not any(batch["metadata"] for batch in other.batches())


def test_a_batch_that_was_being_made_is_not_made_at_another_server(openai_server: Start, be_killed, tmp_path, expected):
    made_at, other = openai_server(), openai_server()
    be_killed(tmp_path, made_at, die_before="created")
    with pytest.raises(ServerError, match=f"of this job, which was made at {made_at.base_url}"):
        run_job(tmp_path, other.base_url)
    assert other.batches() == []
    assert run_job(tmp_path, made_at.base_url) == expected
    assert_nothing_was_done_twice(made_at)


def test_batches_are_not_gone_because_another_key_does_not_find_them(be_killed, restart, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = restart(leave_batches(be_killed, tmp_path))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-account")
    with pytest.raises(ServerError, match="has no batch batch_000001 of this job"):
        run_job(tmp_path, server.base_url)
    assert asked(server, "GET", "batches/batch_000001") == 3
    assert server.batches() == []
    assert not any(b"sk-of-another" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_a_new_key_of_the_same_account_shows_that_a_batch_is_gone(
    openai_server: Start, be_killed, tmp_path, expected, monkeypatch
):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = openai_server()
    be_killed(tmp_path, server, die_before="collected")
    with Journal.open(tmp_path / "journal.sqlite") as journal:
        journal.execute("UPDATE batch_shards SET batch_id = 'batch_gone', try = 9 WHERE batch_id = 'batch_000002'")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-new")
    assert run_job(tmp_path, server.base_url) == expected
    with Journal.open(tmp_path / "journal.sqlite") as journal:
        assert [shard.batch_id for shard in Ledger(journal).shards("gone")] == ["batch_gone"]


def test_batches_are_not_gone_at_a_server_that_lists_none(be_killed, tmp_path, openai_server: Start):
    server = openai_server()
    be_killed(tmp_path, server, die_before="collected")
    with pytest.raises(ServerError, match="HTTP 404: Invalid URL"):
        run_job(tmp_path, f"{server.root}/v2")
    assert len(server.batches()) == 2


def test_a_wait_longer_than_the_system_knows_ends_with_a_signal():
    with Stop() as stop:
        timer = Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(Stopped):
            stop.sleep(1e300)
        timer.join()


def test_a_model_that_is_to_be_shut_down_is_warned_of(openai_server: Start, tmp_path, capsys):
    day = datetime.now(UTC).date() + timedelta(days=30)
    server = openai_server(shutdown_date=day.isoformat())
    run_job(tmp_path, server.base_url)
    warning = f"batches: warning: gpt-4o is to be shut down on {day}: name another model by then"
    assert capsys.readouterr().err.count(warning) == 1


def test_a_model_that_stays_for_long_is_not_warned_of(openai_server: Start, tmp_path, capsys):
    server = openai_server(shutdown_date=(datetime.now(UTC).date() + timedelta(days=100)).isoformat())
    run_job(tmp_path, server.base_url)
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("line", ["{", "[]", '{"custom_id": "a", "error": null}\n7', '{"response": {}}'])
def test_a_damaged_line_is_no_answer(tmp_path, line):
    (tmp_path / "output.jsonl").write_text(line, encoding="utf-8")
    with pytest.raises(DamagedFileError):
        list(read_answers(tmp_path / "output.jsonl"))


def failed(http_status: int, code: str) -> Attempt:
    body = json.dumps({"error": {"message": f"because of {code}", "code": code}})
    return Attempt("1" * 64, "failed", http_status, body, Usage(), None, "gpt-4o", "batch", 0.0, 1.0)


def test_the_gravest_objection_is_kept():
    gain = Gain()
    for attempt in (failed(400, "bad_body"), failed(429, "insufficient_quota"), failed(500, "tired")):
        gain.count(attempt)
    assert gain.objection is not None
    assert "insufficient_quota" in gain.objection.text


def test_a_job_may_run_beside_the_main_thread(openai_server: Start, start, tmp_path, expected):
    server, found = openai_server(), []
    thread = Thread(target=lambda: found.append(run_job(tmp_path, server.base_url)))
    thread.start()
    thread.join()
    assert found == [expected]
