import asyncio
import json
import socket
import sqlite3
from pathlib import Path

import pytest
from llm_calls import DRIBBLE, call, completion, error, run, scripted_server, steps, totals, users

from personas_tune.errors import ServerError
from personas_tune.llm.calls import EMBEDDINGS, Call, Request
from personas_tune.llm.client import Client
from personas_tune.llm.failures import Reply
from personas_tune.llm.journal import Journal
from personas_tune.llm.parts import find_parts
from personas_tune.llm.settings import ServerSettings, access_to
from personas_tune.llm.shutdown import shutdown_date_in

KEY = "sk-canary-0123456789"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.sqlite"


def responses(path: Path) -> list[tuple[str, int | None, str]]:
    with Journal.open(path) as journal:
        return journal.execute("SELECT status, http_status, response FROM attempts ORDER BY id")


def test_what_is_sent_is_the_requests_body_and_nothing_else(path):
    sampling = {"temperature": 0.5, "top_k": 7, "seed": None, "response_format": {"type": "json_object"}}
    request = call("ä", **sampling).request
    with scripted_server((200, {}, completion())) as server:
        run(path, server.base_url, [("u", steps(call("ä", **sampling)))])
        assert server.calls == [request.body]
        assert [sent_to for sent_to, _, _ in server.sent] == ["/v1/models/gpt-4o", "/v1/chat/completions"]


@pytest.mark.parametrize("encoding", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}])
def test_embeddings_are_asked_for_in_the_encoding_that_the_body_names(path, encoding):
    body = {"model": "ada", "input": ["a", "b"], "dimensions": 8, **encoding}
    asked = Call(Request(EMBEDDINGS, body, "v1"), json.loads, 0, parts=("p", "q"))
    content = b'{"data": [1, 2], "usage": {"prompt_tokens": 2, "total_tokens": 2}}'
    with scripted_server((200, {}, content)) as server:
        run(path, server.base_url, [("u", steps(asked))])
        assert server.calls == [{"encoding_format": "float", **body}]
    with Journal.open(path) as journal:
        assert list(find_parts(journal, ["p", "q"])) == [(content.decode(), {"p": 0, "q": 1})]


def test_the_raw_body_is_kept_byte_by_byte(path):
    content = b'\n {"choices" :[{"message":{"content":"{\\"reply\\": \\"\xc3\xa4\\u00e4\\"}"}}] }  \n'
    with scripted_server((200, {"x-request-id": "req_7"}, content)) as server:
        run(path, server.base_url, users(1))
    with Journal.open(path) as journal:
        rows = journal.execute("SELECT response, request_id, model, via FROM attempts")
    assert rows == [(content.decode(), "req_7", "gpt-4o", "online")]


