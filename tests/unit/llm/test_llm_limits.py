import asyncio
import math
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from personas_tune.errors import BudgetError
from personas_tune.llm.budget import Budget
from personas_tune.llm.journal import Usage
from personas_tune.llm.limits import BURST_S, Bucket, Closed, Gate, Window, duration_s
from personas_tune.llm.settings import ServerSettings

CALL = Usage(10, 0, 5)


def test_a_window_grows_by_one_a_round_of_successes():
    window = Window(64)
    window.size = 8.0
    for _ in range(9):
        window.grow()
    assert 9.0 <= window.size < 9.2


def test_a_window_never_exceeds_its_bound():
    window = Window(3)
    for _ in range(100):
        window.grow()
    assert window.size == 3.0


def test_a_window_halves_once_however_many_calls_of_a_round_are_turned_away():
    window = Window(32)
    for now in (10.1, 10.2, 10.3):
        window.shrink(sent_at=10.0, now=now)
    assert window.size == 16.0
    window.shrink(sent_at=10.2, now=10.9)
    assert window.size == 8.0
    for second in range(11, 30):
        window.shrink(sent_at=second, now=second + 0.5)
    assert window.size == 1.0


@given(st.integers(1, 600), st.lists(st.floats(0, 3), min_size=1, max_size=400))
def test_no_minute_has_more_calls_than_allowed_and_a_burst(per_minute, gaps):
    bucket, now, sent = Bucket(per_minute, 0.0), 0.0, []
    for gap in gaps:
        now += gap
        now += bucket.wait_s(1, now)
        assert bucket.wait_s(1, now) < 1e-6
        bucket.take(1)
        sent.append(now)
    for start in sent:
        in_minute = sum(start <= at < start + 60 - 1e-3 for at in sent)
        assert in_minute <= per_minute + max(1, math.ceil(per_minute * BURST_S / 60))


def test_a_full_bucket_lets_a_large_amount_out_and_then_stays_shut_for_it():
    bucket = Bucket(600, 0.0)  # ten a second
    assert bucket.wait_s(500, 0.0) == 0.0
    bucket.take(500)
    assert bucket.wait_s(1, 0.0) == pytest.approx(49.1)
    assert bucket.wait_s(500, 10.0) == pytest.approx(40.0)
    bucket.take(-490)
    assert bucket.wait_s(1, 10.0) == 0.0


def test_a_bucket_keeps_no_more_than_its_burst():
    bucket = Bucket(600, 0.0)
    assert bucket.wait_s(10, 1000.0) == 0.0
    bucket.take(10)
    assert bucket.wait_s(1, 1000.0) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1s", 1.0), ("120ms", 0.12), ("6m0s", 360.0), ("1h2m3.5s", 3723.5), ("1m30.951s", 90.951), ("12", 12.0),
        ("0.5", 0.5), ("90d", 86_400.0), ("", None), ("soon", None), ("1s!", None), ("-1s", None), ("nan", None),
    ],
)  # fmt: skip
def test_durations_as_servers_write_them(text, seconds):
    assert duration_s(text) == (None if seconds is None else pytest.approx(seconds))


def in_gate(test: Callable[[Gate], Coroutine[Any, Any, None]], budget: Budget | None = None, **bounds: Any) -> None:
    async def work() -> None:
        await test(Gate(ServerSettings("gpt-4o", **bounds), budget or Budget(), kept_in="journal.sqlite"))

    asyncio.run(work())


async def turns() -> None:
    """Let everybody run who can."""
    for _ in range(10):
        await asyncio.sleep(0)


def test_no_more_calls_are_in_flight_than_allowed():
    async def test(gate: Gate) -> None:
        waiting = [asyncio.create_task(gate.enter(CALL)) for _ in range(5)]
        for n_in in (3, 4, 5):
            await turns()
            assert sum(task.done() for task in waiting) == n_in
            assert gate.in_flight == 3
            gate.leave(CALL, CALL)

    in_gate(test, concurrency=3)


