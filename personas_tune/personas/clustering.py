"""Users to personas: KMeans++ on profile embeddings, and how many personas there should be."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_score
from threadpoolctl import threadpool_limits

from personas_tune.errors import ClusteringError

_N_INIT = 10
# Two profiles whose vectors agree in so many decimals count as the same one.
_DECIMALS = 6
# The silhouette compares every pair of users; of more users than this a seeded sample is measured.
_SILHOUETTE_USERS = 5000


@dataclass(frozen=True, eq=False)
class UserClusters:
    """Users grouped into personas, the largest persona first.

    Args:
        personas: Each user's persona, shape ``(n_users,)``, from 0.
        distances: Euclidean distance to the centre of that persona, shape ``(n_users,)``.
        centres: Shape ``(k, dim)``.
        inertia: Sum of squared distances.
    """

    personas: NDArray[np.int32]
    distances: NDArray[np.float64]
    centres: NDArray[np.float64]
    inertia: float

    @property
    def k(self) -> int:
        """How many personas there are."""
        return len(self.centres)

    @property
    def sizes(self) -> list[int]:
        """Users of each persona; never rises."""
        return [int(size) for size in np.bincount(self.personas, minlength=self.k)]


def cluster_users(profile_embeddings: NDArray[np.float32], k: int, seed: int) -> UserClusters:
    """Group users with similar profile embeddings into ``k`` personas.

    Personas are numbered by size, the largest is 0. Numbers carry no further meaning: compare
    groupings, not label values. The number of threads changes nothing.

    Args:
        profile_embeddings: One row per user, shape ``(n_users, dim)``, rows of unit length.
        k: How many personas to form, from 1 to ``n_users``.
        seed: Seeds the k-means++ draws.

    Raises:
        ClusteringError: If ``k`` is not between 1 and the number of different profiles.

    Example:
        >>> profiles = np.eye(4, dtype=np.float32)[[0, 1, 1, 1, 2, 2]]
        >>> cluster_users(profiles, k=3, seed=0).personas.tolist()
        [2, 0, 0, 0, 1, 1]
    """
    _check_k(profile_embeddings, k)
    points = profile_embeddings.astype(np.float64)
    with threadpool_limits(1):
        fit = KMeans(n_clusters=k, init="k-means++", n_init=_N_INIT, random_state=seed).fit(points)
    personas, _ = assign_users(points, fit.cluster_centers_)
    order = _by_size(personas, k)
    centres = fit.cluster_centers_[order]
    personas = np.argsort(order)[personas].astype(np.int32)
    distances = _distances(points, centres)[np.arange(len(points)), personas]
    return UserClusters(personas, distances, centres, inertia=float((distances**2).sum()))


def assign_users(
    profile_embeddings: NDArray[np.floating], centres: NDArray[np.floating]
) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """Give each user, also one that wasn't clustered, the persona with the nearest centre.

    Args:
        profile_embeddings: Shape ``(n_users, dim)``, from the embedder of the clustered profiles.
        centres: Shape ``(k, dim)``.

    Returns:
        Personas and Euclidean distances to their centres, each of shape ``(n_users,)``.
    """
    distances = _distances(profile_embeddings, centres)
    personas = distances.argmin(axis=1)
    return personas.astype(np.int32), distances[np.arange(len(personas)), personas]


@dataclass(frozen=True, eq=False)
class PersonaChoice:
    """The clusters that were taken, beside what every other number of personas would have given.

    Args:
        clusters: The clusters taken.
        candidates: Clusters for k = 1, 2, ... .
        silhouettes: Mean silhouette of each candidate; None where it isn't defined.
        elbow: The k at which the inertia bends, or None where there are too few users to tell.
    """

    clusters: UserClusters
    candidates: list[UserClusters]
    silhouettes: list[float | None]
    elbow: int | None


def choose_personas(profile_embeddings: NDArray[np.float32], k: int | str, k_max: int, seed: int) -> PersonaChoice:
    """Cluster users into every number of personas up to ``k_max`` and take ``k``, or the elbow.

    Args:
        profile_embeddings: One row per user, shape ``(n_users, dim)``, rows of unit length.
        k: A number, or ``"elbow"``.
        k_max: The largest number that is tried; fewer where there are fewer different profiles.
        seed: Seeds the k-means++ draws.

    Raises:
        ClusteringError: If there are too few users, or too few different profiles, for ``k``.
    """
    k_wanted = 1 if isinstance(k, str) else k
    _check_k(profile_embeddings, k_wanted)
    largest = min(max(k_max, k_wanted), _n_different(profile_embeddings))
    candidates = [cluster_users(profile_embeddings, n, seed) for n in range(1, largest + 1)]
    elbow = find_elbow([candidate.inertia for candidate in candidates])
    if isinstance(k, str):
        if elbow is None:
            raise ClusteringError(
                f"{largest} different profile(s) have no elbow",
                where="personas.k",
                remedy="set personas.k=1 or add users",
            )
        k_wanted = elbow
    silhouettes = [_silhouette(profile_embeddings, candidate.personas, seed) for candidate in candidates]
    return PersonaChoice(candidates[k_wanted - 1], candidates, silhouettes, elbow)


def find_elbow(inertias: Sequence[float]) -> int | None:
    """The number of clusters at which more of them stop paying.

    It is the k from 2 on whose inertia lies farthest below the straight line (the chord) from the
    first to the last inertia; the smallest such k on a tie. The last k should lie well beyond the
    bend, or there is none to see.

    Args:
        inertias: Inertia for k = 1, 2, ...

    Returns:
        k, or None for fewer than 3 inertias, between which nothing can bend.

    Example:
        >>> find_elbow([100, 60, 20, 18, 16, 15])
        3
    """
    if len(inertias) < 3:
        return None
    depths = np.linspace(inertias[0], inertias[-1], len(inertias)) - np.asarray(inertias)
    # Rounded, so that a straight line's last digits decide nothing. Measured straight down: on one
    # chord, that ranks points as their perpendicular distance does.
    return int(np.argmax((depths / max(inertias[0], 1e-12)).round(9)[1:])) + 2


def _check_k(profile_embeddings: NDArray[np.floating], k: int) -> None:
    n_users, n_different = len(profile_embeddings), _n_different(profile_embeddings)
    if k < 1:
        raise ClusteringError(f"{k} personas can't be formed", where="personas.k", remedy="set personas.k=1 or more")
    if k > n_users:
        raise ClusteringError(
            f"{k} personas need at least {k} users, there are {n_users}",
            where="personas.k",
            remedy=f"set personas.k={n_users} or fewer, or raise data.cohort.n_users",
        )
    if k > n_different:
        raise ClusteringError(
            f"{k} personas need {k} different profiles, the {n_users} users have {n_different}",
            where="personas.k",
            remedy=f"set personas.k={n_different} or fewer",
        )


def _n_different(profile_embeddings: NDArray[np.floating]) -> int:
    return len(np.unique(profile_embeddings.round(_DECIMALS) + 0.0, axis=0))


def _by_size(personas: NDArray[np.int32], k: int) -> NDArray[np.int64]:
    """Persona numbers, the one with most users first; of equal ones, that with the earliest user."""
    sizes = np.bincount(personas, minlength=k)
    if not sizes.all():
        raise ClusteringError(
            f"only {np.count_nonzero(sizes)} of {k} personas got a user",
            where="personas.k",
            remedy=f"set personas.k={np.count_nonzero(sizes)}",
        )
    first_user = np.array([int(np.argmax(personas == persona)) for persona in range(k)])
    return np.lexsort((first_user, -sizes))


def _distances(points: NDArray[np.floating], centres: NDArray[np.floating]) -> NDArray[np.float64]:
    """Euclidean distances, shape ``(n_users, k)``, each independent of the other rows."""
    points, centres = points.astype(np.float64), centres.astype(np.float64)
    return np.stack([np.sqrt(((points - centre) ** 2).sum(axis=1)) for centre in centres], axis=1)


def _silhouette(profile_embeddings: NDArray[np.float32], personas: NDArray[np.int32], seed: int) -> float | None:
    if len(personas) > _SILHOUETTE_USERS:
        rows = np.random.default_rng(seed).choice(len(personas), _SILHOUETTE_USERS, replace=False)
        profile_embeddings, personas = profile_embeddings[rows], personas[rows]
    if not 2 <= len(np.unique(personas)) < len(personas):
        return None
    with threadpool_limits(1):
        return float(silhouette_score(profile_embeddings.astype(np.float64), personas))
