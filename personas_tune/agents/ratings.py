"""What an agent says of some items: a distribution over the rating labels for each."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from personas_tune.evaluation.readouts import Probabilities, expected_ratings, most_likely_ratings


@dataclass(frozen=True, eq=False)
class Ratings:
    """One user's ratings of some items, as distributions.

    Args:
        user_id: Whose they are.
        items: Ids of the items, in the order they were asked for; a new item's title.
        labels: The rating labels, lowest first.
        p: Their probabilities, shape ``(n_items, n_labels)``; rows sum to 1.

    Example:
        >>> ratings = Ratings("u1", ("heat", "alien"), ("1", "2", "3"), np.array([[0.1, 0.1, 0.8], [0.6, 0.4, 0.0]]))
        >>> ratings.expected.round(2).tolist(), ratings.most_likely.tolist()
        ([2.7, 1.4], [3.0, 1.0])
    """

    user_id: str
    items: tuple[str, ...]
    labels: tuple[str, ...]
    p: Probabilities

    def __len__(self) -> int:
        return len(self.items)

    @property
    def values(self) -> list[float]:
        """The labels as numbers."""
        return [float(label) for label in self.labels]

    @property
    def expected(self) -> NDArray[np.float64]:
        """Each item's mean rating, shape ``(n_items,)``."""
        return expected_ratings(self.p, self.values)

    @property
    def most_likely(self) -> NDArray[np.float64]:
        """Each item's most probable rating, the lower one on ties, shape ``(n_items,)``."""
        return most_likely_ratings(self.p, self.values)

    def draw(self, rng: np.random.Generator) -> NDArray[np.float64]:
        """A rating of each item, drawn from its distribution, shape ``(n_items,)``.

        Args:
            rng: One uniform number is taken from it for each item.
        """
        below = self.p.cumsum(axis=1)
        drawn = (rng.random(len(self)) * below[:, -1])[:, np.newaxis] < below  # a row's sum is 1 but for rounding
        return np.asarray(np.asarray(self.values)[drawn.argmax(axis=1)])
