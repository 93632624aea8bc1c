"""What comes of distributions: means, draws, and how answers are put together from next tokens."""

import doctest
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import personas_tune.agents.ratings as ratings_module
import personas_tune.agents.served as served_module
from personas_tune.agents import Ratings
from personas_tune.agents.served import beginnings, distribution
from personas_tune.errors import ServerError
from personas_tune.llm.calls import Rejected
from personas_tune.llm.scoring import read_log_probabilities

P = np.array([[0.1, 0.2, 0.7], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
RATINGS = Ratings("u1", ("a", "b", "c"), ("0.5", "1", "1.5"), P)


def test_examples_hold():
    for module in (ratings_module, served_module):
        assert doctest.testmod(module).failed == 0


def test_means_and_most_likely_ratings():
    np.testing.assert_allclose(RATINGS.expected, [0.05 + 0.2 + 1.05, 0.5, 0.75])
    assert RATINGS.most_likely.tolist() == [1.5, 0.5, 0.5]
    assert len(RATINGS) == 3


def test_draws_have_the_distributions_shares_and_follow_the_seed():
    rng = np.random.default_rng(0)
    drawn = np.array([RATINGS.draw(rng) for _ in range(4000)])
    shares = np.array([[np.mean(drawn[:, item] == value) for value in RATINGS.values] for item in range(3)])
    np.testing.assert_allclose(shares, P, atol=0.03)
    assert (drawn[:, 1] == 0.5).all()
    again = np.random.default_rng(0)
    assert np.array_equal(drawn[0], RATINGS.draw(again))


def test_a_draw_at_the_end_of_a_row_whose_sum_is_rounded_is_a_label_that_can_be():
    class Last:
        def random(self, n):
            return np.full(n, np.nextafter(1.0, 0.0))

    p = np.array([[0.3, 0.7 - 1e-12, 0.0]])
    assert Ratings("u", ("a",), ("1", "2", "3"), p).draw(Last()).tolist() == [2.0]


@given(st.data())
def test_an_answers_probability_is_the_product_over_its_tokens(data):
    token = st.integers(0, 5)
    stems = data.draw(st.lists(st.lists(token, min_size=1, max_size=3).map(tuple), min_size=1, unique=True, max_size=6))
    answers = [(*stem, 9) for stem in stems]
    begun = beginnings(answers)
    assert begun[0] == ()
    value = st.floats(-5, -0.01)
    after = {start: {t: data.draw(value) for t in (0, 1, 2, 3, 4, 5, 9)} for start in begun}
    expected = []
    for answer in answers:
        product = 1.0
        for n, t in enumerate(answer):
            product *= math.exp(after[answer[:n]][t])
        expected.append(product)
    np.testing.assert_allclose(distribution(answers, after), np.array(expected) / sum(expected), rtol=1e-9)


def test_labels_of_no_probability_are_refused():
    with pytest.raises(ServerError, match="all labels probability 0"):
        distribution([(1, 9)], {(): {1: -9999.0, 9: 0.0}, (1,): {1: 0.0, 9: -0.1}})


def told(*tops):
    choices = [{"index": index, "logprobs": {"top_logprobs": [top]}} for index, top in enumerate(tops)]
    return json.dumps({"choices": choices[::-1]})


def test_answers_are_read_by_token_id_in_the_prompts_order():
    body = told({"token_id:3": -1.0, "token_id:7": -2.5, "token_id:8": -0.1}, {"token_id:3": -3, "token_id:7": 0})
    assert read_log_probabilities(body, 2, [3, 7]) == [{3: -1.0, 7: -2.5}, {3: -3.0, 7: 0.0}]


@pytest.mark.parametrize(
    "body",
    [
        "no JSON", "[]", "{}", '{"choices": null}', '{"choices": [{"index": 0, "logprobs": null}]}',
        '{"choices": [{"index": 0, "logprobs": {"top_logprobs": []}}]}',
        '{"choices": [{"index": 0, "logprobs": {"top_logprobs": [null]}}]}',
        told({"token_id:3": -1.0}), told({"token_id:3": -1.0, "token_id:7": "x"}), told({" 3": -1.0, " 7": -1.0}),
        told({"token_id:3": -1.0, "token_id:7": float("nan")}), told(), told({}, {}),
    ],
)  # fmt: skip
def test_what_is_no_such_answer_is_rejected(body):
    with pytest.raises(Rejected):
        read_log_probabilities(body, 1, [3, 7])
