"""The loopback server itself: what every other test of the client stands on."""

import http.client
import io
import json
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from openai_server import Server, start_server

Start = Callable[..., Server]
TESTS = Path(__file__).parents[2]


def prompt(*lines: str, profile: str = "(nothing yet)") -> str:
    rated = "\n".join(f"{number}. {line} of 5" for number, line in enumerate(lines, 1))
    return f"MY PROFILE SO FAR\n{profile}\n\nWHAT I RATED NEXT, OLDEST FIRST\n{rated}"


HEAT = "Heat (1995) | genres: Action, Crime | others give it 3.9 | about: A heist. | with: A, B | MY RATING: 5"
BIG = "Big (1988) | genres: Comedy | others give it 3.5 | MY RATING: 2"


def chat_body(text: str = prompt(HEAT, BIG), *complaints: str) -> dict[str, Any]:
    texts = [("system", "Answer in JSON."), ("user", text), *(("user", words) for words in complaints)]
    return {"model": "gpt-4o", "messages": [{"role": role, "content": content} for role, content in texts]}


def post(server: Server, body: Any, path: str = "/chat/completions") -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    try:
        connection.request("POST", f"/v1{path}", json.dumps(body))
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def answer_to(server: Server, *lines: str, profile: str = "(nothing yet)") -> dict[str, Any]:
    return content_of(post(server, chat_body(prompt(*lines, profile=profile)))[2])


def content_of(body: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.loads(body)["choices"][0]["message"]["content"])
    return found


def client(server: Server, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.base_url, api_key="any", max_retries=0, **options)


def what_was_billed(server: Server) -> list[str]:
    return [entry["what"] for entry in server.billed()]


# What it answers.


def test_an_answer_has_a_reason_per_item_and_a_profile_that_knows_the_tastes(openai_server: Start) -> None:
    answer = answer_to(openai_server(), HEAT, BIG)
    assert [memory["item"] for memory in answer["memories"]] == [1, 2]
    assert "more to me than to most" in answer["memories"][0]["reason"]
    assert "I love Action" in answer["profile"]
    assert "I dislike Comedy" in answer["profile"]
    assert "So far: all 2 at 3.50, above others 2 at -0.20, Action 1 at 5.00" in answer["profile"]


def test_a_profile_goes_on_from_the_one_before(openai_server: Start) -> None:
    server = openai_server()
    first = answer_to(server, HEAT, BIG)
    second = answer_to(
        server, HEAT.replace("Heat", "Ronin"), BIG.replace("RATING: 2", "RATING: 1"), profile=first["profile"]
    )
    assert "all 4 at 3.25" in second["profile"]
    assert "Comedy 2 at 1.50" in second["profile"]
    assert "favourites: Heat (1995); Ronin (1995)." in second["profile"]


@pytest.mark.parametrize("n_words", [12, 20, 40, 60])
def test_a_consolidation_keeps_to_its_words_and_to_its_opinions(openai_server: Start, n_words: int) -> None:
    server = openai_server()
    lines = [HEAT, BIG, *(HEAT.replace("Crime", f"Kind{number}") for number in range(8))]
    profile = answer_to(server, *lines)["profile"]
    text = f"MY PROFILE\n{profile}\n\nSHORTEN IT TO AT MOST {n_words} WORDS"
    shorter = content_of(post(server, chat_body(text))[2])["profile"]
    assert len(profile.split()) > 60
    assert 6 < len(shorter.split()) <= n_words
    assert "all 10 at" in shorter


def test_the_answer_depends_on_the_prompt_alone(openai_server: Start) -> None:
    server = openai_server()
    bodies = [chat_body(), chat_body(prompt(HEAT, BIG), "item 2 was missing"), {**chat_body(), "temperature": 1.0}]
    assert len({json.dumps(content_of(post(server, body)[2])) for body in bodies}) == 1
    asked_again, complained_about, hotter = server.billed()
    assert asked_again["request"] == complained_about["request"] != hotter["request"]
    assert asked_again["body"] != complained_about["body"]


def test_profiles_of_one_taste_have_similar_embeddings(openai_server: Start) -> None:
    server = openai_server()
    rated = [
        [
            f"Film {user}{number} | genres: {genre} | MY RATING: {5 if genre == loved else 2}"
            for number, genre in enumerate(3 * ("War", "Noir"))
        ]
        for user, loved in enumerate(("War", "War", "Noir", "Noir"))
    ]
    profiles = [answer_to(server, *lines)["profile"] for lines in rated]
    with client(server) as sdk:
        vectors = np.array([row.embedding for row in sdk.embeddings.create(model="gpt-4o", input=profiles).data])
    alike = vectors @ vectors.T
    assert min(alike[0, 1], alike[2, 3]) > max(alike[0, 2], alike[0, 3], alike[1, 2], alike[1, 3])


