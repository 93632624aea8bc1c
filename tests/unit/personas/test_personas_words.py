"""Distinct words by hand and against a slow reference, the map, and how alike groupings are."""

import json
import math
import sys
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import adjusted_rand_score

from personas_tune.errors import ConfigError
from personas_tune.personas import stability
from personas_tune.personas.clustering import cluster_users
from personas_tune.personas.profiles import map_profiles
from personas_tune.personas.stability import measure_stability, pairwise_adjusted_rand
from personas_tune.personas.words import distinct_words, log_odds, make_analyzer, nouns_and_adjectives, plain_words

# Words


def slow_score(counts, persona, word):
    """Monroe et al.'s z-score of one word, sum by sum."""
    k = len(counts)
    prior = [sum(row[w] for row in counts) / k for w in range(len(counts[0]))]
    here = [counts[persona][w] + prior[w] for w in range(len(prior))]
    others = [sum(counts[p][w] for p in range(k) if p != persona) + prior[w] for w in range(len(prior))]
    odds = [y[word] / (sum(y) - y[word]) for y in (here, others)]
    return (math.log(odds[0]) - math.log(odds[1])) / math.sqrt(1 / here[word] + 1 / others[word])


def test_scores_by_hand():
    """Two personas, two words: 3 and 1 against 1 and 3, prior 2 and 2: odds 5/3 against 3/5."""
    expected = math.log(25 / 9) / math.sqrt(1 / 5 + 1 / 3)
    np.testing.assert_allclose(log_odds(np.array([[3, 1], [1, 3]])), [[expected, -expected], [-expected, expected]])


counts = arrays(np.int64, st.tuples(st.integers(1, 4), st.integers(2, 6)), elements=st.integers(0, 9)).filter(
    lambda table: table.sum(axis=0).all()
)


@given(counts)
def test_scores_are_those_of_a_slow_reference(table):
    slow = [[slow_score(table.tolist(), p, w) for w in range(table.shape[1])] for p in range(len(table))]
    np.testing.assert_allclose(log_odds(table), slow, atol=1e-9)


TEXTS = ["I like war and dislike romance"] * 4 + ["I like romance, but don't like war or the sea"] * 3 + ["I like rain"]
PERSONAS = [0, 0, 0, 0, 1, 1, 1, 1]


def test_words_are_counted_by_users_and_behind_their_stance():
    first, second = distinct_words(TEXTS, PERSONAS, plain_words())
    assert [(word.word, word.n_users) for word in first] == [("+war", 4), ("-romance", 4)]
    assert [(word.word, word.n_users) for word in second] == [("+romance", 3), ("-sea", 3), ("-war", 3)]
    # +war, -romance, +romance, -war, -sea, +rain: 4, 4, 0, 0, 0, 0 and 0, 0, 3, 3, 3, 1
    table = [[4, 4, 0, 0, 0, 0], [0, 0, 3, 3, 3, 1]]
    assert first[0].score == first[1].score == pytest.approx(slow_score(table, 0, 0), abs=1e-6)
    assert second[0].score == pytest.approx(slow_score(table, 1, 2), abs=1e-6)


def test_a_word_needs_three_users_or_all_of_a_small_persona():
    texts = ["I like war, rain"] * 2 + ["I like romance, sea"] * 2 + ["I like romance"]
    found = distinct_words(texts, [0, 0, 1, 1, 1], plain_words())
    assert [[word.word for word in words] for words in found] == [["+rain", "+war"], ["+romance"]]


def test_only_so_many_words_are_given_the_best_first():
    texts = ["I like alpha, beta, gamma"] * 3 + ["I like alpha"] * 3 + ["I like gamma, delta"] * 2
    words = distinct_words(texts, [0] * 3 + [1] * 5, plain_words(), n_words=2)
    scores = [word.score for word in words[0]]
    assert [word.word for word in words[0]] == ["+beta", "+gamma"]
    assert scores == sorted(scores, reverse=True)


def test_one_persona_and_profiles_without_words_have_none():
    assert distinct_words(TEXTS, [0] * 8, plain_words()) == [[]]
    assert distinct_words(["I rate 5 of 12", "12"], [0, 1], plain_words()) == [[], []]
    assert distinct_words(["I like war", "I like war"], [0, 1], plain_words()) == [[], []]


def test_plain_words_are_of_three_letters_and_no_stop_words():
    text = "Sci-Fi, the 1950s: WAR up to Ärger; don't 4you"
    assert plain_words()(text) == ["sci", "war", "ärger", "don"]


# Nouns and adjectives


def test_without_spacy_a_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ConfigError) as caught:
        make_analyzer("spacy")
    assert caught.value.lines == [
        "personas.words: spaCy is not installed; pip install 'personas-tune[spacy]' && "
        "python -m spacy download en_core_web_sm, or set it to sklearn"
    ]


def test_without_its_model_a_line_says_how_to_get_it():
    pytest.importorskip("spacy", reason="the extra spacy is not installed")
    with pytest.raises(ConfigError) as caught:
        nouns_and_adjectives("en_no_such_model")
    assert caught.value.lines == [
        "personas.words: spaCy's model en_no_such_model is not installed; python -m spacy download en_no_such_model, "
        "or set it to sklearn"
    ]


