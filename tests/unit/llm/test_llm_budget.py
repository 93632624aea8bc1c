import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llm_calls import MODEL, attempt, call, completion, error, run, scripted_server, steps, totals, users

from personas_tune.errors import BudgetError
from personas_tune.llm.budget import Budget, Prices, estimated_usage, usage_in
from personas_tune.llm.journal import Journal, Total, Usage

PRICES = Prices(input=2.5, cached_input=1.25, output=10.0)
EVERY_CALL = estimated_usage(call("user 0 step 0").request.body, 10)


def test_cost_by_hand():
    usage = Usage(input_tokens=1_000_000, cached_tokens=400_000, output_tokens=50_000)
    assert PRICES.cost_usd(usage) == pytest.approx(0.6 * 2.5 + 0.4 * 1.25 + 0.05 * 10)
    assert PRICES.cost_usd(usage, via="batch") == pytest.approx(2.5 / 2)
    assert Prices(input=2.0).cost_usd(usage) == pytest.approx(2.0)
    assert Prices(input=2.0, batch_share=0.25).cost_usd(usage, via="batch") == pytest.approx(0.5)


def test_a_request_is_estimated_at_four_characters_a_token():
    body = {"model": "gpt4", "messages": [{"role": "user", "content": "x" * 92}], "seed": 1, "stop": None}
    assert estimated_usage(body, 30) == Usage(input_tokens=25, output_tokens=30)
    assert estimated_usage({"input": ["x" * 40, "y" * 40]}, 0) == Usage(input_tokens=20)


