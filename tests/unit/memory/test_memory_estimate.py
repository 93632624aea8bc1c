from dataclasses import replace

import numpy as np
import pytest

from personas_tune.llm.budget import Prices
from personas_tune.llm.journal import Total, Usage
from personas_tune.llm.settings import ServerSettings
from personas_tune.memory.by_model import profile_words_for
from personas_tune.memory.estimate import Estimate, estimate_distillation, estimate_lines
from personas_tune.memory.reflection import ReflectionSettings
from personas_tune.memory.stream import RatedItem, UserHistory

SETTINGS = ReflectionSettings(
    model="m", batch_size=4, max_words=2000, profile_words=50, memory_words=20, response_format="none", sampling={},
    max_output_tokens=900, output_limit_name="max_tokens", template="movies", top=5,
)  # fmt: skip
SERVER = ServerSettings("m", concurrency=2, prices=Prices(input=2, output=10, batch_share=0.25))
ESTIMATE = Estimate(
    n_users=3, n_sampled=3, n_calls=12, n_answered=2, n_waves=5, usage=Usage(input_tokens=3_000_000, output_tokens=100)
)


class NoAnswers:
    def answers(self, request: str) -> list[str]:
        return []


def history(number: int, n: int) -> UserHistory:
    rated = tuple(RatedItem(f"i{p}", p, 4.0, f"Title {p}", ("War",), "", (), 3.5) for p in range(n))
    return UserHistory(f"u{number:05}", rated)


def test_calls_are_counted_per_batch_and_user() -> None:
    sizes = [0, 1, 4, 5, 9]
    estimate = estimate_distillation((history(n, n) for n in sizes), np.array(sizes), SETTINGS, None)
    assert (estimate.n_users, estimate.n_calls, estimate.n_waves) == (5, 0 + 1 + 1 + 2 + 3, 3)
    assert estimate.n_answered == 0


def test_tokens_grow_with_the_profile_that_a_call_sees() -> None:
    one = estimate_distillation([history(0, 4)], np.array([4]), SETTINGS, NoAnswers()).usage
    two = estimate_distillation([history(0, 8)], np.array([8]), SETTINGS, NoAnswers()).usage
    assert two.output_tokens == 2 * one.output_tokens
    assert two.input_tokens > 2 * one.input_tokens + 0.25 * 40 * len("taste")  # 40 words: 80% of the budget


def test_a_sample_stands_for_all_users() -> None:
    sizes = np.full(4001, 8)
    sampled = estimate_distillation((history(n, 8) for n in range(4001)), sizes, SETTINGS, None)
    one = estimate_distillation([history(0, 8)], np.array([8]), SETTINGS, None)
    assert sampled.n_sampled == 1334  # every third
    assert sampled.n_calls == 8002
    assert sampled.usage.input_tokens == pytest.approx(4001 * one.usage.input_tokens)


def test_nobody_to_distil_costs_nothing() -> None:
    estimate = estimate_distillation([], np.array([], dtype=np.int64), SETTINGS, None)
    assert (estimate.n_calls, estimate.n_waves, estimate.usage) == (0, 0, Usage())


def test_money_is_told_for_both_ways() -> None:
    lines = estimate_lines(ESTIMATE, SERVER)
    assert lines[2] == "cost about 6.00 USD online, 1.50 USD with distill.batch_api=true"
    assert not any("max_usd" in line for line in lines)
    assert "more than distill.max_usd=5 allow" in estimate_lines(ESTIMATE, replace(SERVER, max_usd=5))[3]
    assert "max_usd" not in "".join(estimate_lines(ESTIMATE, replace(SERVER, max_usd=5), batch_api=True))
    assert "cost unknown" in estimate_lines(ESTIMATE, replace(SERVER, prices=None))[2]


def test_what_was_spent_before_counts_against_the_bounds() -> None:
    spent = [Total("online", "answered", 1, Usage(input_tokens=1_000_000))]
    assert "more than" not in "".join(estimate_lines(ESTIMATE, replace(SERVER, max_tokens=3_500_000)))
    told = estimate_lines(ESTIMATE, replace(SERVER, max_tokens=3_500_000), spent)
    assert any("more than distill.max_tokens=3.5e+06 allow after 1,000,000 tokens spent" in line for line in told)


@pytest.mark.parametrize(
    ("limits", "time"),
    [
        ({}, "1 min online at 10 s a call, 2 at once"),  # 10 calls in 5 rounds of 10 s
        ({"requests_per_minute": 2}, "5 min online"),
        ({"tokens_per_minute": 10_000}, "5 h online"),
        ({"tokens_per_minute": 500}, "4 days online"),
    ],
)
def test_the_tightest_limit_decides_the_time(limits: dict[str, int], time: str) -> None:
    told = estimate_lines(ESTIMATE, replace(SERVER, **limits))  # type: ignore[arg-type]
    assert any(line.startswith(f"time about {time}") for line in told)


def test_a_wave_of_the_batch_api_may_take_a_day() -> None:
    assert estimate_lines(ESTIMATE, SERVER)[-1].startswith("time at most 5 days with distill.batch_api=true: 5 waves")


@pytest.mark.parametrize(("context", "words"), [(None, 400), (4096, 400), (1024, 128), (8, 20)])
def test_a_profile_takes_a_small_part_of_the_context(context: int | None, words: int) -> None:
    assert profile_words_for(context) == words
