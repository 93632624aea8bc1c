"""Neighbours' ratings: against a slow reference, and blind to what they must not see."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from personas_tune.collaborative import neighbours
from personas_tune.collaborative.factorisation import Ratings, fit_biases
from personas_tune.collaborative.neighbours import neighbour_ratings
from personas_tune.errors import DataError

SCALE = {"low": 1.0, "high": 5.0}


def log(seed=0, n_users=12, n_items=15, share=0.6):
    """Users of two tastes: interactions with split, and ratings of as many users outside."""
    rng = np.random.default_rng(seed)
    taste = rng.choice([-1.0, 1.0], n_items)
    rows = []
    for user in range(2 * n_users):
        likes = 1.0 if user % 2 else -1.0
        seen = rng.permutation(n_items)[: rng.integers(6, n_items)]
        for position, item in enumerate(seen):
            rating = float(np.clip(round(3 + likes * taste[item] + rng.normal(0, 0.5)), 1, 5))
            split = "train" if position < share * len(seen) else "test"
            rows.append((f"u{user:02}", f"i{item:02}", position, rating, split))
    names = ("user_id", "item_id", "position", "rating", "split")
    table = pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))
    inside = pc.less(table["user_id"], f"u{n_users:02}")
    return table.filter(inside), table.filter(pc.invert(inside)).select(["user_id", "item_id", "rating"])


def split_of(interactions, name):
    return interactions.filter(pc.equal(interactions["split"], name))


def slow_reference(row, train, outside, k, before_target):
    """The module's formula, written down once more for one row, with dictionaries."""
    users = sorted(set(train["user_id"].to_pylist()))
    fold = users.index(row["user_id"]) % 5
    pool = [(r["user_id"], r["item_id"], r["rating"]) for r in outside.to_pylist()]
    pool += [
        (r["user_id"], r["item_id"], r["rating"]) for r in train.to_pylist() if users.index(r["user_id"]) % 5 != fold
    ]
    names, things = sorted({u for u, _, _ in pool}), sorted({i for _, i, _ in pool})
    at_user, at_item = [
        np.array([d.index(v) for v in c]) for d, c in ((names, [p[0] for p in pool]), (things, [p[1] for p in pool]))
    ]
    model = fit_biases(
        Ratings(at_user, at_item, np.array([p[2] for p in pool]), len(names), len(things)), neighbours._PENALTIES
    )
    bias = dict(zip(things, model.item_biases, strict=True))
    residual = {
        (u, i): r - model.predict(np.array([names.index(u)]), np.array([things.index(i)]))[0] for u, i, r in pool
    }
    known = [
        r
        for r in train.to_pylist()
        if r["user_id"] == row["user_id"]
        and (r["position"] < row["position"] if before_target else r["position"] != row["position"])
    ]
    t = {r["item_id"]: r["rating"] - model.mean - bias.get(r["item_id"], 0.0) for r in known}
    own = sum(t.values()) / (len(t) + neighbours._PENALTIES.user)
    weighed = []
    for other in names:
        if (other, row["item_id"]) not in residual:
            continue
        both = [item for item in t if (other, item) in residual]
        a = np.array([t[item] - own for item in both])
        b = np.array([residual[other, item] for item in both])
        if len(both) and np.linalg.norm(a) * np.linalg.norm(b) > 1e-9:
            w = round(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) * len(both) / (len(both) + 30), 9)
            if w > 0:
                weighed.append((w, residual[other, row["item_id"]]))
    best = sorted(weighed, key=lambda entry: -entry[0])[:k]
    said = sum(w * e for w, e in best) / (sum(w for w, _ in best) + 1)
    rating = model.mean + bias.get(row["item_id"], 0.0) + own + said
    return min(max(rating, 1.0), 5.0), len(best)


@pytest.mark.parametrize("before_target", [True, False])
@pytest.mark.parametrize("k", [1, 3, 50])
def test_ratings_equal_a_slow_reference(k, before_target):
    interactions, outside = log()
    train = split_of(interactions, "train")
    ratings, n = neighbour_ratings(interactions, train, outside, k, before_target=before_target, **SCALE)
    for place, row in enumerate(interactions.to_pylist()):
        rating, n_neighbours = slow_reference(row, train, outside, k, before_target)
        assert ratings[place] == pytest.approx(rating, abs=1e-6)
        assert n[place] == n_neighbours


def with_rating(table, chosen, rating):
    changed = pc.if_else(chosen, rating, table["rating"])
    return table.set_column(table.column_names.index("rating"), "rating", changed)


