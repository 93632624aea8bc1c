from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.model_selection import GroupKFold
from threadpoolctl import threadpool_limits

from personas_tune.errors import EvaluationError
from personas_tune.evaluation.baselines import _last_rows, fit_baselines, shrunk_means
from personas_tune.evaluation.prompt_numbers import prompt_numbers
from personas_tune.evaluation.ridge import cross_validated_ridge
from personas_tune.schema import PREDICTORS

NAMES = [
    "constant",
    "global_mean",
    "user_mean",
    "item_mean",
    "user_item_bias",
    "matrix_factorisation",
    "ridge_prompt_numbers",
]
LABELS = [1.0, 2.0, 3.0, 4.0, 5.0]


class World(NamedTuple):
    train: pa.Table
    outside: pa.Table
    test: pa.Table
    items: pa.Table
    users: pa.Table
    train_samples: pa.Table


def make_world(n_users: int = 16, n_outside: int = 30, n_items: int = 40, n_each: int = 25, seed: int = 0) -> World:
    """Ratings from user offsets, item offsets and two planted factors; the last 40% of a cohort user are test rows."""
    rng = np.random.default_rng(seed)
    total = n_users + n_outside
    tastes, traits = rng.normal(0, 0.6, (total, 2)), rng.normal(0, 1.0, (2, n_items))
    truth = 3.4 + rng.normal(0, 0.5, total)[:, None] + rng.normal(0, 0.6, n_items) + tastes @ traits
    users = np.repeat(np.arange(total), n_each)
    items = np.concatenate([rng.permutation(n_items)[:n_each] for _ in range(total)])
    ratings = np.clip(np.rint(truth[users, items] + rng.normal(0, 0.3, len(users))), 1, 5)
    positions = np.tile(np.arange(n_each), total)
    log = tabulate(users, items, ratings, positions)
    in_cohort, early = users < n_users, positions < 0.6 * n_each
    return World(
        train=log.filter(in_cohort & early),
        outside=log.filter(~in_cohort),
        test=log.filter(in_cohort & ~early),
        items=describe_items(log.filter(~in_cohort), n_items),
        users=describe_users(log.filter(in_cohort & early)),
        train_samples=log.filter(in_cohort & early),
    )


def tabulate(users, items, ratings, positions) -> pa.Table:
    memories = [[int(position) - 1] if position else [] for position in positions]
    return pa.table(
        {
            "user_id": [f"u{user:03}" for user in users],
            "item_id": [f"i{item:03}" for item in items],
            "rating": np.asarray(ratings, dtype=float),
            "position": pa.array(positions, pa.int32()),
            "memory_positions": pa.array(memories, pa.list_(pa.int32())),
        }
    )


def describe_items(outside: pa.Table, n_items: int) -> pa.Table:
    names = [f"i{item:03}" for item in range(n_items)]
    rated = np.array(outside["item_id"].to_pylist())
    ratings = outside["rating"].to_numpy()
    means = [float(ratings[rated == name].mean()) if (rated == name).any() else None for name in names]
    return pa.table(
        {
            "item_id": names,
            "mean_rating": pa.array(means, pa.float64()),
            "n_ratings": pa.array([int((rated == name).sum()) for name in names], pa.int32()),
            "year": pa.array([1980 + item for item in range(n_items)], pa.int32()),
        }
    )


def describe_users(train: pa.Table) -> pa.Table:
    names = sorted(set(train["user_id"].to_pylist()))
    n = len(names)
    columns = {name: np.linspace(0, 1, n) for name in ("activity", "conformity", "diversity")}
    tiers = {f"{name}_tier": pa.array([1 + place % 3 for place in range(n)], pa.int32()) for name in columns}
    return pa.table({"user_id": names, **columns, **tiers})


def fit(world: World, **settings):
    return fit_baselines(*world, labels=LABELS, **settings)


def rmse(world: World, baseline) -> float:
    return float(np.sqrt(np.mean((baseline.predicted - world.test["rating"].to_numpy()) ** 2)))


def assert_same(some, others) -> None:
    assert list(some) == list(others)
    for name in some:
        assert some[name].predicted.tobytes() == others[name].predicted.tobytes(), name
        assert (some[name].tuned, some[name].sd) == (others[name].tuned, others[name].sd)


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


@pytest.fixture(scope="module")
def fitted(world):
    return fit(world)


def test_every_baseline_predicts_every_test_row_within_the_scale(world, fitted):
    assert list(fitted) == NAMES
    for baseline in fitted.values():
        assert baseline.predicted.shape == (len(world.test),)
        assert baseline.predicted.min() >= 1
        assert baseline.predicted.max() <= 5


