"""What a user's first ``upto`` train ratings say about the user.

A rating's residual is what neither the user's own average nor the item's explains::

    e_i = r_i - w_i (m_i - mean m),    w_i = c_i / (c_i + SHRINKAGE),    residual_i = e_i - mean e

over the first ``upto`` interactions, with ``m_i`` the item's average over ``c_i`` ratings and ``w_i``
zero where there is none. A feature's score is the sum of the residuals of its ``n`` items over
``n + SHRINKAGE`` (few ratings count for little), in units of the residuals' standard deviation.
Nothing here looks at an interaction from ``upto`` on.
"""

from dataclasses import dataclass

import numpy as np

from personas_tune.memory.history import Catalogue, Floats, History, Ints, Kind

SHRINKAGE = 5.0  # ratings; of the size of noise variance over taste variance
MIN_EVIDENCE = {Kind.GENRE: 3, Kind.ERA: 3, Kind.PERSON: 2, Kind.THEME: 3}
MAX_THEME_SHARE = 1 / 3  # a word in more of a user's summaries than that is grammar, not a theme
PRIOR_SD_SHARE = 0.2  # of the scale's width; what residuals spread by before any is seen

CLEAR_CHANGE = 2.0  # standard errors
CLEAR_GENRE_CHANGE = 2.5  # standard errors; more, since it is the largest over all genres
MIN_GENRE_RISE = 0.2  # of the share of interactions
MIN_RATING_CHANGE = 0.05  # of the scale's width
MIN_RECENT = 5  # interactions in the last third

_ROUNDING = 1e-9


@dataclass(frozen=True)
class Scored:
    """A feature and how much more (or less) the user likes it than the user's and items' averages say."""

    name: str
    score: float


@dataclass(frozen=True)
class Habits:
    """How a user rates.

    Attributes:
        n: Number of ratings.
        mean: Their mean.
        offset: By how much the user rates above the items' averages; None if no item has one.
        sd: Standard deviation of the ratings.
        mode: The most common rating, the lowest of several.
        top_share: Share of ratings at the scale's top.
        low_share: Share of ratings in the scale's lowest quarter, up to ``scale.low``.
    """

    n: int
    mean: float
    offset: float | None
    sd: float
    mode: float
    top_share: float
    low_share: float


@dataclass(frozen=True)
class Change:
    """What is clearly different in the last third of the interactions.

    Attributes:
        rating: By how much ratings rose, beyond what the items explain; None if not clearly.
        genre: The genre whose share rose most; None if not clearly.
    """

    rating: float | None
    genre: str | None


