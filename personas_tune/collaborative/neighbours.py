"""What like-minded users gave an item, put on a user's own scale (user-based collaborative filtering).

    r(u, i) = mean + b_i + b_u + sum_v w_uv (r_vi - mean - b_v - b_i) / (sum_v w_uv + damping)

over the ``k`` users v who rated i and are most like u: the neighbourhood model of Resnick et al. (1994)
on residuals of biases (Koren 2010, section 2.2). ``w`` is the cosine of residuals on items that both
rated, times n / (n + 30) for n such items; unlike users are left out.

The neighbours of a cohort user come from outside the cohort and from the train rows of *other* cohort
users, in folds: whatever is fitted for a user's rows never saw a rating of that user's fold. Of the user
itself only train ratings are known, the target's own never, and only earlier ones where asked for.
"""

from collections.abc import Iterator, Set
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy.sparse import csc_array

from personas_tune.collaborative.factorisation import Penalties, Ratings, fit_biases
from personas_tune.collaborative.numbering import distinct_ids, places_of
from personas_tune.errors import DataError

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

_N_FOLDS = 5
# Chosen on train rows of ml-latest-small: docs/results.md, "What was tried for better agents".
_PENALTIES = Penalties(user=2.0, item=6.0)
_OVERLAP_SHRINKAGE = 30.0
_DAMPING = 1.0
_NO_ROWS: Indices = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class _History:
    """A user's train ratings in order of time: items, ratings, positions, each of shape ``(n,)``."""

    items: Indices
    ratings: Floats
    positions: Indices


@dataclass(frozen=True)
class _Pool:
    """Other users' ratings less ``mean + b_v + b_i``, by item."""

    mean: float
    item_biases: Floats
    residuals: csc_array

    def column(self, item: int) -> tuple[Indices, Floats]:
        """Who rated an item, and their residuals."""
        chosen = slice(self.residuals.indptr[item], self.residuals.indptr[item + 1])
        return self.residuals.indices[chosen], self.residuals.data[chosen]


@dataclass
class _Likeness:
    """How alike one user and everyone in a pool are, as sums over the user's ratings so far.

    The user's own bias changes with each rating; kept as sums, residuals need not be computed again.
    """

    pool: _Pool
    n: int = 0
    total: float = 0.0
    _sums: Floats = field(init=False)  # rows: count, t, t^2, e, e^2, t e, where t = r_u - mean - b_i and e the pool's

    def __post_init__(self) -> None:
        self._sums = np.zeros((6, self.pool.residuals.shape[0]))

    def add(self, item: int, rating: float, sign: int = 1) -> None:
        """Take in a rating of the user; with ``sign`` -1 take it out again."""
        t = rating - self.pool.mean - self.pool.item_biases[item]
        users, e = self.pool.column(item)
        ones = np.ones(len(e))
        self._sums[:, users] += sign * np.stack([ones, t * ones, t * t * ones, e, e * e, t * e])
        self.n += sign
        self.total += sign * t

    @property
    def bias(self) -> float:
        """The user's own bias."""
        return self.total / (self.n + _PENALTIES.user)

    def weights(self, users: Indices) -> Floats:
        """The weights ``w`` of some users of the pool, 0 for unlike ones."""
        n, t, tt, e, ee, te = self._sums[:, users]
        mine = np.maximum(tt - 2 * self.bias * t + n * self.bias**2, 0.0)
        lengths = np.sqrt(mine * np.maximum(ee, 0.0))
        cosines = np.divide(te - self.bias * e, lengths, out=np.zeros(len(users)), where=lengths > 1e-9)
        # Rounded, so that users who are equally alike tie whatever the order of the sums.
        return np.asarray(np.round(np.maximum(cosines, 0.0) * n / (n + _OVERLAP_SHRINKAGE), 9))


def neighbour_ratings(
    rows: pa.Table, train: pa.Table, outside: pa.Table, k: int, *, before_target: bool, low: float, high: float
) -> tuple[Floats, Indices]:
    """What like-minded users say of each row's item, on the row's user's scale.

    Args:
        rows: user_id, item_id, position of the interactions asked for, train or test ones. No rating is read.
        train: The cohort's train interactions: user_id, item_id, position, rating.
        outside: Ratings of users outside the cohort: user_id, item_id, rating; may be empty.
        k: Of the users who rated an item, how many like-minded ones at most.
        before_target: Whether a row's user is known by ratings of earlier positions only.
        low: The scale's lowest rating.
        high: The scale's highest rating.

    Returns:
        Ratings within the scale, and how many users they rest on besides the item's average; both ``(n_rows,)``.

    Raises:
        DataError: If a user has no train rating, or there are no ratings of other users.
    """
    item_ids = distinct_ids(train["item_id"], outside["item_id"], rows["item_id"])
    items = places_of(rows["item_id"], item_ids)
    positions = rows["position"].to_numpy().astype(np.int64)
    asked = _rows_by_user(rows)
    histories = _histories(train, item_ids)
    _require_known(asked.keys(), histories.keys())
    ratings, n_neighbours = np.empty(len(rows)), np.zeros(len(rows), dtype=np.int64)
    for users, pool in _folds(train, outside, item_ids):
        for user in users:
            mine = asked.get(user, _NO_ROWS)
            mine = mine[np.argsort(positions[mine], kind="stable")]
            told = _known_at(_Likeness(pool), histories[user], positions[mine], before_target=before_target)
            for row, likeness in zip(mine, told, strict=True):
                ratings[row], n_neighbours[row] = _predict(likeness, items[row], k)
    # Rounded: a sum from which an own rating was taken out again keeps a trace of it in its last digits.
    return np.asarray(np.round(np.clip(ratings, low, high), 6), dtype=np.float64), n_neighbours