def test_usage_in_the_answer_is_what_is_billed(openai_server: Start) -> None:
    server = openai_server()
    body = chat_body()
    body["messages"][0]["content"] = "x" * 2048
    usages = [json.loads(post(server, body)[2])["usage"] for _ in range(2)]
    assert [entry["usage"] for entry in server.billed()] == usages
    assert [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages] == [0, 512]


def test_embeddings_in_base64_and_as_numbers_are_the_same_unit_vectors(openai_server: Start) -> None:
    server, texts = openai_server(), ["I love Drama.", "I dislike Horror.", "!"]
    with client(server) as sdk:
        packed = sdk.embeddings.create(model="gpt-4o", input=texts)  # the SDK asks for base64
        listed = sdk.embeddings.create(model="gpt-4o", input=texts, encoding_format="float", dimensions=64)
        short = sdk.embeddings.create(model="gpt-4o", input="alone", dimensions=8)
    vectors = np.array([row.embedding for row in packed.data])
    np.testing.assert_allclose(vectors, [row.embedding for row in listed.data], atol=1e-7)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-6)
    assert len(short.data[0].embedding) == 8


@pytest.mark.parametrize("inputs", [[], ["good", ""], ["many"] * 2049])
def test_embeddings_of_nothing_or_of_too_much_are_refused(openai_server: Start, inputs: list[str]) -> None:
    status, _, body = post(openai_server(), {"model": "gpt-4o", "input": inputs}, "/embeddings")
    assert (status, json.loads(body)["error"]["type"]) == (400, "invalid_request_error")


def test_models_are_listed_with_the_date_of_their_end(openai_server: Start) -> None:
    with client(openai_server(models=["a", "b"], shutdown_date="2027-01-14")) as sdk:
        assert [model.id for model in sdk.models.list()] == ["a", "b"]
        assert sdk.models.retrieve("a").model_dump()["shutdown_date"] == "2027-01-14"
        with pytest.raises(openai.NotFoundError, match="`c` does not exist"):
            sdk.models.retrieve("c")
        with pytest.raises(openai.NotFoundError, match="`gpt-4o` does not exist"):
            sdk.chat.completions.create(**chat_body())


def test_a_key_that_is_asked_for_must_come(openai_server: Start) -> None:
    server = openai_server(api_key="sk-right")
    assert post(server, chat_body())[0] == 401
    with client(server) as sdk, pytest.raises(openai.AuthenticationError, match="Incorrect API key provided: any"):
        sdk.models.list()
    with client(server).with_options(api_key="sk-right") as sdk:
        sdk.models.list()
    assert [entry["has_key"] for entry in server.requests()] == [False, True, True]
    assert "sk-right" not in json.dumps(server.requests())


# Faults.


@pytest.mark.parametrize("fault", ["reset", "half_body"])
def test_a_broken_connection_is_billed_all_the_same(openai_server: Start, fault: str) -> None:
    server = openai_server(plan=[fault])
    error = ConnectionResetError if fault == "reset" else http.client.IncompleteRead
    with pytest.raises(error):
        post(server, chat_body())
    assert what_was_billed(server) == [fault]
    assert server.requests()[0]["outcome"] == fault
    assert post(server, chat_body())[0] == 200


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        ("rate_limited", 429, "rate_limit_exceeded"), ("quota", 429, "insufficient_quota"),
        ("server_error", 500, None), ("bad_request", 400, "bad_request"),
    ],
)  # fmt: skip
def test_an_error_is_free(openai_server: Start, fault: str, status: int, code: str | None) -> None:
    server = openai_server(plan=[fault], retry_after_s=0.25)
    found, headers, body = post(server, chat_body())
    assert (found, json.loads(body)["error"]["code"]) == (status, code)
    assert headers.get("retry-after-ms") == ("250" if fault == "rate_limited" else None)
    assert what_was_billed(server) == []