@pytest.mark.parametrize(
    ("body", "usage"),
    [
        ({"usage": {"prompt_tokens": 9, "completion_tokens": 2}}, Usage(9, 0, 2)),
        ({"usage": {"prompt_tokens": 9, "total_tokens": 9}}, Usage(9, 0, 0)),
        ({"usage": {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4}}}, Usage(9, 4, 0)),
        ({"usage": {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": None}}}, Usage(9, 0, 0)),
        ({"usage": {"prompt_tokens": 9, "prompt_tokens_details": None, "completion_tokens": None}}, Usage(9, 0, 0)),
        ({"usage": {"prompt_tokens": 10**30, "completion_tokens": -5}}, Usage(2**53, 0, 0)),
        ({"usage": {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 99}}}, Usage(9, 9, 0)),
        ({"usage": {"prompt_tokens": float("inf")}}, None),
        ({"usage": None}, None),
        ({"usage": {"prompt_tokens": "many"}}, None),
        ({"usage": [1]}, None),
        ([], None),
        (7, None),
    ],
)
def test_usage_is_read_from_whatever_a_server_answers(body, usage):
    assert usage_in(json.dumps(body)) == usage


@given(st.text())
def test_texts_that_are_no_json_have_no_usage(text):
    assert usage_in(text + "{") is None


def test_a_call_is_allowed_up_to_the_sum_and_not_beyond():
    budget = Budget(max_tokens=100)
    assert budget.allows(Usage(60, 0, 40))
    assert not budget.allows(Usage(60, 0, 41))
    budget.reserve(Usage(50, 0, 10))
    assert budget.allows(Usage(40))
    assert not budget.allows(Usage(41))
    budget.settle(Usage(50, 0, 10), Usage(5, 0, 5))
    assert budget.allows(Usage(90))
    assert not budget.allows(Usage(91))


def test_dollars_bound_as_tokens_do():
    budget = Budget(PRICES, max_usd=1.0)
    budget.reserve(Usage(output_tokens=50_000))
    assert budget.allows(Usage(output_tokens=50_000))
    assert not budget.allows(Usage(output_tokens=50_001))
    budget.settle(Usage(output_tokens=50_000), Usage(output_tokens=90_000))
    assert not budget.allows(Usage(output_tokens=10_001))


def test_earlier_runs_count_batches_at_their_price():
    usage = Usage(1_000_000, 0, 0)
    before = [Total("online", "lost", 1, usage), Total("batch", "answered", 1, usage)]
    budget = Budget(PRICES, max_usd=10.0, before=before)
    assert budget.spent_usd == pytest.approx(2.5 + 1.25)
    assert budget.spent_tokens == 2_000_000


def test_spent_and_remaining_are_told():
    before = [Total("online", "answered", 1, Usage(100_000, 0, 0))]
    assert str(Budget(before=before)) == "100000 tokens"
    assert str(Budget(max_tokens=150_000, before=before)) == "100000 tokens, 50000 left"
    assert str(Budget(PRICES, before=before)) == "0.25 USD"
    assert str(Budget(PRICES, max_usd=1.0, before=before)) == "0.25 USD, 0.75 left"


# Runs on a server whose calls take 15 tokens each, of about 21 that are expected.


def test_a_budget_of_tokens_is_used_up_and_not_exceeded(tmp_path):
    path = tmp_path / "journal.sqlite"
    with scripted_server((200, {}, completion())) as server, pytest.raises(BudgetError) as told:
        run(path, server.base_url, users(100), concurrency=8, max_tokens=1000)
    spent = totals(path)["answered"].usage.tokens
    assert 1000 - EVERY_CALL.tokens < spent <= 1000
    assert str(told.value) == (
        f"distill.max_tokens=1000: {spent} tokens are spent, the next call takes about {EVERY_CALL.tokens}; every "
        f"answer is kept in {path}: raise distill.max_tokens and run the same command to go on"
    )


@pytest.mark.parametrize("concurrency", [1, 16])
def test_answers_longer_than_expected_exceed_a_budget_by_what_was_in_flight_at_most(tmp_path, concurrency):
    path = tmp_path / "journal.sqlite"
    usage = {"prompt_tokens": 10, "completion_tokens": 410}
    body = json.dumps({**json.loads(completion()), "usage": usage}).encode()
    with scripted_server((200, {}, body)) as server, pytest.raises(BudgetError):
        run(path, server.base_url, users(100), concurrency=concurrency, max_tokens=3000)
    assert 3000 - EVERY_CALL.tokens < totals(path)["answered"].usage.tokens <= 3000 + 420 * concurrency


def test_a_budget_of_dollars_counts_over_restarts(tmp_path):
    path, prices = tmp_path / "journal.sqlite", Prices(input=1.0, output=100.0)  # 510e-6 a call
    with scripted_server((200, {}, completion())) as server:
        for _ in range(3):
            with pytest.raises(BudgetError, match=r"^distill.max_usd=0.0104: 0.00\d+ USD are spent"):
                run(path, server.base_url, users(100), prices=prices, max_usd=0.0104)
        assert len(server.calls) == 19
        assert run(path, server.base_url, users(30), prices=prices, max_usd=0.02) == {}
        assert len(server.calls) == 30


def test_a_budget_is_named_by_its_section_in_the_config(tmp_path):
    path, bounds = tmp_path / "journal.sqlite", {"prices": Prices(input=1e6), "max_usd": 1.0, "section": "embedding"}
    with scripted_server((200, {}, completion())) as server, pytest.raises(BudgetError) as told:
        run(path, server.base_url, users(1), **bounds)
    assert str(told.value).startswith("embedding.max_usd=1: 0 USD are spent")
    assert "raise embedding.max_usd and run" in str(told.value)


def test_other_models_have_budgets_of_their_own(tmp_path):
    path = tmp_path / "journal.sqlite"
    with Journal.open(path) as journal:
        journal.record_all([attempt(model="other", usage=Usage(10**6))])
    with scripted_server((200, {}, completion())) as server:
        assert run(path, server.base_url, users(3), max_tokens=200) == {}


def test_lost_answers_count_as_estimated_and_errors_cost_nothing(tmp_path):
    path = tmp_path / "journal.sqlite"
    broken = (200, {"Content-Length": "5000", "Connection": "close"}, b"")
    script = [error(429), broken, (200, {}, completion())]
    with scripted_server(*script) as server:
        assert run(path, server.base_url, users(1)) == {}
    found = totals(path)
    assert found["failed"].usage == Usage()
    assert found["lost"].usage == EVERY_CALL
    assert found["answered"].usage == Usage(10, 4, 5)


def test_an_answer_without_usage_counts_as_estimated(tmp_path):
    path = tmp_path / "journal.sqlite"
    body = json.loads(completion())
    del body["usage"]
    with scripted_server((200, {}, json.dumps(body).encode())) as server:
        assert run(path, server.base_url, users(1)) == {}
    assert totals(path)["answered"].usage == EVERY_CALL


def test_journalled_answers_are_used_though_the_budget_is_spent(tmp_path):
    path = tmp_path / "journal.sqlite"
    with scripted_server((200, {}, completion())) as server:
        assert run(path, server.base_url, users(4)) == {}
        assert run(path, server.base_url, users(4), max_tokens=1) == {}
        with pytest.raises(BudgetError):
            run(path, server.base_url, [("new", steps(call("else")))], max_tokens=1)
        assert len(server.calls) == 4


def test_the_model_is_what_was_asked_for(tmp_path):
    with scripted_server((200, {}, completion())) as server:
        run(tmp_path / "journal.sqlite", server.base_url, users(1))
        assert server.calls[0]["model"] == MODEL