def test_no_key_no_authorization(path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with scripted_server((200, {}, completion())) as server:
        run(path, server.base_url, users(1))
        assert all("authorization" not in headers for _, headers, _ in server.sent)


def test_the_key_is_sent_with_every_request(path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with scripted_server((200, {}, completion())) as server:
        run(path, server.base_url, users(2))
        assert [headers["authorization"] for _, headers, _ in server.sent] == [f"Bearer {KEY}"] * 3


def test_name_and_password_in_the_address_take_the_keys_place(path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with scripted_server((200, {}, completion())) as server:
        run(path, server.base_url.replace("http://", "http://me:password@"), users(1))
        assert {headers["authorization"] for _, headers, _ in server.sent} == {"Basic bWU6cGFzc3dvcmQ="}


def test_a_key_that_is_echoed_goes_nowhere(path, monkeypatch, capfd):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    echoes = [
        (200, {"x-request-id": f"for-{KEY}"}, completion(f"You sent {KEY}.")),
        error(500, f"Upstream refused {KEY}.", retry_after="0"),
        (502, {"retry-after": "0"}, f"<html>Authorization: Bearer {KEY}</html>".encode()),
        error(400, f"Bad {KEY}."),
    ]
    with scripted_server(*echoes) as server:
        incomplete = run(path, server.base_url, users(1))
        server.answers = [error(401, f"Incorrect API key provided: {KEY}.")]
        with pytest.raises(ServerError) as told:
            run(path, server.base_url, users(2))
    assert incomplete == {"u0": "HTTP 400: Bad [key]."}
    assert told.value.what == "HTTP 401: Incorrect API key provided: [key]."
    assert told.value.__cause__ is None
    assert told.value.__context__ is None
    kept = b"".join(file.read_bytes() for file in path.parent.iterdir())
    assert kept.count(b"[key]") >= 6
    output = "".join(capfd.readouterr())
    assert "Upstream refused [key]." in output
    assert KEY.encode() not in kept
    assert KEY not in output


def test_an_answer_that_dribbles_is_given_up_in_time(path):
    with scripted_server((200, {}, DRIBBLE), (200, {}, completion())) as server:
        assert run(path, server.base_url, users(1), timeout_s=0.3) == {}
    assert [row[:2] for row in responses(path)] == [("lost", None), ("answered", 200)]
    assert responses(path)[0][2] == "no whole answer within 0.3 s"


def test_a_call_whose_answers_are_all_lost_is_given_up_before_it_is_billed_often(path):
    with scripted_server((200, {}, completion())) as server:
        half = (200, {"Content-Length": "900", "Connection": "close"}, b"{")
        server.answer = lambda body: half if "user 1 " in str(body) else (200, {}, completion())
        incomplete = run(path, server.base_url, users(8, n_steps=3), concurrency=2, max_retries=20)
    assert incomplete.keys() == {"u1"}
    assert incomplete["u1"].startswith("no answer in 5 attempts, the last: the connection broke")
    assert totals(path)["lost"].n == 5


@pytest.mark.parametrize("fault", ["reset", "half_body"])
def test_an_answer_that_breaks_off_is_lost_and_asked_for_again(path, openai_server, fault):
    server = openai_server(plan=[fault])
    assert run(path, server.base_url, users(1)) == {}
    assert [row[:2] for row in responses(path)] == [("lost", None), ("answered", 200)]
    assert responses(path)[0][2].startswith("the connection broke")
    assert server.counts()["billed"] == {fault: 1, "ok": 1}


def test_a_server_that_is_not_there_costs_nothing(path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    base_url = f"http://127.0.0.1:{port}/v1"
    with pytest.raises(ServerError) as told:
        run(path, base_url, users(9), max_retries=1)
    words = f"{base_url}, model gpt-4o: no answer in 2 attempts, the last: no connection ("
    assert str(told.value).startswith(words)
    assert totals(path).keys() == {"failed"}


def test_an_error_without_a_whole_body_is_tried_again(path):
    half = (500, {"Content-Length": "900", "Connection": "close"}, b"{")
    with scripted_server(half, (200, {}, completion())) as server:
        assert run(path, server.base_url, users(1)) == {}
    assert [row[0] for row in responses(path)] == ["lost", "answered"]


def ask(base_url: str, *, timeout_s: float = 5.0) -> Reply:
    async def work() -> Reply:
        settings = ServerSettings("gpt-4o", base_url=base_url, timeout_s=timeout_s)
        client = Client(settings, access_to(settings, {}))
        try:
            return await client.look_at_model("gpt-4o")
        finally:
            await client.close()

    return asyncio.run(work())


def test_the_day_on_which_a_model_goes_is_read_in_any_form(openai_server):
    server = openai_server(shutdown_date="2027-01-14")
    assert str(shutdown_date_in(ask(server.base_url).text)) == "2027-01-14"
    forms = [("2027-01-14T10:00:00Z", "2027-01-14"), (1_800_000_000, "2027-01-15"), ("soon", "None"), (None, "None")]
    for told, day in forms:
        server.set(shutdown_date=told)
        assert str(shutdown_date_in(ask(server.base_url).text)) == day


def test_the_journal_is_written_before_the_answer_is_read(path):
    seen: list[int] = []

    def read(body: str) -> str:
        with sqlite3.connect(path) as connection:
            seen.extend(connection.execute("SELECT count(*) FROM attempts WHERE response = ?", (body,)).fetchone())
        connection.close()
        return body

    asked = Call(call("x").request, read, 5)
    with scripted_server((200, {}, completion())) as server:
        run(path, server.base_url, [("u", steps(asked))])
    assert seen == [1]