def test_a_model_that_spacy_cant_read_is_a_line(monkeypatch):
    def load(model):
        raise ValueError(f"[E149] Error deserializing {model}.\nCheck the version.")

    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=load))
    with pytest.raises(ConfigError) as caught:
        make_analyzer("spacy")
    assert caught.value.lines == [
        "personas.words: spaCy's model en_core_web_sm can't be read by the spaCy that is installed; "
        "python -m spacy download en_core_web_sm, or set it to sklearn"
    ]


def test_spacy_keeps_nouns_and_adjectives(tmp_path):
    spacy = pytest.importorskip("spacy", reason="the extra spacy is not installed")
    pipeline = spacy.blank("en")
    kinds = {"war": "NOUN", "dark": "ADJ", "nolan": "PROPN", "slowly": "ADV"}
    rules = pipeline.add_pipe("attribute_ruler")
    rules.add_patterns([{"patterns": [[{"LOWER": word}]], "attrs": {"POS": kind}} for word, kind in kinds.items()])
    pipeline.to_disk(tmp_path / "model")
    analyzer = nouns_and_adjectives(str(tmp_path / "model"))
    assert analyzer("Nolan slowly tells of dark war, quickly") == ["nolan", "dark", "war"]
    words = distinct_words(["I like slowly dark war", "I dislike war"], [0, 1], analyzer)
    assert [[word.word for word in each] for each in words] == [["+dark", "+war"], ["-war"]]


# How alike groupings are

groupings = st.lists(st.lists(st.integers(0, 3), min_size=7, max_size=7), min_size=2, max_size=5)


@settings(max_examples=25)
@given(groupings)
def test_each_pair_is_compared_as_scikit_learn_does(labels):
    assert pairwise_adjusted_rand(labels) == [adjusted_rand_score(*pair) for pair in combinations(labels, 2)]


def test_adjusted_rand_by_hand():
    """Of 15 pairs 6 are together in the one, 6 in the other, 3 in both; by chance 6 x 6 / 15: (3 - 2.4) / (6 - 2.4)."""
    assert pairwise_adjusted_rand([[0, 0, 0, 1, 1, 1], [5, 5, 5, 5, 2, 1]]) == [pytest.approx(1 / 6)]


def test_stability_is_measured_over_the_own_and_other_seeds():
    points = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)
    own = cluster_users(points, 5, 7)
    found = measure_stability(points, own, seed=7, n_seeds=3)
    labels = [cluster_users(points, 5, seed).personas for seed in (7, 8, 9, 10)]
    assert found.seeds == [7, 8, 9, 10]
    assert found.adjusted_rand == [adjusted_rand_score(*pair) for pair in combinations(labels, 2)]
    assert found.mean == pytest.approx(sum(found.adjusted_rand) / 6)
    assert found.low == min(found.adjusted_rand) <= found.mean
    assert measure_stability(points, own, seed=7, n_seeds=3) == found


def test_the_own_grouping_is_not_made_again(monkeypatch):
    points = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)
    own, seeds = cluster_users(points, 5, 7), []
    monkeypatch.setattr(stability, "cluster_users", lambda *args: seeds.append(args[-1]) or cluster_users(*args))
    stability.measure_stability(points, own, seed=7, n_seeds=2)
    assert seeds == [8, 9]


def test_groups_far_apart_are_found_by_every_seed():
    points = np.repeat(np.eye(3, dtype=np.float32), [4, 3, 2], axis=0)
    found = measure_stability(points, cluster_users(points, 3, 0), seed=0, n_seeds=2)
    assert (found.mean, found.low) == (1.0, 1.0)
    assert str(found) == "adjusted Rand over 3 seeds 1.00 (lowest 1.00)"
    assert json.dumps(found.adjusted_rand) == "[1.0, 1.0, 1.0]"


# The map


def test_the_map_is_the_two_directions_of_most_variance():
    points = np.array([[3, 0, 1], [-3, 0, 1], [0, 1, 1], [0, -1, 1]], dtype=np.float32)
    assert map_profiles(points).tolist() == [[3, 0], [-3, 0], [0, 1], [0, -1]]
    assert map_profiles(-points).tolist() == [[3, 0], [-3, 0], [0, 1], [0, -1]]  # the first user's side is up


@settings(max_examples=25)
@given(arrays(np.float32, (6, 3), elements=st.floats(-1, 1, width=16)))
def test_a_maps_distances_are_never_larger_than_the_true_ones(points):
    places = map_profiles(points)
    for one, other in combinations(range(6), 2):
        assert np.linalg.norm(places[one] - places[other]) <= np.linalg.norm(points[one] - points[other]) + 1e-6


@pytest.mark.parametrize("points", [[[1, 0, 0]], [[1, 0]] * 3, [[1], [3]]])
def test_users_without_two_directions_have_a_place_too(points):
    places = map_profiles(np.array(points, dtype=np.float32))
    assert places.shape == (len(points), 2)
    assert np.isfinite(places).all()
    assert (places[:, 1] == 0).all()
