"""Rating models on arrays: user and item biases, and biased matrix factorisation.

Both minimise squared error with an L2 penalty by alternating between users and items, each half-step
solved exactly. Nothing here draws on a rating's order in time or chooses its own penalties; callers do:
the baselines tune theirs, the neighbours' ratings have fixed ones.

Shapes: N ratings, U users, I items, R rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

# Biases count as converged when no user's moves by more stars than this in one sweep.
_TOLERANCE = 1e-7
_MAX_SWEEPS = 1000
_INITIAL_SCALE = 0.1


@dataclass(frozen=True)
class Ratings:
    """N ratings as parallel arrays; users and items are numbered from 0.

    Args:
        users: User of each rating, shape ``(N,)``.
        items: Item of each rating, shape ``(N,)``.
        values: The ratings, shape ``(N,)``.
        n_users: How many users there are, rated or not (U).
        n_items: How many items there are, rated or not (I).
    """

    users: Indices
    items: Indices
    values: Floats
    n_users: int
    n_items: int

    def __len__(self) -> int:
        return len(self.values)

    def where(self, chosen: NDArray[np.bool_]) -> "Ratings":
        """The ratings at the true entries of ``chosen``, shape ``(N,)``."""
        return Ratings(self.users[chosen], self.items[chosen], self.values[chosen], self.n_users, self.n_items)

    def joined(self, other: "Ratings") -> "Ratings":
        """These ratings followed by ``other``, whose users and items are numbered alike."""
        users, items = np.append(self.users, other.users), np.append(self.items, other.items)
        return Ratings(users, items, np.append(self.values, other.values), self.n_users, self.n_items)


class Penalties(NamedTuple):
    """L2 penalties; a user with ``user`` ratings keeps half of its deviation, an item with ``item`` likewise."""

    user: float
    item: float
    factor: float = 0.0


@dataclass(frozen=True)
class Factors:
    """A rating model ``mean + user_bias + item_bias + <user_factors, item_factors>``.

    Users and items without a rating have zeros, so that they are predicted by what is left.

    Args:
        mean: Mean of the ratings that the model was fitted on.
        user_biases: Shape ``(U,)``.
        item_biases: Shape ``(I,)``.
        user_factors: Shape ``(U, R)``; R is 0 for a model of biases only.
        item_factors: Shape ``(I, R)``.
    """

    mean: float
    user_biases: Floats
    item_biases: Floats
    user_factors: Floats
    item_factors: Floats

    def predict(self, users: Indices, items: Indices) -> Floats:
        """Predicted ratings of pairs, not clipped to a scale, shape ``(len(users),)``."""
        products = np.einsum("nr,nr->n", self.user_factors[users], self.item_factors[items])
        return np.asarray(self.mean + self.user_biases[users] + self.item_biases[items] + products)


def fit_biases(ratings: Ratings, penalties: Penalties) -> Factors:
    """Fit ``mean + user_bias + item_bias`` (Koren, Bell & Volinsky 2009, equation 3) to convergence.

    The mean is the plain mean of the ratings; the biases minimise
    ``sum (r - mean - b_u - b_i)^2 + penalties.user sum b_u^2 + penalties.item sum b_i^2``.

    Args:
        ratings: At least one rating.
        penalties: Those of users and items, above 0.
    """
    mean = float(ratings.values.mean())
    residuals = ratings.values - mean
    shape = (ratings.n_users, ratings.n_items)
    counts = csr_array((np.ones(len(ratings)), (ratings.users, ratings.items)), shape=shape)
    counts_by_item = csr_array(counts.T)
    user_sums = np.bincount(ratings.users, residuals, minlength=ratings.n_users)
    item_sums = np.bincount(ratings.items, residuals, minlength=ratings.n_items)
    user_weights = np.bincount(ratings.users, minlength=ratings.n_users) + penalties.user
    item_weights = np.bincount(ratings.items, minlength=ratings.n_items) + penalties.item
    user_biases, item_biases = np.zeros(ratings.n_users), np.zeros(ratings.n_items)
    for _ in range(_MAX_SWEEPS):
        previous = user_biases
        user_biases = (user_sums - counts @ item_biases) / user_weights
        item_biases = (item_sums - counts_by_item @ user_biases) / item_weights
        if np.abs(user_biases - previous).max() < _TOLERANCE:
            break
    return Factors(mean, user_biases, item_biases, np.zeros((ratings.n_users, 0)), np.zeros((ratings.n_items, 0)))


@dataclass(frozen=True)
class _Bucket:
    """Owners (users, or items) with about equally many ratings, padded to one length L.

    Args:
        owners: Shape ``(G,)``.
        others: The other side of each rating, shape ``(G, L)``; one past the last one for padding.
        values: The ratings, shape ``(G, L)``; any number for padding, as its features are nought.
    """

    owners: Indices
    others: Indices
    values: Floats


def _fill_buckets(owners: Indices, others: Indices, values: Floats, n_others: int) -> list[_Bucket]:
    """Sort ratings into buckets of 1, 2, 4, 8, ... ratings an owner, so that NumPy solves many owners at once."""
    order = np.argsort(owners, kind="stable")
    distinct, starts, n = np.unique(owners[order], return_index=True, return_counts=True)
    lengths = 2 ** np.ceil(np.log2(n)).astype(np.int64)
    buckets = []
    for length in np.unique(lengths):
        mine = lengths == length
        steps = np.arange(length)
        is_rating = steps < n[mine, None]
        rows = order[np.where(is_rating, starts[mine, None] + steps, 0)]
        bucket = _Bucket(distinct[mine], np.where(is_rating, others[rows], n_others), values[rows])
        buckets.append(bucket)
    return buckets


def _solve_owners(
    buckets: list[_Bucket], n_owners: int, biases: Floats, factors: Floats, penalties: Floats
) -> tuple[Floats, Floats]:
    """Each owner's best bias and factors while the other side's ``biases`` and ``factors`` stand still."""
    features = np.pad(np.column_stack([np.ones(len(factors)), factors]), ((0, 1), (0, 0)))
    offsets = np.append(biases, 0.0)
    solutions = np.zeros((n_owners, features.shape[1]))
    for bucket in buckets:
        seen = features[bucket.others]
        targets = bucket.values - offsets[bucket.others]
        gram = seen.transpose(0, 2, 1) @ seen + np.diag(penalties)
        moments = (targets[:, None, :] @ seen).transpose(0, 2, 1)
        solutions[bucket.owners] = np.linalg.solve(gram, moments)[:, :, 0]
    return solutions[:, 0], solutions[:, 1:]


def fit_factors(
    ratings: Ratings, start: Factors, rank: int, penalties: Penalties, n_sweeps: int, seeds: Sequence[int]
) -> list[Factors]:
    """Fit a biased matrix factorisation by alternating least squares, once from each seed's first factors.

    Minimises the error of :func:`fit_biases` with an inner product of factors added (Koren, Bell &
    Volinsky 2009, equation 5). With rank 0 the biases that :func:`fit_biases` found stay as they are.

    Args:
        ratings: At least one rating.
        start: The model of biases to begin from, fitted on the same ratings.
        rank: Length of a user's and an item's factors.
        penalties: Each above 0.
        n_sweeps: How many times users and items are solved in turn; at least 1.
        seeds: Each seeds the items' first factors of one fit.
    """
    centred = ratings.values - start.mean
    by_user = _fill_buckets(ratings.users, ratings.items, centred, ratings.n_items)
    by_item = _fill_buckets(ratings.items, ratings.users, centred, ratings.n_users)
    user_penalties = np.array([penalties.user] + [penalties.factor] * rank)
    item_penalties = np.array([penalties.item] + [penalties.factor] * rank)

    def fit(seed: int) -> Factors:
        q_bias, q = start.item_biases, np.random.default_rng(seed).normal(0, _INITIAL_SCALE, (ratings.n_items, rank))
        for _ in range(n_sweeps):
            p_bias, p = _solve_owners(by_user, ratings.n_users, q_bias, q, user_penalties)
            q_bias, q = _solve_owners(by_item, ratings.n_items, p_bias, p, item_penalties)
        return Factors(start.mean, p_bias, q_bias, p, q)

    return [fit(seed) for seed in seeds]
