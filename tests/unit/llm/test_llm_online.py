import io
import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from llm_calls import Chains, attempt, call, completion, error, run, scripted_server, steps, totals, users

from personas_tune.errors import JournalError, ServerError
from personas_tune.llm import sending
from personas_tune.llm.budget import Budget
from personas_tune.llm.calls import Call, Chain
from personas_tune.llm.journal import Journal
from personas_tune.llm.progress import Progress
from personas_tune.llm.replay import finished_chains

OK = (200, {}, completion())
BAD = (200, {}, completion("no JSON"))
AGAIN = {"retry_after_ms": "1"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.sqlite"


def texts(bodies: list[dict[str, list[dict[str, str]]]]) -> list[str]:
    return [body["messages"][1]["content"] for body in bodies]


def test_every_call_of_every_chain_is_answered_in_the_chains_order(path):
    with scripted_server(OK) as server:
        assert run(path, server.base_url, users(5, n_steps=4)) == {}
        asked = texts(server.calls)
    assert sorted(asked) == sorted(f"user {user} step {step}" for user in range(5) for step in range(4))
    for user in range(5):
        steps_asked = [text for text in asked if text.startswith(f"user {user}")]
        assert steps_asked == [f"user {user} step {n}" for n in range(4)]


def test_a_faulty_server_loses_no_answer(path, openai_server):
    faults = {"rate_limited": 0.1, "server_error": 0.07, "reset": 0.04, "half_body": 0.04, "truncated": 0.05}
    server = openai_server(faults=faults, retry_after_s=0.01, latency_s=0.005)
    assert run(path, server.base_url, users(15, n_steps=2), concurrency=16, max_tries=9) == {}
    counts, found = server.counts(), totals(path)
    assert set(counts["billed"]) == {"ok", "reset", "half_body", "truncated"}
    lost = counts["billed"]["reset"] + counts["billed"]["half_body"]
    assert (found["answered"].n, found["lost"].n) == (sum(counts["billed"].values()) - lost, lost)
    with Journal.open(path) as journal:
        assert len(list(finished_chains(users(15, n_steps=2), journal))) == 15


def test_tokens_are_the_servers_to_the_last(path, openai_server):
    server = openai_server()
    run(path, server.base_url, users(10, n_steps=2))
    usage, counts = totals(path)["answered"].usage, server.counts()
    assert (usage.input_tokens, usage.output_tokens) == (counts["input_tokens"], counts["output_tokens"])


def test_a_finished_job_asks_nothing_not_even_for_the_model(path, openai_server, monkeypatch):
    server = openai_server()
    run(path, server.base_url, users(6, n_steps=2))
    before = server.requests()
    assert run(path, server.base_url, users(6, n_steps=2)) == {}
    assert server.requests() == before
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert run(path, "https://api.openai.com/v1", users(6, n_steps=2)) == {}  # nor for a key


def test_a_new_user_costs_its_own_calls(path):
    with scripted_server(OK) as server:
        run(path, server.base_url, users(6, n_steps=2))
        run(path, server.base_url, users(7, n_steps=2))
        assert texts(server.calls)[12:] == ["user 6 step 0", "user 6 step 1"]


def test_users_with_the_same_call_pay_for_it_once(path):
    with scripted_server(OK) as server:
        same = [(f"u{n}", steps(call("the same"), call(f"user {n}"))) for n in range(8)]
        assert run(path, server.base_url, same, concurrency=8) == {}
        assert texts(server.calls).count("the same") == 1


# Answers that can't be used


def test_a_rejected_answer_is_asked_for_again_with_what_was_wrong(path):
    with scripted_server(BAD, OK) as server:
        assert run(path, server.base_url, users(1)) == {}
        first, second = server.calls
    assert second["messages"][:-1] == first["messages"]
    words = "Your last answer could not be used: it is no JSON with a reply. Answer again, in full, as asked above."
    assert second["messages"][-1] == {"role": "user", "content": words}


def test_a_user_whose_answers_are_all_rejected_is_named(path):
    with scripted_server(BAD) as server:
        assert run(path, server.base_url, users(2), max_tries=3) == {
            "u0": "3 answers rejected, the last: it is no JSON with a reply",
            "u1": "3 answers rejected, the last: it is no JSON with a reply",
        }
        assert len(server.calls) == 6


def test_rejected_answers_in_the_journal_lend_their_complaint_and_do_not_count(path):
    with scripted_server(BAD) as server:
        run(path, server.base_url, users(1), max_tries=2)
        assert run(path, server.base_url, users(1), max_tries=2)["u0"].startswith("4 answers rejected, the last: ")
        assert len(server.calls) == 4
        assert [len(body["messages"]) for body in server.calls] == [2, 3, 3, 3]
        server.answers = [OK]
        assert run(path, server.base_url, users(1), max_tries=2) == {}
    with Journal.open(path) as journal:
        assert len(journal.answers(call("user 0 step 0").request.sha256)) == 5


@pytest.mark.parametrize(("concurrency", "n_users_paid_for"), [(1, 3), (4, 4), (16, 10)])
def test_settings_that_spoil_every_answer_are_not_paid_for_by_every_user(path, concurrency, n_users_paid_for):
    with scripted_server(BAD) as server:
        with pytest.raises(ServerError) as told:
            run(path, server.base_url, users(200), max_tries=2, concurrency=concurrency)
        assert 2 * n_users_paid_for <= len(server.calls) <= 2 * (n_users_paid_for + concurrency)
        assert str(told.value) == (
            f"{server.base_url}, model gpt-4o: no answer can be used, the last rejection: it is no JSON with a reply; "
            "check the model, max_output_tokens and response_format"
        )


def test_one_usable_answer_shows_that_the_settings_are_not_to_blame(path):
    with scripted_server(OK, BAD) as server:
        assert len(run(path, server.base_url, users(20), max_tries=1, concurrency=1)) == 19
        again = run(path, server.base_url, users(20), max_tries=1)  # the usable one is in the journal now
        assert len(again) == 19


# Errors


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (error(401, "Bad key."), "HTTP 401: Bad key.; export OPENAI_API_KEY=... with a key that this server takes"),
        (error(403, "Not you."), "HTTP 403: Not you.; ask for access, or name another model"),
        (error(404, "No such model."), "HTTP 404: No such model.; check model and base_url"),
        (
            error(429, "Quota.", "insufficient_quota"),
            "HTTP 429: Quota.; see to the account's plan and billing, then run the same command to go on",
        ),
    ],
)
def test_what_no_call_gets_past_stops_the_run_in_the_servers_words(path, answer, words):
    with scripted_server(answer) as server:
        with pytest.raises(ServerError) as told:
            run(path, server.base_url, users(50), concurrency=2)
        assert len(server.calls) <= 2
        assert str(told.value) == f"{server.base_url}, model gpt-4o: {words}"
    assert totals(path)["failed"].n <= 2