def test_whoever_was_turned_away_most_often_goes_first():
    async def test(gate: Gate) -> None:
        order: list[str] = []

        async def enter(name: str, tries: int) -> None:
            await gate.enter(CALL, tries)
            order.append(name)
            gate.leave(CALL, CALL)

        await gate.enter(CALL)
        names = [("new", 0), ("newer", 0), ("twice", 2), ("once", 1)]
        tasks = [asyncio.create_task(enter(*each)) for each in names]
        await turns()
        gate.leave(CALL, CALL)
        await asyncio.gather(*tasks)
        assert order == ["twice", "once", "new", "newer"]

    in_gate(test, concurrency=1)


def test_a_pause_holds_up_everybody_until_it_is_over():
    async def test(gate: Gate) -> None:
        assert gate.pause(0.05)
        assert not gate.pause(0.01)  # no new one, and no shorter one
        over = asyncio.get_running_loop().time() + 0.05
        await asyncio.gather(*(gate.enter(CALL) for _ in range(3)))
        assert asyncio.get_running_loop().time() >= over

    in_gate(test)


def test_a_bucket_lets_the_next_out_in_time():
    async def test(gate: Gate) -> None:
        began = asyncio.get_running_loop().time()
        for _ in range(22):
            await gate.enter(CALL)
        assert asyncio.get_running_loop().time() - began >= 0.0999  # twenty go at once, and twenty a second

    in_gate(test, requests_per_minute=1200)


def test_closing_wakes_all_who_wait_or_sleep():
    async def test(gate: Gate) -> None:
        gate.pause(10_000)
        sleepers = [asyncio.create_task(gate.enter(CALL)), asyncio.create_task(gate.nap(10_000))]
        await turns()
        gate.close()
        outcomes = await asyncio.gather(*sleepers, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [Closed, Closed]
        for late in (gate.enter(CALL), gate.nap(1)):
            with pytest.raises(Closed):
                await late

    in_gate(test)


def test_limits_are_learnt_from_headers_unless_configured():
    headers = {"x-ratelimit-limit-requests": "600", "x-ratelimit-limit-tokens": "6000"}

    async def test(gate: Gate) -> None:
        assert gate.heed(headers) == 0.0
        assert {kind: bucket.per_minute for kind, bucket in gate._buckets.items()} == {"requests": 60, "tokens": 6000}
        gate.heed({"x-ratelimit-limit-tokens": "3000", "x-ratelimit-limit-requests": "no limit"})
        assert {kind: bucket.per_minute for kind, bucket in gate._buckets.items()} == {"requests": 60, "tokens": 3000}

    in_gate(test, requests_per_minute=60)


def test_a_limit_that_is_reached_asks_for_a_pause():
    async def test(gate: Gate) -> None:
        nearly = {"x-ratelimit-remaining-requests": "1", "x-ratelimit-reset-requests": "6m0s"}
        reached = {"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "21.5s"}
        assert gate.heed(nearly) == 0.0
        assert gate.heed({**nearly, **reached}) == 21.5
        a_day = {**reached, "x-ratelimit-reset-tokens": "23h59m0s"}
        assert gate.heed(a_day) == 60.0
        assert gate.heed({"x-ratelimit-remaining-tokens": "0"}) == 0.0

    in_gate(test)


def test_tokens_are_corrected_by_what_calls_took():
    async def test(gate: Gate) -> None:
        await gate.enter(Usage(600))
        gate.leave(Usage(600), Usage())
        await gate.enter(CALL)  # had the estimate stood, this would take ten minutes

    in_gate(test, tokens_per_minute=60)


def test_a_call_above_the_budget_waits_for_those_in_flight_which_may_cost_less():
    async def test(gate: Gate) -> None:
        await gate.enter(CALL)
        second = asyncio.create_task(gate.enter(CALL))
        await turns()
        assert not second.done()
        gate.leave(CALL, Usage(1))
        await second

    in_gate(test, Budget(max_tokens=20))


def test_a_call_above_the_budget_is_an_error_when_nothing_is_in_flight():
    async def test(gate: Gate) -> None:
        await gate.enter(CALL)
        tasks = [asyncio.create_task(gate.enter(CALL)) for _ in range(3)]
        await turns()
        gate.leave(CALL, CALL)
        for task in tasks:
            with pytest.raises(BudgetError, match="15 tokens are spent, the next call takes about 15"):
                await task
        with pytest.raises(BudgetError):
            await gate.enter(CALL)

    in_gate(test, Budget(max_tokens=29))
