import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import llm_calls
import pytest
from llm_calls import completion, error, run, scripted_server, totals, users

from personas_tune.errors import ServerError
from personas_tune.llm.journal import Journal
from personas_tune.llm.replay import finished_chains

KEY = "sk-canary-0123456789"
OK = (200, {}, completion())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.sqlite"


def start(path: Path, base_url: str, n_users: int, **bounds: object) -> "subprocess.Popen[str]":
    """Run the job of ``llm_calls.py`` in a process of its own; it prints the requests that were answered."""
    job = {"journal": str(path), "base_url": base_url, "n_users": n_users, "bounds": {"concurrency": 8, **bounds}}
    command = [sys.executable, llm_calls.__file__, json.dumps(job)]
    environment = {**os.environ, "OPENAI_API_KEY": KEY}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def wait_until(is_so: Callable[[], bool]) -> None:
    for _ in range(3000):
        if is_so():
            return
        time.sleep(0.01)
    raise AssertionError("it never was")


def n_calls(server) -> int:
    return sum(request["method"] == "POST" for request in server.requests())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_lets_all_that_was_sent_come_back(path, openai_server, number):
    server = openai_server(latency_s=0.4)
    process = start(path, server.base_url, n_users=40)
    wait_until(lambda: n_calls(server) >= 12)
    process.send_signal(number)
    output, errors = process.communicate()
    assert process.returncode == 128 + number
    n_sent = n_calls(server)
    assert 12 <= n_sent < 40
    assert totals(path)["answered"].n == n_sent == len(output.split())
    notice, last = errors.splitlines()
    assert re.fullmatch(r"distill: waiting for \d calls in flight; a second signal stops at once", notice)
    assert last == (
        f"error: interrupted: {n_sent} calls done, their answers are in {path}; run the same command to go on"
    )
    server.set(latency_s=0.0)
    assert run(path, server.base_url, users(40)) == {}
    assert server.counts()["billed"] == {"ok": 40}  # none was billed twice


def test_a_signal_wakes_those_who_wait_for_the_server(path, openai_server):
    server = openai_server(faults={"rate_limited": 1.0}, retry_after_s=10_000.0)
    process = start(path, server.base_url, n_users=40)
    assert process.stderr is not None
    assert process.stderr.readline() == "distill: the server asks for a pause of 10000 s\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143


def test_the_second_signal_stops_at_once_and_what_was_sent_counts_as_lost(path, openai_server):
    server = openai_server(latency_s=1000.0)
    process = start(path, server.base_url, n_users=40)
    wait_until(lambda: n_calls(server) == 8)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    assert process.stderr.readline().startswith("distill: waiting for 8 calls in flight")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    found = totals(path)
    assert found.keys() == {"lost"}
    assert found["lost"].n == 8
    assert found["lost"].usage.tokens > 8 * 10


def test_the_first_signal_after_an_error_lets_all_that_was_sent_come_back(path):
    with scripted_server(error(401, "Bad key."), OK) as server:
        server.latency_s = 1.0
        process = start(path, server.base_url, n_users=40)
        assert process.stderr is not None
        notice = process.stderr.readline()
        process.send_signal(signal.SIGINT)
        _, last = process.communicate(timeout=60)
    assert re.fullmatch(r"distill: waiting for 7 calls in flight; a second signal stops at once\n", notice)
    assert process.returncode == 2
    assert "HTTP 401: Bad key." in last
    assert {status: total.n for status, total in totals(path).items()} == {"failed": 1, "answered": 7}


def test_kill_9_loses_no_answer_and_bills_again_what_was_in_flight_at_most(path, openai_server):
    server = openai_server(latency_s=0.05)
    promised: set[str] = set()
    for n_answers in (1, 7, 20):
        process = start(path, server.base_url, n_users=60)
        assert process.stdout is not None
        promised.update(process.stdout.readline().strip() for _ in range(n_answers))
        process.kill()
        rest, _ = process.communicate()
        promised.update(rest.split())
    server.set(latency_s=0.0)
    assert run(path, server.base_url, users(60)) == {}
    with Journal.open(path) as journal:
        assert len(list(finished_chains(users(60), journal))) == 60
        assert all(journal.answers(request) for request in promised)
    n_billed = server.counts()["billed"]["ok"]
    assert 60 <= n_billed <= 60 + 3 * 8


def test_the_key_is_nowhere_after_a_run_that_was_refused_and_one_that_was_interrupted(path, openai_server):
    refusing = openai_server(api_key="sk-another")
    process = start(path, refusing.base_url, n_users=3)
    output = "".join(process.communicate())
    assert process.returncode == 2
    assert "HTTP 401: Incorrect API key provided: [key].; export OPENAI_API_KEY=" in output
    server = openai_server(latency_s=1000.0)
    process = start(path, server.base_url.replace("//", "//me:password-canary@"), n_users=3)
    wait_until(lambda: n_calls(server) == 3)
    process.send_signal(signal.SIGTERM)
    assert process.stderr is not None
    output += process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    output += "".join(process.communicate())
    kept = b"".join(file.read_bytes() for file in path.parent.iterdir())
    for secret in (KEY, "password-canary"):
        assert secret not in output
        assert secret.encode() not in kept


def test_signal_handlers_are_as_before_after_any_run(path):
    def mine(number: int, frame: FrameType | None) -> None: ...

    before = signal.signal(signal.SIGTERM, mine)
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        with scripted_server(OK) as server:
            run(path, server.base_url, users(1))
            assert signal.getsignal(signal.SIGTERM) is mine
            server.answers = [(404, {}, b"{}")]
            with pytest.raises(ServerError):
                run(path, server.base_url, users(2))
        assert signal.getsignal(signal.SIGTERM) is mine
        assert signal.getsignal(signal.SIGINT) is interrupt
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_ignored_signal_stays_ignored(path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with scripted_server(OK) as server:
            server.latency_s = 0.3
            threading.Timer(0.15, os.kill, (os.getpid(), signal.SIGINT)).start()
            assert run(path, server.base_url, users(8)) == {}
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_run_needs_not_be_in_the_main_thread(path):
    outcome: list[dict[str, str]] = []
    with scripted_server(OK) as server:
        thread = threading.Thread(target=lambda: outcome.append(run(path, server.base_url, users(2))))
        thread.start()
        thread.join()
    assert outcome == [{}]