def test_a_rows_own_rating_changes_nothing():
    interactions, outside = log(1)
    train = split_of(interactions, "train")
    for place, row in list(enumerate(interactions.to_pylist()))[::7]:
        own = pc.and_(pc.equal(train["user_id"], row["user_id"]), pc.equal(train["item_id"], row["item_id"]))
        one = interactions.slice(place, 1)
        answers = [
            neighbour_ratings(one, with_rating(train, own, rating), outside, 5, before_target=False, **SCALE)[0]
            for rating in (1.0, 5.0)
        ]
        np.testing.assert_array_equal(*answers)


def test_later_ratings_of_the_user_change_nothing_before_the_target():
    interactions, outside = log(2)
    train = split_of(interactions, "train")
    user = train["user_id"][0].as_py()
    one = train.filter(pc.and_(pc.equal(train["user_id"], user), pc.equal(train["position"], 2)))
    later = pc.and_(pc.equal(train["user_id"], user), pc.greater_equal(train["position"], 2))
    answers = [
        neighbour_ratings(one, with_rating(train, later, rating), outside, 5, before_target=True, **SCALE)[0]
        for rating in (1.0, 5.0)
    ]
    np.testing.assert_array_equal(*answers)


def test_no_test_rating_is_read():
    interactions, outside = log(3)
    train, test = split_of(interactions, "train"), split_of(interactions, "test").drop_columns("rating")
    ratings, _ = neighbour_ratings(test, train, outside, 5, before_target=True, **SCALE)
    assert np.isfinite(ratings).all()


def test_like_minded_users_are_believed():
    interactions, outside = log(4, n_users=40, n_items=30)
    train, test = split_of(interactions, "train"), split_of(interactions, "test")
    truth = test["rating"].to_numpy()
    errors = [
        np.mean((neighbour_ratings(test, train, outside, k, before_target=True, **SCALE)[0] - truth) ** 2)
        for k in (0, 20)
    ]
    assert errors[1] < 0.9 * errors[0]


def test_an_item_that_nobody_rated_has_no_neighbours():
    interactions, outside = log(5)
    train = split_of(interactions, "train")
    row = pa.table({"user_id": [train["user_id"][0].as_py()], "item_id": ["new"], "position": [99]})
    ratings, n = neighbour_ratings(row, train, outside, 5, before_target=True, **SCALE)
    assert n.tolist() == [0]
    assert 1 <= ratings[0] <= 5


def test_the_order_of_the_rows_changes_nothing():
    interactions, outside = log(6)
    train = split_of(interactions, "train")
    order = np.random.default_rng(0).permutation(len(interactions))
    straight, n = neighbour_ratings(interactions, train, outside, 5, before_target=True, **SCALE)
    mixed, n_mixed = neighbour_ratings(interactions.take(order), train, outside, 5, before_target=True, **SCALE)
    np.testing.assert_array_equal(mixed, straight[order])
    np.testing.assert_array_equal(n_mixed, n[order])


def test_splits_in_one_call_get_what_each_gets_alone():
    interactions, outside = log(8)
    train, test = split_of(interactions, "train"), split_of(interactions, "test")
    for before_target in (True, False):
        options = {"before_target": before_target, **SCALE}
        together = neighbour_ratings(pa.concat_tables([train, test]), train, outside, 5, **options)
        alone = [neighbour_ratings(rows, train, outside, 5, **options) for rows in (train, test)]
        for both, parts in zip(together, zip(*alone, strict=True), strict=True):
            np.testing.assert_array_equal(both, np.concatenate(parts))


def test_a_user_without_train_ratings_is_refused_in_a_line():
    interactions, outside = log(9)
    train = split_of(interactions, "train")
    lacking = train.filter(pc.invert(pc.is_in(train["user_id"], pa.array(["u03", "u07"]))))
    with pytest.raises(DataError) as caught:
        neighbour_ratings(interactions, lacking, outside, 5, before_target=True, **SCALE)
    assert caught.value.lines == [
        "data/interactions.parquet user u03: no train rating of 2 user(s) to find neighbours by; "
        "raise data.split.train_fraction or set retrieval.neighbours=0"
    ]


def test_one_user_alone_has_nobody_to_learn_from():
    interactions, outside = log(7)
    alone = interactions.filter(pc.equal(interactions["user_id"], interactions["user_id"][0]))
    with pytest.raises(DataError, match=r"no ratings of other users .* set retrieval.neighbours=0"):
        neighbour_ratings(alone, split_of(alone, "train"), outside.slice(0, 0), 5, before_target=True, **SCALE)
