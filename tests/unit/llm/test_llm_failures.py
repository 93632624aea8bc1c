import json
import random
from datetime import UTC, datetime
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from personas_tune.llm.failures import Reply, backoff_s, remedy_for, retry_after_s, verdict_on, words_of


def reply(http_status: int, *, message: str = "No.", code: str | None = None, kind: str = "some_error") -> Reply:
    body = json.dumps({"error": {"message": message, "type": kind, "code": code}})
    return Reply("failed", http_status, body)


@pytest.mark.parametrize("http_status", [408, 409, 425, 429, 500, 502, 503, 504, 529])
def test_what_may_pass_is_tried_again(http_status):
    assert verdict_on(reply(http_status)) == "again"


@pytest.mark.parametrize("http_status", [401, 402, 403, 404])
def test_what_no_call_gets_past_stops_the_run(http_status):
    assert verdict_on(reply(http_status)) == "stop"


@pytest.mark.parametrize("http_status", [400, 413, 422, 405, 410])
def test_a_request_that_is_not_liked_is_not_sent_again(http_status):
    assert verdict_on(reply(http_status)) == "refused"


@pytest.mark.parametrize(
    "refusal",
    [
        reply(429, code="insufficient_quota"),
        reply(429, kind="insufficient_quota"),
        reply(400, code="billing_hard_limit_reached"),
        reply(429, code="billing_not_active"),
    ],
)
def test_an_empty_account_stops_the_run(refusal):
    assert verdict_on(refusal) == "stop"
    assert "billing" in remedy_for(refusal)


def test_a_content_filter_is_about_one_text():
    assert verdict_on(reply(400, code="content_filter")) == "unfit"


def test_broken_connections_are_tried_again():
    assert verdict_on(Reply("lost", None, "the connection broke")) == "again"
    assert verdict_on(Reply("failed", None, "no connection")) == "again"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('{"error": {"message": "Bad\\nkey  given.", "code": 1}}', "Bad key given."),
        ('{"error": "model \'x\' not found"}', "model 'x' not found"),
        ('{"detail": "Not Found"}', "Not Found"),
        ('{"detail": [{"msg": "field required"}]}', '[{"msg": "field required"}]'),
        ('{"object": "error", "message": "too long", "code": 400}', "too long"),
        ('{"error": {"code": 7}}', '{"code": 7}'),
        ("<html>\n<h1>502</h1></html>", "<html> <h1>502</h1></html>"),
        ("\x1b[31mred\x00", "[31mred"),
        ("[1]", "[1]"),
        ("", "no words"),
        ("x" * 1000, "x" * 300 + "..."),
    ],
)
def test_the_servers_own_words_are_told_in_one_line(body, words):
    assert words_of(Reply("failed", 418, body)) == f"HTTP 418: {words}"


names = st.sampled_from(["error", "message", "code", "type", "detail"])
json_values = st.recursive(st.none() | st.text() | st.integers(), lambda s: st.lists(s) | st.dictionaries(names, s))


@given(st.text() | json_values.map(json.dumps))
def test_no_body_is_too_odd(body):
    odd = Reply("failed", 400, body)
    assert verdict_on(odd) in ("refused", "stop", "unfit")
    assert words_of(odd).isprintable()


NOW = 1_800_000_000.0


@pytest.mark.parametrize(
    ("headers", "wait_s"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.25"}, 0.25),
        ({"retry-after-ms": "150", "retry-after": "7"}, 0.15),
        ({"retry-after-ms": "soon", "retry-after": "7"}, 7.0),
        ({"retry-after": format_datetime(datetime.fromtimestamp(NOW + 90, UTC), usegmt=True)}, 90.0),
        ({"retry-after": format_datetime(datetime.fromtimestamp(NOW - 90, UTC), usegmt=True)}, 0.0),
        ({"retry-after": "-5"}, 0.0),
        ({"retry-after": "inf"}, 86_400.0),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "tomorrow"}, None),
        ({"retry-after": ""}, None),
    ],
)
def test_the_wait_that_a_server_asks_for(headers, wait_s):
    assert retry_after_s(headers, NOW) == wait_s


def test_backoff_is_drawn_from_a_range_that_doubles_up_to_a_cap():
    draw = random.Random(1)
    for tries, most in [(0, 0.5), (1, 1.0), (3, 4.0), (6, 32.0), (7, 60.0), (500, 60.0)]:
        waits = [backoff_s(tries, draw) for _ in range(300)]
        assert 0 <= min(waits) < most * 0.05
        assert most * 0.95 < max(waits) <= most