def test_constant_and_global_mean_equal_the_hand_computed_ones(world, fitted):
    ratings = world.train["rating"].to_numpy()
    errors = [np.mean((ratings - label) ** 2) for label in LABELS]
    assert set(fitted["constant"].predicted) == {LABELS[int(np.argmin(errors))]}
    assert fitted["constant"].tuned == {"label": LABELS[int(np.argmin(errors))]}
    assert fitted["global_mean"].predicted == pytest.approx(ratings.mean())


def test_user_and_item_means_are_means_shrunk_by_what_was_tuned(world, fitted):
    def by_hand(rows: pa.Table, column: str, shrinkage: float) -> list[float]:
        ids, ratings = np.array(rows[column].to_pylist()), rows["rating"].to_numpy()
        expected = []
        for name in world.test[column].to_pylist():
            mine = ratings[ids == name]
            expected.append((mine.sum() + shrinkage * ratings.mean()) / (len(mine) + shrinkage))
        return expected

    seen = pa.concat_tables([world.train, world.outside])
    user_mean, item_mean = fitted["user_mean"], fitted["item_mean"]
    assert user_mean.predicted == pytest.approx(by_hand(world.train, "user_id", user_mean.tuned["shrinkage"]))
    assert item_mean.predicted == pytest.approx(by_hand(seen, "item_id", item_mean.tuned["shrinkage"]))


def test_biases_equal_the_closed_form_ridge_regression_on_train_and_outside_rows(world, fitted):
    seen = pa.concat_tables([world.train, world.outside])
    names = {column: sorted(set(seen[column].to_pylist())) for column in ("user_id", "item_id")}

    def indicators(rows: pa.Table) -> np.ndarray:
        places = [[ids.index(name) for name in rows[column].to_pylist()] for column, ids in names.items()]
        return np.hstack([np.eye(len(ids))[at] for at, ids in zip(places, names.values(), strict=True)])

    tuned, mean = fitted["user_item_bias"].tuned, seen["rating"].to_numpy().mean()
    penalties = np.repeat([tuned["user_penalty"], tuned["item_penalty"]], [len(ids) for ids in names.values()])
    design = indicators(seen)
    solution = np.linalg.solve(design.T @ design + np.diag(penalties), design.T @ (seen["rating"].to_numpy() - mean))
    expected = np.clip(mean + indicators(world.test) @ solution, 1, 5)
    assert fitted["user_item_bias"].predicted == pytest.approx(expected, abs=1e-5)


def test_errors_on_held_out_rows_equal_the_hand_computed_ones(world, fitted):
    """The last fifth of each user's 15 train rows is three, predicted from the twelve before them."""
    late = world.train["position"].to_numpy() >= 12
    early, held_out = world.train.filter(~late), world.train.filter(late)
    before, truth = early["rating"].to_numpy(), held_out["rating"].to_numpy()
    label = min(LABELS, key=lambda each: np.mean((before - each) ** 2))
    assert fitted["constant"].sd == pytest.approx(np.sqrt(np.mean((truth - label) ** 2)))
    assert fitted["global_mean"].sd == pytest.approx(np.sqrt(np.mean((truth - before.mean()) ** 2)))
    shrinkage = fitted["user_mean"].tuned["shrinkage"]
    means = {
        user: (before[mine].sum() + shrinkage * before.mean()) / (mine.sum() + shrinkage)
        for user in set(early["user_id"].to_pylist())
        for mine in [np.array(early["user_id"].to_pylist()) == user]
    }
    said = np.array([means[user] for user in held_out["user_id"].to_pylist()])
    assert fitted["user_mean"].sd == pytest.approx(np.sqrt(np.mean((truth - said) ** 2)))


def test_the_ridge_regressions_error_is_that_of_users_it_was_not_fitted_on(world, fitted):
    numbers = prompt_numbers(world.train_samples, world.train, world.items, world.users, "outside", leave_own_out=True)
    ratings, users = world.train["rating"].to_numpy(), np.array(world.train["user_id"].to_pylist())
    chosen = cross_validated_ridge(numbers, ratings, np.unique(users, return_inverse=True)[1])
    said = np.empty(len(users))
    for train, rest in GroupKFold(5).split(numbers, ratings, users):
        said[rest] = clone(chosen).fit(numbers[train], ratings[train]).predict(numbers[rest])
    expected = np.sqrt(np.mean((np.clip(said, 1, 5) - ratings) ** 2))
    assert fitted["ridge_prompt_numbers"].sd == pytest.approx(expected)


def test_neighbours_are_as_wrong_as_on_the_train_samples(world):
    said = pa.array(np.linspace(0, 6, len(world.train_samples)))
    tables = [
        table.append_column("neighbours_rating", said.slice(0, len(table))).append_column(
            "n_neighbours", pa.array([3] * len(table))
        )
        for table in (world.test, world.train_samples)
    ]
    fitted = fit(world._replace(test=tables[0], train_samples=tables[1]))
    errors = np.clip(said.to_numpy(), 1, 5) - world.train_samples["rating"].to_numpy()
    assert fitted["neighbours"].sd == pytest.approx(np.sqrt(np.mean(errors**2)))
    assert set(fitted) <= set(PREDICTORS)  # no agent may be called so


