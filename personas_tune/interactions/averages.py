"""Historical average ratings of items, as prompts show them."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from personas_tune.interactions.log import Log

HistoricalAverage = Literal["outside", "train", "all", "none"]


def choose_average_rows(
    which: HistoricalAverage, in_cohort: NDArray[np.bool_], is_train: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Which interactions an item's average is made of.

    Args:
        which: ``outside``: those of users outside the cohort; ``train``: also the cohort's train rows;
            ``all``: every one, test rows and the predicted rating itself included, as in the paper; ``none``.
        in_cohort: Whether each interaction is a cohort user's.
        is_train: Whether it lies before the cut.
    """
    if which == "outside":
        return ~in_cohort
    if which == "train":
        return ~in_cohort | is_train
    return np.full(len(in_cohort), which == "all")


def average_ratings(log: Log) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Mean (NaN for none) and number of each item's ratings, each of shape ``(n_items,)``."""
    counts = np.bincount(log.item, minlength=len(log.item_ids))
    sums = np.bincount(log.item, weights=log.rating, minlength=len(log.item_ids))
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan), counts