def test_answers_are_spoilt_each_in_its_way(openai_server: Start) -> None:
    faults = ["truncated", "not_json", "refusal", "wrong_json", "extra_keys", "too_long"]
    server = openai_server(plan=faults)
    answers = dict(zip(faults, (json.loads(post(server, chat_body())[2])["choices"][0] for _ in faults), strict=True))
    assert answers["truncated"]["finish_reason"] == "length"
    assert answers["truncated"]["message"]["content"].startswith('{"memories": [{"item": 1')
    for fault in ("truncated", "not_json"):
        with pytest.raises(json.JSONDecodeError):
            json.loads(answers[fault]["message"]["content"])
    assert answers["refusal"]["message"]["content"] is None
    assert "can't help" in answers["refusal"]["message"]["refusal"]
    spoilt = {fault: json.loads(answers[fault]["message"]["content"]) for fault in faults[3:]}
    assert [memory["item"] for memory in spoilt["wrong_json"]["memories"]] == [1]
    assert set(spoilt["extra_keys"]) == {"memories", "profile", "notes"}
    assert len(spoilt["too_long"]["profile"].split()) > 2000
    assert what_was_billed(server) == faults


def test_a_slow_answer_comes_late(openai_server: Start) -> None:
    server = openai_server(plan=["slow"], slow_s=0.5)
    with client(server, timeout=0.2) as sdk, pytest.raises(openai.APITimeoutError):
        sdk.chat.completions.create(**chat_body())
    assert what_was_billed(server) == ["slow"]


def test_chance_hits_the_same_calls_in_whichever_order_they_come() -> None:
    bodies = [chat_body(prompt(HEAT, f"Film {number} | MY RATING: 3")) for number in range(60)]
    faults = {"server_error": 0.2, "truncated": 0.2}
    fates = []
    for order, seed in ((bodies, 1), (bodies[::-1], 1), (bodies, 2)):
        with start_server(faults=faults, seed=seed) as server:
            for body in order:
                post(server, body)
            fates.append({entry["body"]: entry["what"] for entry in server.billed()})
    assert fates[0] == fates[1] != fates[2]
    counts = Counter(fates[0].values())
    assert 4 <= counts["truncated"] <= 22
    assert 4 <= 60 - sum(counts.values()) <= 22


def test_a_call_hit_once_is_not_hit_for_ever(openai_server: Start) -> None:
    server = openai_server(faults={"server_error": 0.5})
    statuses = {post(server, chat_body())[0] for _ in range(20)}
    assert statuses == {200, 500}


def test_options_change_while_it_runs(openai_server: Start) -> None:
    server = openai_server(faults={"server_error": 1.0})
    assert post(server, chat_body())[0] == 500
    server.set(faults={}, plan=["refusal"])
    post(server, chat_body())
    assert what_was_billed(server) == ["refusal"]