def test_a_wrong_key_is_found_out_before_the_first_call(path, openai_server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-somebody-else")
    server = openai_server(api_key="sk-the-right-one")
    with pytest.raises(ServerError, match=r"HTTP 401: Incorrect API key provided: \[key\]"):
        run(path, server.base_url, users(3))
    assert len(server.requests()) == 1


def test_openai_without_a_key_is_an_error_before_anything_is_sent(path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ServerError, match=r"https://api.openai.com: no key; export OPENAI_API_KEY=\.\.\."):
        run(path, "https://api.openai.com/v1", users(3))
    assert totals(path) == {}


@pytest.mark.parametrize("status", [400, 413, 422])
@pytest.mark.parametrize("n_users", [1, 40])
def test_a_setting_that_suits_no_call_stops_the_run(path, status, n_users):
    with scripted_server(error(status, "Unknown parameter: 'seeed'.")) as server:
        with pytest.raises(ServerError, match=f"HTTP {status}: Unknown parameter: 'seeed'.; check model, sampling and"):
            run(path, server.base_url, users(n_users), concurrency=4)
        assert len(server.calls) <= 4


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_request_that_alone_is_refused_leaves_its_user_incomplete(path, concurrency):
    script = [error(400, "Too long."), OK]
    with scripted_server(*script) as server:
        incomplete = run(path, server.base_url, users(6), concurrency=concurrency)
        assert list(incomplete.values()) == ["HTTP 400: Too long."]
        assert len(server.calls) == 6
        server.answers = [error(400, "Still too long.")]
        again = run(path, server.base_url, users(6), concurrency=concurrency)
        assert again == dict.fromkeys(incomplete, "HTTP 400: Still too long.")
        assert len(server.calls) == 7


def test_a_content_filter_is_always_the_users(path):
    with scripted_server(error(400, "Filtered.", "content_filter")) as server:
        assert run(path, server.base_url, users(5)) == {f"u{n}": "HTTP 400: Filtered." for n in range(5)}


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
def test_what_may_pass_is_tried_again(path, status):
    with scripted_server(*[error(status, **AGAIN)] * 3, OK) as server:
        assert run(path, server.base_url, users(1), max_retries=3) == {}
    assert {status: total.n for status, total in totals(path).items()} == {"failed": 3, "answered": 1}


def test_retries_without_retry_after_back_off_and_succeed(path):
    with scripted_server(error(500), error(429), OK) as server:
        assert run(path, server.base_url, users(1), max_retries=2) == {}
        assert len(server.calls) == 3


def test_a_pause_of_no_time_is_none(path, monkeypatch):
    n_drawn = 0

    def drawn(tries: int, draw: random.Random) -> float:
        nonlocal n_drawn
        n_drawn += 1
        return 0.0

    monkeypatch.setattr(sending, "backoff_s", drawn)
    with scripted_server(error(429, retry_after="0"), error(503, retry_after_ms="1"), OK) as server:
        assert run(path, server.base_url, users(1), max_retries=2) == {}
    assert n_drawn == 1


def test_a_key_that_may_not_look_at_models_may_chat(path, openai_server):
    with scripted_server(OK) as server:
        server.model_status = 403
        assert run(path, server.base_url, users(2)) == {}
        assert server.sent[0][0] == "/v1/models/gpt-4o"


def test_a_call_that_never_succeeds_while_others_do_leaves_its_user_incomplete(path):
    with scripted_server(OK) as server:
        server.answer = lambda body: error(500, "Oh.", **AGAIN) if "user 2 " in str(body) else OK
        incomplete = run(path, server.base_url, users(20, n_steps=3), max_retries=2)
        assert incomplete == {"u2": "no answer in 3 attempts, the last: HTTP 500: Oh."}
        assert sum("user 2 " in text for text in texts(server.calls)) == 3


def test_a_server_that_is_down_stops_the_run(path):
    with scripted_server(OK, OK, error(503, "Overloaded.", **AGAIN)) as server:
        with pytest.raises(ServerError, match=r"no answer in 3 attempts, the last: HTTP 503: Overloaded.; see whether"):
            run(path, server.base_url, users(1000), max_retries=2)
        assert len(server.calls) < 30
    assert totals(path)["answered"].n == 2


# Limits


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (429, {"retry-after-ms": "700"}),
        (503, {"retry-after": "0.7"}),
        (200, {"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "700ms"}),
    ],
)
def test_a_pause_is_for_all_workers(path, status, headers):
    with scripted_server((status, headers, completion()), OK) as server:
        server.latency_s = 0.4
        assert run(path, server.base_url, users(5 + (status == 200)), concurrency=4) == {}
        # Three were on their way when the pause was asked for; nobody went out when they were back.
        assert server.n_answered_before[4:] == [4, 4]


def test_limits_of_the_server_are_kept(path, openai_server):
    server = openai_server(requests_per_minute=1200, burst_s=1.0)
    assert run(path, server.base_url, users(30), concurrency=30, max_retries=20) == {}
    assert server.counts()["billed"] == {"ok": 30}
    assert server.counts()["requests"] < 75


def test_configured_limits_need_no_429(path, openai_server):
    server = openai_server(requests_per_minute=1800, burst_s=2.0)
    assert run(path, server.base_url, users(40), concurrency=40, requests_per_minute=1200) == {}
    assert totals(path).keys() == {"answered"}


# Chains


def test_chains_are_pulled_as_there_is_room(path):
    n_open = most_open = 0

    def counted() -> Chains:
        nonlocal n_open, most_open
        for name, chain in users(300):
            n_open += 1
            most_open = max(most_open, n_open)
            yield name, closing(chain)

    def closing(chain: Chain[object]) -> Chain[object]:
        nonlocal n_open
        try:
            yield from chain
        finally:
            n_open -= 1

    with Journal.open(path) as journal:
        journal.record_all(
            attempt(call(f"user {n} step 0").request.sha256, completion().decode()) for n in range(0, 300, 2)
        )
        with scripted_server(OK) as server:
            assert run(journal, server.base_url, counted(), concurrency=5) == {}
    assert n_open == 0
    assert 1 <= most_open <= 5


def test_whatever_ends_the_run_closes_the_chains(path):
    closed: list[str] = []

    def source() -> Chains:
        try:
            for name, chain in users(100):
                yield name, noting(name, chain)
        finally:
            closed.append("all")

    def noting(name: str, chain: Chain[object]) -> Chain[object]:
        try:
            yield from chain
        finally:
            closed.append(name)

    with scripted_server(error(404)) as server, pytest.raises(ServerError):
        run(path, server.base_url, source(), concurrency=3)
    assert sorted(closed) == ["all", "u0", "u1", "u2"]


def test_incomplete_users_are_named_in_their_order(path):
    with scripted_server(OK, BAD) as server:
        run(path, server.base_url, users(1))
        incomplete = run(path, server.base_url, users(30), max_tries=1, concurrency=16)
    assert list(incomplete) == [f"u{n}" for n in range(1, 30)]


def test_a_mistake_of_ours_is_no_users_and_loses_no_answer(path):
    def read(body: str) -> str:
        raise ZeroDivisionError

    with scripted_server(OK) as server, pytest.raises(ZeroDivisionError):
        run(path, server.base_url, [("u", steps(Call(call("x").request, read, 5))), *users(20)])
    with Journal.open(path) as journal:
        assert journal.answers(call("x").request.sha256) == [completion().decode()]
        assert len(server.calls) == sum(total.n for total in journal.totals("gpt-4o"))


def test_a_mistake_in_the_source_of_chains_comes_out(path):
    def source() -> Iterator[tuple[str, Chain[object]]]:
        yield from users(2)
        raise JournalError("a row is damaged")

    with scripted_server(OK) as server, pytest.raises(JournalError, match="a row is damaged"):
        run(path, server.base_url, source())


def test_no_chain_no_call(path):
    with scripted_server(OK) as server:
        assert run(path, server.base_url, []) == {}
        assert run(path, server.base_url, [("u", steps())]) == {}
        assert server.sent == []


# What is told


@pytest.mark.parametrize(("days", "is_told"), [(30, True), (-3, True), (400, False)])
def test_a_model_that_is_about_to_go_is_warned_about_once(path, openai_server, capfd, days, is_told):
    day = (datetime.now(UTC) + timedelta(days=days)).date().isoformat()
    server = openai_server(shutdown_date=day)
    run(path, server.base_url, users(9))
    warning = f"distill: warning: gpt-4o is to be shut down on {day}: name another model by then\n"
    assert capfd.readouterr().err == (warning if is_told else "")


def test_troubles_are_told_once_a_minute(path, capfd):
    with scripted_server(*[error(500, "Oh.", **AGAIN)] * 5, OK) as server:
        run(path, server.base_url, users(3))
    assert capfd.readouterr().err == "distill: HTTP 500: Oh.; trying again\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_shows_calls_and_money():
    terminal = Terminal()
    with Progress("distill", 4, Budget(max_tokens=100), terminal) as progress:
        for _ in range(3):
            progress.call_done()
        progress.note("a word")
    last = terminal.getvalue().rstrip().split("\r")[-1]
    assert last.startswith("distill:  75%")
    assert "3/4" in last
    assert last.endswith("0 tokens, 100 left]")
    assert "distill: a word\n" in terminal.getvalue()
    assert progress.share == "3 of 4 calls"


def test_without_a_terminal_no_bar_is_drawn():
    log = io.StringIO()
    with Progress("distill", None, Budget(), log) as progress:
        progress.call_done()
        assert log.getvalue() == ""
        progress._next = 0.0  # a minute later
        progress.call_done()
    assert log.getvalue() == "distill: 2 calls done, 0 tokens\n"


def test_a_line_tells_the_time_left_at_the_pace_since_the_last():
    log = io.StringIO()
    with Progress("distill", 12, Budget(), log) as progress:
        progress.call_done()
        progress._begun -= 600.0
        progress._next = 0.0
        progress.call_done()
        progress._begun -= 60.0
        progress._next = 0.0
        progress.call_done()
    assert log.getvalue() == (
        "distill: 2 of 12 calls done, 50:00 to go, 0 tokens\ndistill: 3 of 12 calls done, 09:00 to go, 0 tokens\n"
    )


def test_calls_that_nobody_foresaw_are_calls_to_do():
    terminal = Terminal()
    with Progress("distill", 2, Budget(), terminal) as progress:
        for _ in range(3):
            progress.call_done()
    assert progress.share == "3 of 3 calls"
    assert "3/3" in terminal.getvalue().rstrip().split("\r")[-1]
