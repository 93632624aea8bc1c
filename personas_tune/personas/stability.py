"""Would the users be grouped alike by other draws of k-means++?

A grouping is the best of ten k-means starts (see :func:`~personas_tune.personas.clustering.cluster_users`), and a seed
changes these starts and nothing else. So this measures how firmly the search finds one grouping of these very profiles,
not how it would change with other users, other texts or another embedder; that takes resampling.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import adjusted_rand_score

from personas_tune.personas.clustering import UserClusters, cluster_users


@dataclass(frozen=True)
class Stability:
    """How alike groupings are.

    Args:
        seeds: Those of the groupings, the experiment's own first.
        adjusted_rand: Of each pair of groupings, in the order of ``itertools.combinations``: 1 if they are the same
            but for the numbers of the groups, about 0 if they have no more in common than chance would give.
    """

    seeds: list[int]
    adjusted_rand: list[float]

    def __str__(self) -> str:
        return f"adjusted Rand over {len(self.seeds)} seeds {self.mean:.2f} (lowest {self.low:.2f})"

    @property
    def mean(self) -> float:
        """Over all pairs."""
        return float(np.mean(self.adjusted_rand))

    @property
    def low(self) -> float:
        """Of the pair that differs most."""
        return min(self.adjusted_rand)


def measure_stability(
    profile_embeddings: NDArray[np.float32], clusters: UserClusters, seed: int, n_seeds: int
) -> Stability:
    """Cluster the users again with other seeds; each grouping is again the best of ten starts.

    Args:
        profile_embeddings: One row per user, shape ``(n_users, dim)``, rows of unit length.
        clusters: What the experiment's seed gave.
        seed: The experiment's; those after it are tried.
        n_seeds: How many others, at least 1.
    """
    others = [seed + turn for turn in range(1, n_seeds + 1)]
    again = [cluster_users(profile_embeddings, clusters.k, other).personas for other in others]
    return Stability([seed, *others], pairwise_adjusted_rand([clusters.personas, *again]))


def pairwise_adjusted_rand(groupings: Sequence[Sequence[int] | NDArray[np.int32]]) -> list[float]:
    """The adjusted Rand index of each pair of groupings.

    Example:
        >>> pairwise_adjusted_rand([[0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 0, 1]])
        [1.0, -0.5, -0.5]
    """
    return [float(adjusted_rand_score(one, other)) for one, other in combinations(groupings, 2)]
