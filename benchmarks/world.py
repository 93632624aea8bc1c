"""How well simple predictors do on synthetic worlds, beside the best possible one (the table in docs/world.md).

    OMP_NUM_THREADS=1 python benchmarks/world.py

Everything is fitted on the first 60% of each user's rows and measured on the rest. `true bias and groups` knows the
users' and items' biases and the users' group weights, and lacks only the users' own tastes; `bias, group's items` knows
each user's strongest group and learns the rest from ratings. Both use the truth, so no agent can be held to them.
"""

import time

import numpy as np
from numpy.typing import NDArray

from personas_tune.interactions.world import GLOBAL_SCORE, NOISE_SD, World, generate_world, rating_moments

Floats, Ints = NDArray[np.float64], NDArray[np.int64]
WORLDS = ((1000, 6, 0), (1000, 4, 1), (1000, 6, 2), (3000, 6, 0))  # users, groups, seed
N_ITEMS, MEAN_INTERACTIONS = 400, 80
SHRINKAGE = 5.0  # pseudo-ratings


def main() -> None:
    for n_users, n_groups, seed in WORLDS:
        started = time.process_time()
        world = generate_world(n_users, N_ITEMS, n_groups, MEAN_INTERACTIONS, seed)
        seconds = time.process_time() - started
        print(
            f"{n_users} users x {N_ITEMS} items, {n_groups} groups, seed {seed}; drawn in {seconds:.1f} s of CPU time"
        )
        for name, rmse in errors(world).items():
            print(f"  {name:<22}{rmse:.3f}")


def errors(world: World) -> dict[str, float]:
    """Test RMSE of each predictor."""
    table, truth = world.interactions, world.truth
    user = np.unique(table["user_id"].to_numpy(), return_inverse=True)[1]
    item = np.unique(table["item_id"].to_numpy(), return_inverse=True)[1]
    rating = table["rating"].to_numpy()
    counts = np.bincount(user)
    train = np.arange(len(user)) - (np.cumsum(counts) - counts)[user] < (0.6 * counts).astype(int)[user]

    mean, user_bias, item_bias = fit_biases(user[train], item[train], rating[train])
    bias = mean + user_bias[user] + item_bias[item]
    # The item as the user's strongest group likes it: one mean of what the biases leave, for each group and item.
    group_item = truth.group_weights.argmax(axis=1)[user] * N_ITEMS + item
    own_taste_sd = float((truth.affinity - truth.group_affinity).std())
    known_score = GLOBAL_SCORE + truth.bias + truth.group_affinity
    predicted = {
        "optimal": world.oracle["optimal"].to_numpy(),
        "true bias and groups": rating_moments(known_score, float(np.hypot(NOISE_SD, own_taste_sd)))[0],
        "bias, group's items": bias + mean_by(group_item, rating - bias, train, SHRINKAGE),
        "bias": bias,
        "user mean": mean + mean_by(user, rating - mean, train, 0.0),
        "item mean": mean + mean_by(item, rating - mean, train, SHRINKAGE),
        "global mean": np.full(len(rating), mean),
    }
    test = ~train
    return {name: float(np.sqrt(np.mean((p[test] - rating[test]) ** 2))) for name, p in predicted.items()}


def fit_biases(user: Ints, item: Ints, rating: Floats) -> tuple[float, Floats, Floats]:
    """Alternating shrunk least squares of ``mean + user bias + item bias``."""
    mean = float(rating.mean())
    user_bias, item_bias = np.zeros(user.max() + 1), np.zeros(N_ITEMS)
    for _ in range(20):
        item_bias = shrunk_means(item, rating - mean - user_bias[user], N_ITEMS, SHRINKAGE)
        user_bias = shrunk_means(user, rating - mean - item_bias[item], len(user_bias), SHRINKAGE)
    return mean, user_bias, item_bias


def mean_by(group: Ints, values: Floats, train: NDArray[np.bool_], shrinkage: float) -> Floats:
    """Each row's group mean over the train rows, drawn towards zero."""
    return shrunk_means(group[train], values[train], int(group.max()) + 1, shrinkage)[group]


def shrunk_means(group: Ints, values: Floats, n_groups: int, shrinkage: float) -> Floats:
    """Mean of ``values`` in each group, as if ``shrinkage`` more of them were zero."""
    counts = np.bincount(group, minlength=n_groups) + shrinkage
    return np.bincount(group, values, n_groups) / np.maximum(counts, 1e-9)


if __name__ == "__main__":
    main()