@dataclass(frozen=True)
class Scale:
    """The possible ratings: from ``min`` to ``max`` in steps of ``step``."""

    min: float
    max: float
    step: float

    @property
    def width(self) -> float:
        """From the lowest to the highest rating."""
        return self.max - self.min

    @property
    def low(self) -> float:
        """The highest rating in the lowest quarter: 2 of 1 to 5, 1.5 of 0.5 to 5."""
        return self.min + self.step * ((0.25 * self.width + _ROUNDING) // self.step)


class TasteReader:
    """Answers what one user's first ``upto`` train interactions say, for any ``upto``.

    Args:
        history: The user's train interactions.
        catalogue: Their items.
        scale: The possible ratings.
    """

    def __init__(self, history: History, catalogue: Catalogue, scale: Scale) -> None:
        self.history = history
        self.scale = scale
        self.means = catalogue.means[history.items]
        self.weights = np.where(np.isnan(self.means), 0.0, catalogue.counts[history.items])
        self.weights = self.weights / (self.weights + SHRINKAGE)
        self._index_features(catalogue)

    def habits(self, upto: int) -> Habits:
        """Rating habits; ``upto`` is at least 1."""
        ratings = self.history.ratings[:upto]
        values, counts = np.unique(ratings, return_counts=True)
        return Habits(
            n=upto,
            mean=float(ratings.mean()),
            offset=self.offset(upto),
            sd=float(ratings.std()),
            mode=float(values[counts.argmax()]),
            top_share=float((ratings >= self.scale.max - _ROUNDING).mean()),
            low_share=float((ratings <= self.scale.low + _ROUNDING).mean()),
        )

    def offset(self, upto: int) -> float | None:
        """By how much the user rates above the items' averages, where they have one."""
        differences = (self.history.ratings - self.means)[:upto]
        known = differences[~np.isnan(differences)]
        return float(known.mean()) if known.size else None

    def residuals(self, upto: int) -> Floats:
        """What the averages don't explain in the first ``upto`` ratings."""
        ratings, means, weights = self.history.ratings[:upto], self.means[:upto], self.weights[:upto]
        known = ~np.isnan(means)
        others = means[known].mean() if known.any() else 0.0
        unexplained = ratings - np.where(known, weights * (means - others), 0.0)
        residuals: Floats = unexplained - unexplained.mean()
        return residuals

    def residual_sd(self, residuals: Floats) -> float:
        """Their spread, drawn towards a fifth of the scale when there are few."""
        prior = PRIOR_SD_SHARE * self.scale.width
        return float(np.sqrt((np.square(residuals).sum() + SHRINKAGE * prior**2) / (residuals.size + SHRINKAGE)))

    def surprise(self, upto: int) -> float:
        """By how many standard deviations the latest rating differs from what was to be expected.

        Expected is the item's average plus what the user gives more than others, shrunk.
        """
        residuals = self.residuals(upto)
        doubt = SHRINKAGE / (upto + SHRINKAGE)
        return (float(residuals[-1]) + doubt * (self.offset(upto) or 0.0)) / self.residual_sd(residuals)

    def tastes(self, upto: int) -> dict[Kind, list[Scored]]:
        """Every feature with enough evidence, by kind, the best-liked first."""
        scores = self._scores(upto)
        tastes: dict[Kind, list[Scored]] = {kind: [] for kind in Kind}
        for kind, scored in self._ranked(np.arange(scores.size), scores):
            tastes[kind].append(scored)
        return tastes

    def reasons(self, upto: int) -> list[tuple[Kind, Scored]]:
        """The features of the latest item that have enough evidence, the best-liked first."""
        features = self.entry_features[self.ends[upto - 1] : self.ends[upto]]
        return self._ranked(features, self._scores(upto)) if features.size else []

    def change(self, upto: int) -> Change:
        """The last third against the first two thirds; ``upto`` is at least 1."""
        begin = upto - upto // 3
        if upto - begin < MIN_RECENT:
            return Change(None, None)
        residuals = self.residuals(upto)
        rise = float(residuals[begin:].mean() - residuals[:begin].mean())
        error = self.residual_sd(residuals) * np.sqrt(1 / (upto - begin) + 1 / begin)
        is_clear = abs(rise) >= max(MIN_RATING_CHANGE * self.scale.width, CLEAR_CHANGE * error)
        return Change(rise if is_clear else None, self._rising_genre(begin, upto))

    def _rising_genre(self, begin: int, upto: int) -> str | None:
        genres = np.flatnonzero(self.kinds == Kind.GENRE)
        if not genres.size:
            return None
        before, recent, all_time = (
            self._counts(start, end)[genres] / (end - start) for start, end in ((0, begin), (begin, upto), (0, upto))
        )
        rising = int((recent - before).argmax())
        error = np.sqrt(all_time[rising] * (1 - all_time[rising]) * (1 / (upto - begin) + 1 / begin))
        rise = recent[rising] - before[rising]
        return self.names[genres[rising]] if rise >= max(MIN_GENRE_RISE, CLEAR_GENRE_CHANGE * error) else None

    def _ranked(self, features: Ints, scores: Floats) -> list[tuple[Kind, Scored]]:
        shown = features[~np.isnan(scores[features])]
        shown = shown[np.argsort(-scores[shown], kind="stable")]
        return [(Kind(self.kinds[feature]), Scored(self.names[feature], float(scores[feature]))) for feature in shown]

    def _scores(self, upto: int) -> Floats:
        """Each feature's score; NaN for those that are not worth showing."""
        residuals = self.residuals(upto)
        end = self.ends[upto]
        sums = np.bincount(self.entry_features[:end], residuals[self.entry_rows[:end]], self.kinds.size)
        counts = self._counts(0, upto)
        scores: Floats = sums / (counts + SHRINKAGE) / self.residual_sd(residuals)
        is_theme = self.kinds == Kind.THEME
        is_grammar = is_theme & (counts > max(MIN_EVIDENCE[Kind.THEME], MAX_THEME_SHARE * upto))
        scores[(counts < self.needed) | is_grammar] = np.nan
        # Words that always come together ("bank heist") have one score, to the last bit; the first stands for them.
        themes = np.flatnonzero(is_theme)
        themes = themes[np.argsort(scores[themes], kind="stable")]
        scores[themes[1:][np.diff(scores[themes]) == 0]] = np.nan
        return scores

    def _counts(self, begin: int, upto: int) -> Ints:
        entries = slice(self.ends[begin], self.ends[upto])
        counts: Ints = np.bincount(self.entry_features[entries], minlength=self.kinds.size)
        return counts

    def _index_features(self, catalogue: Catalogue) -> None:
        """List every (interaction, feature) pair in order; features that can never count are left out."""
        needed = np.array([MIN_EVIDENCE[kind] for kind in Kind])
        per_row = [catalogue.item_features[item] for item in self.history.items]
        features = np.concatenate([np.empty(0, dtype=np.int64), *per_row])
        rows = np.repeat(np.arange(len(per_row)), [row.size for row in per_row])
        own, entries, counts = np.unique(features, return_inverse=True, return_counts=True)
        kept = counts >= needed[catalogue.kinds[own]]
        own, renumbered = own[kept], np.cumsum(kept) - 1
        self.entry_rows = rows[kept[entries]]
        self.entry_features = renumbered[entries[kept[entries]]]
        self.ends = np.searchsorted(self.entry_rows, np.arange(len(per_row) + 1))
        self.names = [catalogue.features[feature] for feature in own]
        self.kinds = catalogue.kinds[own]
        self.needed = needed[self.kinds]