def _require_known(asked: Set[str], known: Set[str]) -> None:
    """Refuse users without a train rating: they are in no fold."""
    unknown = sorted(asked - known)
    if unknown:
        raise DataError(
            f"no train rating of {len(unknown)} user(s) to find neighbours by",
            where=f"data/interactions.parquet user {unknown[0]}",
            remedy="raise data.split.train_fraction or set retrieval.neighbours=0",
        )


def _known_at(
    likeness: _Likeness, history: _History, positions: Indices, *, before_target: bool
) -> Iterator[_Likeness]:
    """The user as known at each of some ascending positions; the same object, changed from one to the next."""
    known = list(zip(history.items.tolist(), history.ratings.tolist(), history.positions.tolist(), strict=True))
    if before_target:
        n_known = 0
        for position in positions:
            while n_known < len(known) and known[n_known][2] < position:
                likeness.add(*known[n_known][:2])
                n_known += 1
            yield likeness
        return
    at = {position: (item, rating) for item, rating, position in known}
    for item, rating, _ in known:
        likeness.add(item, rating)
    for position in positions:
        own = at.get(int(position))
        if own is not None:
            likeness.add(*own, sign=-1)
        yield likeness
        if own is not None:
            likeness.add(*own)


def _predict(likeness: _Likeness, item: int, k: int) -> tuple[float, int]:
    pool = likeness.pool
    users, residuals = pool.column(item)
    weights = likeness.weights(users)
    best = np.argsort(-weights, kind="stable")[:k]
    best = best[weights[best] > 0]
    said = float(weights[best] @ residuals[best]) / (float(weights[best].sum()) + _DAMPING)
    return pool.mean + float(pool.item_biases[item]) + likeness.bias + said, len(best)


def _folds(train: pa.Table, outside: pa.Table, item_ids: pa.Array) -> Iterator[tuple[list[str], _Pool]]:
    """Cohort users of each fold, with the ratings of everyone else."""
    columns = ["user_id", "item_id", "rating"]
    users = sorted(set(train["user_id"].to_pylist()))
    for fold in range(min(_N_FOLDS, len(users))):
        mine = users[fold::_N_FOLDS]
        others = train.filter(pc.invert(pc.is_in(train["user_id"], pa.array(mine, pa.string()))))
        # A cohort user and one outside are never the same, so the two tables can be put one below the other.
        yield mine, _pool([others.select(columns), outside.select(columns)], item_ids)


def _pool(tables: list[pa.Table], item_ids: pa.Array) -> _Pool:
    user_ids = distinct_ids(*(table["user_id"] for table in tables))
    values = np.concatenate([table["rating"].to_numpy().astype(np.float64) for table in tables])
    if len(values) == 0:
        raise DataError(
            "no ratings of other users to find neighbours in", where="data/", remedy="set retrieval.neighbours=0"
        )
    users = np.concatenate([places_of(table["user_id"], user_ids) for table in tables])
    items = np.concatenate([places_of(table["item_id"], item_ids) for table in tables])
    numbered = Ratings(users, items, values, len(user_ids), len(item_ids))
    fitted = fit_biases(numbered, _PENALTIES)
    residuals = values - fitted.predict(users, items)
    matrix = csc_array((residuals, (users, items)), shape=(len(user_ids), len(item_ids)))
    return _Pool(fitted.mean, fitted.item_biases, matrix)


def _histories(train: pa.Table, item_ids: pa.Array) -> dict[str, _History]:
    train = train.sort_by([("user_id", "ascending"), ("position", "ascending")])
    items, ratings = places_of(train["item_id"], item_ids), train["rating"].to_numpy().astype(np.float64)
    positions = train["position"].to_numpy().astype(np.int64)
    return {user: _History(items[mine], ratings[mine], positions[mine]) for user, mine in _rows_by_user(train).items()}


def _rows_by_user(table: pa.Table) -> dict[str, Indices]:
    names, owners = np.unique(np.array(table["user_id"].to_pylist(), dtype=str), return_inverse=True)
    order = np.argsort(owners, kind="stable")
    ends = np.cumsum(np.bincount(owners, minlength=len(names)))[:-1]
    return dict(zip(names.tolist(), np.split(order, ends), strict=True))