def test_richer_models_predict_a_planted_world_better(world, fitted):
    errors = {name: rmse(world, baseline) for name, baseline in fitted.items()}
    assert errors["matrix_factorisation"] < errors["user_item_bias"] < errors["item_mean"] < errors["global_mean"]
    assert errors["user_item_bias"] < errors["user_mean"] < errors["global_mean"] <= errors["constant"]
    assert errors["ridge_prompt_numbers"] < min(errors["user_mean"], errors["item_mean"])


def test_test_ratings_change_no_prediction(world, fitted):
    ratings = world.test["rating"].to_numpy()
    permuted = world.test.set_column(2, "rating", pa.array(np.random.default_rng(1).permutation(ratings)))
    assert_same(fit(world._replace(test=permuted)), fitted)
    assert_same(fit(world._replace(test=world.test.drop_columns(["rating", "position"]))), fitted)


def test_order_of_rows_changes_no_prediction(world, fitted):
    rng = np.random.default_rng(2)
    shuffled = {name: getattr(world, name) for name in ("train", "outside", "train_samples", "test")}
    orders = {name: rng.permutation(len(table)) for name, table in shuffled.items()}
    again = fit(world._replace(**{name: table.take(orders[name]) for name, table in shuffled.items()}))
    for name in NAMES:
        assert again[name].predicted.tobytes() == fitted[name].predicted[orders["test"]].tobytes(), name


def test_same_seed_gives_the_same_bytes_with_any_number_of_threads(world, fitted):
    with threadpool_limits(limits=2):
        assert_same(fit(world), fitted)


def test_seed_matters_to_the_matrix_factorisation_alone(world, fitted):
    again = fit(world, seed=100)
    changed = [name for name in NAMES if not np.array_equal(again[name].predicted, fitted[name].predicted)]
    assert changed == ["matrix_factorisation"]
    errors = [rmse(world, baselines["matrix_factorisation"]) for baselines in (again, fitted)]
    assert errors[0] == pytest.approx(errors[1], abs=0.05)


def test_unknown_users_and_items_get_finite_predictions(world, fitted):
    strangers = tabulate([900, 0, 900], [0, 900, 900], [1.0, 1.0, 1.0], [0, 0, 0])
    known = world.users.slice(0, 1).set_column(0, "user_id", pa.array(["u900"]))
    asked = world._replace(test=strangers, users=pa.concat_tables([world.users, known]))
    predictions = {name: baseline.predicted for name, baseline in fit(asked).items()}
    assert all(np.isfinite(predicted).all() for predicted in predictions.values())
    everything = np.append(world.train["rating"].to_numpy(), world.outside["rating"].to_numpy())
    assert predictions["user_mean"][0] == pytest.approx(world.train["rating"].to_numpy().mean())
    assert predictions["item_mean"][1] == pytest.approx(everything.mean())
    assert predictions["user_item_bias"][2] == pytest.approx(everything.mean())


def test_without_outside_rows_the_cohorts_own_train_rows_do(world):
    alone = world._replace(outside=world.outside.slice(0, 0))
    assert all(np.isfinite(baseline.predicted).all() for baseline in fit(alone).values())


def test_one_train_row_is_enough_to_predict_with():
    world = make_world(n_users=1, n_outside=0, n_each=3)
    world = world._replace(train=world.train.slice(0, 1), train_samples=world.train_samples.slice(0, 1))
    rating = world.train["rating"][0].as_py()
    assert all(baseline.predicted == pytest.approx(rating, abs=1e-6) for baseline in fit(world).values())
    assert {baseline.sd for baseline in fit(world).values()} == {None}


def test_no_train_row_is_an_error(world):
    with pytest.raises(EvaluationError, match="no train row"):
        fit(world._replace(train=world.train.slice(0, 0)))


def test_shrunk_means_equal_the_hand_computed_ones():
    owners, values = np.array([0, 0, 1]), np.array([1.0, 3.0, 5.0])
    assert shrunk_means(owners, values, 3, 0.0) == pytest.approx([2.0, 5.0, 3.0])
    assert shrunk_means(owners, values, 3, 1.0) == pytest.approx([(4 + 3) / 3, (5 + 3) / 2, 3.0])


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_the_last_fifth_of_each_users_train_rows_is_for_tuning(n_of_user):
    last = _last_rows(np.repeat(np.arange(len(n_of_user)), n_of_user))
    for mine in np.split(last, np.cumsum(n_of_user)[:-1]):
        assert not np.any(np.diff(mine.astype(int)) < 0)  # they come last
        assert mine.sum() == pytest.approx(len(mine) / 5, abs=0.8)
        assert not mine.all()
        assert mine.any() == (len(mine) > 1)