@pytest.mark.parametrize("options", [{"faults": {"rest": 0.1}}, {"plan": ["typo"]}, {"batch_faults": {"refusal": 1.0}}])
def test_a_fault_that_it_does_not_know_is_told(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no fault"), start_server(**options):
        pass


# Limits.


def test_a_limit_refuses_what_is_over_it_and_says_when_to_come_back(openai_server: Start) -> None:
    server = openai_server(requests_per_minute=60, burst_s=3)
    answers = [post(server, chat_body()) for _ in range(4)]
    assert [status for status, _, _ in answers] == [200, 200, 200, 429]
    assert [headers["x-ratelimit-remaining-requests"] for _, headers, _ in answers] == ["2", "1", "0", "0"]
    assert answers[0][1]["x-ratelimit-limit-requests"] == "60"
    assert 0 < int(answers[3][1]["retry-after-ms"]) <= 1000
    assert answers[3][1]["retry-after"] == "1"
    assert what_was_billed(server) == ["ok"] * 3


def test_a_limit_lets_through_again_after_the_time_it_told(openai_server: Start) -> None:
    server = openai_server(requests_per_minute=600, burst_s=0.1)
    assert post(server, chat_body())[0] == 200
    status, headers, _ = post(server, chat_body())
    assert status == 429
    time.sleep(int(headers["retry-after-ms"]) / 1000)
    assert post(server, chat_body())[0] == 200


def test_tokens_are_limited_too(openai_server: Start) -> None:
    server = openai_server(tokens_per_minute=600, burst_s=1)
    assert post(server, chat_body())[0] == 200
    status, _, body = post(server, chat_body())
    assert (status, json.loads(body)["error"]["type"]) == (429, "tokens")


# Batches.


def upload(sdk: openai.OpenAI, *lines: Any) -> str:
    content = "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    return sdk.files.create(file=("in.jsonl", io.BytesIO(content.encode())), purpose="batch").id


def line(custom_id: str, text: str = prompt(HEAT)) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": chat_body(text)}


def create(sdk: openai.OpenAI, file_id: str, **metadata: str) -> str:
    return sdk.batches.create(
        input_file_id=file_id, endpoint="/v1/chat/completions", completion_window="24h", metadata=metadata
    ).id


def records(sdk: openai.OpenAI, file_id: str | None) -> dict[str, Any]:
    assert file_id is not None
    return {entry["custom_id"]: entry for entry in map(json.loads, sdk.files.content(file_id).text.splitlines())}


def test_a_batch_answers_each_line_as_a_call_would_be(openai_server: Start) -> None:
    server = openai_server()
    with client(server) as sdk:
        batch_id = create(sdk, upload(sdk, line("a"), line("b", prompt(BIG))), wave="0")
        batch = sdk.batches.retrieve(batch_id)
        found = records(sdk, batch.output_file_id)
    assert (batch.status, batch.metadata, batch.error_file_id) == ("completed", {"wave": "0"}, None)
    assert batch.request_counts is not None
    assert (batch.request_counts.total, batch.request_counts.completed) == (2, 2)
    assert list(found) == ["b", "a"]  # no promise about the order
    body = found["a"]["response"]["body"]
    online = json.loads(post(server, chat_body(prompt(HEAT)))[2])
    assert body["choices"] == online["choices"]
    in_batch, *_, by_call = server.billed()
    assert (in_batch["batch"], by_call["batch"]) == (batch_id, None)
    assert in_batch["request"] == by_call["request"]


def test_a_batch_goes_through_its_states(openai_server: Start) -> None:
    server = openai_server(validating_s=0.15, in_progress_s=0.15, finalizing_s=0.15)
    seen: list[str] = []
    with client(server) as sdk:
        batch_id = create(sdk, upload(sdk, line("a")))
        while not seen or seen[-1] != "completed":
            status = sdk.batches.retrieve(batch_id).status
            seen += [status] if status not in seen else []
    assert seen == ["validating", "in_progress", "finalizing", "completed"]


def test_batches_and_files_are_listed_in_pages_newest_first(openai_server: Start) -> None:
    with client(openai_server()) as sdk:
        file_id = upload(sdk, line("a"))
        made = [create(sdk, file_id, number=str(number)) for number in range(5)]
        page = sdk.batches.list(limit=2)
        assert [batch.id for batch in page.data] == made[:2:-1]
        assert page.has_more
        assert [batch.id for batch in sdk.batches.list(limit=2)] == made[::-1]  # by its pages
        assert {file.purpose for file in sdk.files.list()} == {"batch", "batch_output"}
        assert [file.id for file in sdk.files.list(purpose="batch")] == [file_id]


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        (["{"], "invalid_json_line"),
        ([line("a"), line("a")], "duplicate_custom_id"),
        ([{**line("a"), "url": "/v1/embeddings"}], "invalid_request"),
        ([], "empty_file"),
    ],
)
def test_a_file_that_is_no_batch_fails_its_batch(openai_server: Start, lines: list[Any], code: str) -> None:
    server = openai_server()
    with client(server) as sdk:
        batch = sdk.batches.retrieve(create(sdk, upload(sdk, *lines)))
    assert batch.status == "failed"
    assert batch.errors is not None
    assert batch.errors.data is not None
    assert batch.errors.data[0].code == code
    assert what_was_billed(server) == []


def test_batches_over_the_enqueued_tokens_fail_until_others_are_done(openai_server: Start) -> None:
    with client(
        openai_server(enqueued_tokens=60, in_progress_s=0.3, batch_failures=["ok", "ok", "ok", "token_limit_exceeded"])
    ) as sdk:
        file_id = upload(sdk, line("a"))
        first, second = create(sdk, file_id), create(sdk, file_id)
        assert [sdk.batches.retrieve(name).status for name in (first, second)] == ["in_progress", "failed"]
        while sdk.batches.retrieve(first).status != "completed":
            time.sleep(0.02)
        assert sdk.batches.retrieve(create(sdk, file_id)).status == "in_progress"
        planned = sdk.batches.retrieve(create(sdk, file_id))
    assert planned.errors is not None
    assert planned.errors.data is not None
    assert planned.errors.data[0].code == "token_limit_exceeded"


