import itertools

import numpy as np
import pytest

from personas_tune.collaborative.factorisation import Penalties, Ratings, fit_biases, fit_factors


def draw_ratings(seed: int, n_users: int = 12, n_items: int = 9, n: int = 60) -> Ratings:
    """Ratings of random pairs, some of them rated twice; the last user and the last item have none."""
    rng = np.random.default_rng(seed)
    users, items = rng.integers(0, n_users - 1, n), rng.integers(0, n_items - 1, n)
    return Ratings(users, items, rng.integers(1, 6, n).astype(float), n_users, n_items)


def every_pair(ratings: Ratings) -> tuple[np.ndarray, np.ndarray]:
    users, items = np.meshgrid(np.arange(ratings.n_users), np.arange(ratings.n_items))
    return users.ravel(), items.ravel()


def penalised_error(ratings: Ratings, model, penalties: Penalties) -> float:
    errors = ratings.values - model.predict(ratings.users, ratings.items)
    biases = penalties.user * np.sum(model.user_biases**2) + penalties.item * np.sum(model.item_biases**2)
    factors = penalties.factor * (np.sum(model.user_factors**2) + np.sum(model.item_factors**2))
    return float(np.sum(errors**2) + biases + factors)


def solve_ridge(design: np.ndarray, targets: np.ndarray, penalties: np.ndarray) -> np.ndarray:
    return np.linalg.solve(design.T @ design + np.diag(penalties), design.T @ targets)


@pytest.mark.parametrize("penalties", [Penalties(1, 1), Penalties(4, 0.5), Penalties(0.1, 20)])
def test_biases_equal_the_closed_form_ridge_regression_on_indicators(penalties):
    ratings = draw_ratings(0)
    design = np.hstack([np.eye(ratings.n_users)[ratings.users], np.eye(ratings.n_items)[ratings.items]])
    strengths = np.repeat([penalties.user, penalties.item], [ratings.n_users, ratings.n_items]).astype(float)
    solution = solve_ridge(design, ratings.values - ratings.values.mean(), strengths)
    model = fit_biases(ratings, penalties)
    assert model.user_biases == pytest.approx(solution[: ratings.n_users], abs=1e-5)
    assert model.item_biases == pytest.approx(solution[ratings.n_users :], abs=1e-5)


def test_a_user_with_as_many_ratings_as_the_penalty_keeps_half_of_its_deviation():
    # The mean is 3; each item has both ratings, so that item biases are nought.
    ratings = Ratings(np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]), np.array([4.0, 4.0, 2.0, 2.0]), 2, 2)
    model = fit_biases(ratings, Penalties(user=2, item=1))
    assert model.predict(np.array([0, 1]), np.array([0, 1])) == pytest.approx([3.5, 2.5], abs=1e-6)


def test_unrated_users_and_items_get_what_is_left_of_the_model():
    ratings = draw_ratings(1)
    stranger, novelty = ratings.n_users - 1, ratings.n_items - 1
    start = fit_biases(ratings, Penalties(2, 2))
    for model in (start, *fit_factors(ratings, start, 3, Penalties(2, 2, 1), 5, [0])):
        asked = model.predict(np.array([stranger, stranger, 0]), np.array([novelty, 0, novelty]))
        what_is_left = np.array([0.0, model.item_biases[0], model.user_biases[0]])
        assert asked == pytest.approx(model.mean + what_is_left)


def test_factors_of_rank_nought_equal_the_bias_model():
    ratings = draw_ratings(2)
    start = fit_biases(ratings, Penalties(2, 3))
    (model,) = fit_factors(ratings, start, 0, Penalties(2, 3, 7), 4, [0])
    assert model.predict(*every_pair(ratings)) == pytest.approx(start.predict(*every_pair(ratings)), abs=1e-6)


def test_huge_factor_penalty_leaves_the_bias_model():
    ratings = draw_ratings(3)
    start = fit_biases(ratings, Penalties(2, 3))
    (model,) = fit_factors(ratings, start, 4, Penalties(2, 3, 1e9), 6, [0])
    assert model.predict(*every_pair(ratings)) == pytest.approx(start.predict(*every_pair(ratings)), abs=1e-6)


def test_each_half_step_solves_every_owner_as_a_loop_of_ridge_regressions_does():
    ratings = draw_ratings(4)
    penalties = Penalties(2, 3, 0.7)
    (model,) = fit_factors(ratings, fit_biases(ratings, penalties), 2, penalties, 3, [5])
    design = np.column_stack([np.ones(ratings.n_users), model.user_factors])
    for item in range(ratings.n_items):
        mine = ratings.items == item
        users = ratings.users[mine]
        targets = ratings.values[mine] - model.mean - model.user_biases[users]
        solution = solve_ridge(design[users], targets, np.array([3.0, 0.7, 0.7]))
        assert [model.item_biases[item], *model.item_factors[item]] == pytest.approx(solution, abs=1e-10)


def test_sweeps_never_raise_the_penalised_error():
    ratings = draw_ratings(5)
    penalties = Penalties(1, 1, 0.5)
    start = fit_biases(ratings, penalties)
    errors = [
        penalised_error(ratings, fit_factors(ratings, start, 3, penalties, n_sweeps, [1])[0], penalties)
        for n_sweeps in range(1, 12)
    ]
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(errors))
    assert errors[-1] < penalised_error(ratings, start, penalties)


def test_planted_factors_are_found_in_rows_that_were_held_out():
    rng = np.random.default_rng(6)
    n_users, n_items, rank = 120, 80, 2
    truth = rng.normal(3, 0.3, n_users)[:, None] + rng.normal(0, 0.3, n_items)
    truth += rng.normal(0, 0.8, (n_users, rank)) @ rng.normal(0, 0.8, (rank, n_items))
    users, items = (axis.ravel() for axis in np.indices(truth.shape))
    values = truth.ravel() + rng.normal(0, 0.1, truth.size)
    shown = rng.random(truth.size) < 0.5
    ratings = Ratings(users, items, values, n_users, n_items).where(shown)
    start = fit_biases(ratings, Penalties(0.1, 0.1))
    (model,) = fit_factors(ratings, start, rank, Penalties(0.1, 0.1, 0.1), 20, [0])

    def held_out_rmse(predictor) -> float:
        errors = predictor.predict(users[~shown], items[~shown]) - truth.ravel()[~shown]
        return float(np.sqrt(np.mean(errors**2)))

    assert held_out_rmse(start) > 0.6
    assert held_out_rmse(model) < 0.06


def test_each_seed_gives_the_fit_that_it_gives_alone():
    ratings = draw_ratings(7)
    penalties = Penalties(1, 1, 1)
    start = fit_biases(ratings, penalties)
    together = fit_factors(ratings, start, 2, penalties, 3, [3, 8])
    alone = fit_factors(ratings, start, 2, penalties, 3, [8])
    assert np.array_equal(together[1].item_factors, alone[0].item_factors)
    assert not np.array_equal(together[0].item_factors, together[1].item_factors)