def test_lines_that_fail_or_expire_stand_in_the_error_file(openai_server: Start) -> None:
    faults = {"expired": 0.3, "server_error": 0.3, "refusal": 0.2}
    server = openai_server(line_faults=faults)
    with client(server) as sdk:
        batch = sdk.batches.retrieve(create(sdk, upload(sdk, *(line(str(number)) for number in range(40)))))
        good, bad = records(sdk, batch.output_file_id), records(sdk, batch.error_file_id)
    assert batch.status == "expired"
    assert good.keys() | bad.keys() == {str(number) for number in range(40)}
    expired = [entry for entry in bad.values() if entry["response"] is None]
    assert {entry["error"]["code"] for entry in expired} == {"batch_expired"}
    assert 0 < len(expired) < len(bad)
    assert len(server.billed()) == len(good)
    assert set(what_was_billed(server)) == {"ok", "refusal"}


def test_a_batch_that_is_cancelled_bills_nothing(openai_server: Start) -> None:
    server = openai_server(in_progress_s=60)
    with client(server) as sdk:
        batch_id = create(sdk, upload(sdk, line("a")))
        assert sdk.batches.cancel(batch_id).status == "cancelled"
        server.set(in_progress_s=0)
        assert sdk.batches.retrieve(batch_id).status == "cancelled"
    assert what_was_billed(server) == []


def test_what_arrived_takes_place_though_its_answer_is_lost(openai_server: Start) -> None:
    server = openai_server(batch_plan=["reset", "ok", "half_body"])
    with client(server) as sdk:
        with pytest.raises(openai.APIConnectionError):
            upload(sdk, line("a"))
        file_id = next(iter(sdk.files.list())).id
        with pytest.raises(openai.APIConnectionError):
            create(sdk, file_id)
    assert len(server.batches()) == len(server.files()) - 1 == 1  # its output is a file, too


def test_what_arrived_takes_place_though_the_client_is_gone(openai_server: Start) -> None:
    server = openai_server(latency_s=0.1)
    with client(server) as sdk:
        file_id = upload(sdk, line("a"))
    server.set(before_commit_s=0.1)
    window = {"endpoint": "/v1/chat/completions", "completion_window": "24h", "input_file_id": file_id}
    for path, body in (("/v1/batches", window), ("/v1/chat/completions", chat_body())):
        content = json.dumps(body).encode()
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(
                b"POST %s HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % (path.encode(), len(content)) + content
            )
            while server.counts()["requests"] < (2 if path == "/v1/batches" else 3):
                time.sleep(0.01)
    while not server.batches():
        time.sleep(0.01)
    assert Counter(entry["batch"] is None for entry in server.billed()) == {True: 1, False: 1}


# HTTP.


def test_a_connection_is_kept_for_the_next_call(openai_server: Start) -> None:
    server = openai_server()
    with client(server) as sdk:
        for _ in range(5):
            sdk.models.list()
    assert server.counts()["connections"] == 2  # the other one asks for the counts


def test_requests_in_pieces_in_chunks_and_in_a_row_are_understood(openai_server: Start) -> None:
    content = json.dumps(chat_body()).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\n"
    half = len(content) // 2
    chunks = b"%x\r\n%s\r\n%x\r\n%s\r\n0\r\n\r\n" % (half, content[:half], len(content) - half, content[half:])
    plain = head + b"Content-Length: %d\r\n\r\n" % len(content) + content
    chunked = head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks
    server = openai_server()
    with socket.create_connection(("127.0.0.1", server.port)) as connection, connection.makefile("rb") as answers:
        sent = plain + chunked + plain
        for start in range(0, len(sent), 100):
            connection.sendall(sent[start : start + 100])
        for _ in range(3):
            length = 0
            while (header := answers.readline().strip()) != b"":
                length = int(header.split(b" ")[1]) if header.startswith(b"Content-Length") else length
            assert content_of(answers.read(length))["memories"]
    assert len(server.billed()) == 3


def test_calls_are_under_way_side_by_side(openai_server: Start) -> None:
    server = openai_server(latency_s=0.2)
    content = json.dumps(chat_body()).encode()
    sent = b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(content) + content
    connections = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(20)]
    for connection in connections:
        connection.sendall(sent)
    for connection in connections:
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
        connection.close()
    assert server.counts()["most_under_way"] == 20


def test_the_server_ends_with_whoever_started_it() -> None:
    program = (
        "import time, openai_server\n"
        "with openai_server.start_server() as server:\n"
        "    print(server.port, flush=True)\n"
        "    time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=TESTS, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        port = int(parent.stdout.readline())
        socket.create_connection(("127.0.0.1", port)).close()
        parent.kill()
    for _ in range(200):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            return
        time.sleep(0.05)
    pytest.fail("the server is still there")
