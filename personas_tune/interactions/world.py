"""A seeded, MovieLens-shaped world whose best possible predictor is known (docs/world.md).

Array shapes: U users, I items, G groups, F features (genres, eras, themes, people), N interactions.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.special import ndtr

from personas_tune.errors import ConfigError, PersonasTuneError, raise_together

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MIN_INTERACTIONS = 20  # as in MovieLens, nobody has fewer

# Ratings. Chosen so that the marginals and the bias model's error look like MovieLens's (docs/world.md).
GLOBAL_SCORE = 3.6
SIGNAL_SD = 0.61  # of user bias + item bias, and again of affinity
NOISE_SD = 0.72

# Tastes.
BLOCK_SHARES = {"genres": 0.25, "eras": 0.10, "themes": 0.40, "people": 0.25}  # of an item's squared feature length
GROUP_CONCENTRATION = 0.6  # sum of the Dirichlet's parameters; below 1, most users have one or two groups
OWN_TASTE_SD = 0.35  # of a user's deviation from the groups' mixture, whose own sd is 1 for a pure member

# Choices.
POPULARITY_EXPONENT = 0.9
PREFERENCE = 0.3  # log-odds of choosing an item per sd of item bias and per sd of affinity
ACTIVITY_LOG_SD = 0.8

# Time.
FIRST_SECOND = 946_684_800  # 2000-01-01
ARRIVAL_SECONDS = 3 * 365 * 86_400
NEW_SESSION_PROBABILITY = 1 / 30
SAME_SECOND_PROBABILITY = 0.5
SESSION_GAP_SECONDS = 4 * 86_400
RATING_GAP_SECONDS = 15

# fmt: off
GENRES = ["Drama", "Comedy", "Action", "Thriller", "Romance", "Horror", "Western", "Musical", "Fantasy", "Mystery"]
GENRE_WEIGHTS = [0.19, 0.17, 0.13, 0.11, 0.10, 0.08, 0.06, 0.05, 0.06, 0.05]
DECADES = [1940, 1950, 1960, 1970, 1980, 1990]
DECADE_WEIGHTS = [0.07, 0.09, 0.12, 0.17, 0.23, 0.32]
THEMES = [
    "a bank heist", "a courtroom trial", "space travel", "a family feud", "revenge", "first love", "time travel",
    "a haunted house", "a road trip", "boxing", "jazz", "a spy ring", "a shipwreck", "lost treasure", "amnesia",
    "a wedding", "smuggling", "chess", "a prison break", "dragons", "mountain climbing", "a talking dog", "a circus",
    "robots",
]
SETTINGS = [
    "a harbor town", "a desert camp", "a snowy village", "a big city", "a boarding school", "a night train",
    "an island hotel", "a border post", "a coal mine", "a royal court", "a river farm", "a hospital ward",
]
SUMMARIES = [
    "A story of {themes} in {setting}.",
    "A widow in {setting} is caught up in {themes}.",
    "Two brothers return to {setting} and face {themes}.",
    "A young teacher in {setting} learns about {themes}.",
    "In {setting}, an old sailor is drawn into {themes}.",
    "Life in {setting} is turned upside down by {themes}.",
    "A tale of {themes}, told over one summer in {setting}.",
    "A stranger comes to {setting} with a secret about {themes}.",
    "Three friends leave {setting} because of {themes}.",
    "A doctor in {setting} risks everything for {themes}.",
    "One night in {setting} ends with {themes}.",
    "A reporter in {setting} writes about {themes}.",
]
ADJECTIVES = [
    "Silver", "Broken", "Quiet", "Golden", "Hidden", "Crimson", "Distant", "Empty", "Frozen", "Gentle", "Hollow",
    "Iron", "Last", "Lonely", "Midnight", "Narrow", "Open", "Pale", "Rising", "Savage", "Secret", "Shattered", "Silent",
    "Sleeping", "Stolen", "Strange", "Sudden", "Tender", "Velvet", "Wandering", "Wicked", "Winter", "Yellow", "Amber",
    "Bitter", "Blue", "Brave", "Burning", "Copper", "Crooked", "Dark", "Deep", "Emerald", "Fading", "Faithful",
    "Fallen", "Final", "First", "Forgotten", "Glass", "Green", "Happy", "Heavy", "Honest", "Little", "Lost", "Northern",
    "Paper", "Scarlet", "White",
]
NOUNS = [
    "Harbor", "River", "Garden", "Mirror", "Bridge", "Letter", "Window", "Mountain", "Forest", "Lantern", "Shadow",
    "Summer", "Kingdom", "Station", "Island", "Orchard", "Tower", "Valley", "Voyage", "Whisper", "Anchor", "Arrow",
    "Bell", "Candle", "Castle", "Crown", "Dancer", "Door", "Dream", "Echo", "Feather", "Field", "Fire", "Flower",
    "Ghost", "Hour", "House", "Hunter", "Journey", "Key", "Lake", "Machine", "Meadow", "Moon", "Morning", "Night",
    "Ocean", "Palace", "Promise", "Rain", "Road", "Rose", "Sea", "Sky", "Song", "Star", "Stone", "Storm", "Street",
    "Wind",
]
FIRST_NAMES = [
    "Ada", "Bruno", "Clara", "Dario", "Edith", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Karin", "Leo", "Mara",
    "Nils", "Olga", "Paul", "Rosa", "Simon", "Tilda", "Victor",
]
LAST_NAMES = [
    "Abel", "Banks", "Corso", "Dunn", "Eberly", "Falk", "Garner", "Holt", "Ives", "Jarvis", "Keller", "Lund",
    "Marsh", "Nolan", "Orton", "Pryce", "Quill", "Rowe", "Stark", "Tully", "Usher", "Vance", "Weber", "Yates", "Zeller",
    "Arden", "Bloom", "Cross", "Drake", "Ellis", "Frost", "Grant", "Hale", "Irwin", "Joyce", "Kemp", "Lane", "Moss",
    "Nash", "Owens",
]
# fmt: on
PEOPLE = [f"{FIRST_NAMES[n % len(FIRST_NAMES)]} {last}" for n, last in enumerate(LAST_NAMES)]


@dataclass(frozen=True)
class Truth:
    """What only tests and benchmarks may know; the pipeline never sees it.

    Attributes:
        group_weights: Each user's mixture over groups, shape ``(U, G)``, in the order of user ids.
        bias: User bias + item bias of each interaction, shape ``(N,)``.
        affinity: Affinity of each interaction, shape ``(N,)``.
        group_affinity: The part of it that follows from group weights alone, shape ``(N,)``.
        score: Mean of the latent score of each interaction, shape ``(N,)``.
        affinity_share: Variance of affinity over the variance of bias plus that of affinity.
    """

    group_weights: Floats
    bias: Floats
    affinity: Floats
    group_affinity: Floats
    score: Floats
    affinity_share: float


@dataclass(frozen=True)
class World:
    """A synthetic log with its item metadata and its best possible predictions.

    Attributes:
        interactions: user_id, item_id, rating, timestamp; a user's rows lie together, oldest first.
        items: item_id, title (without the year), year, genres, summary, cast.
        oracle: user_id, item_id, optimal; row by row as ``interactions``.
        optimal_rmse: What predicting ``optimal`` is expected to give over all interactions.
        truth: For tests and benchmarks only.
    """

    interactions: pa.Table
    items: pa.Table
    oracle: pa.Table
    optimal_rmse: float
    truth: Truth


@dataclass(frozen=True)
class _Catalogue:
    features: dict[str, NDArray[np.bool_]]  # by block, shape (I, values of the block)
    years: Ints
    texts: dict[str, list[str]]  # title and summary


def generate_world(n_users: int, n_items: int, n_groups: int, mean_interactions: int, seed: int) -> World:
    """Draw a world: items, users with tastes, their choices and their ratings.

    Args:
        n_users: How many users, at least 2.
        n_items: How many items, at least 20.
        n_groups: How many overlapping groups the users' tastes come from.
        mean_interactions: Interactions per user on average, from 20 to ``n_items``; nobody has fewer
            than 20. The long tail of active users is cut at ``n_items``, which lowers the average
            when the catalogue is small.
        seed: The same arguments give the same bytes.

    Raises:
        ConfigError: If an argument is out of its range (several: SeveralErrors).

    Example:
        >>> world = generate_world(n_users=50, n_items=100, n_groups=3, mean_interactions=30, seed=0)
        >>> world.interactions.column_names
        ['user_id', 'item_id', 'rating', 'timestamp']
    """
    _check_arguments(n_users, n_items, n_groups, mean_interactions, seed)
    rng = np.random.default_rng(seed)
    catalogue = _draw_catalogue(n_items, rng)
    popularity = _draw_popularity(n_items, rng)
    group_weights = rng.dirichlet(np.full(n_groups, GROUP_CONCENTRATION / n_groups), size=n_users)
    user_bias, item_bias = rng.standard_normal(n_users), rng.standard_normal(n_items)
    group_affinity, own_affinity = _draw_affinities(group_weights, _centred_features(catalogue, popularity), rng)
    affinity = group_affinity + own_affinity  # (U, I)

    attraction = np.log(popularity) + PREFERENCE * (item_bias + affinity / affinity.std())
    user, item = _choose_items(attraction, _draw_activity(n_users, n_items, mean_interactions, rng), rng)
    bias, _ = _rescale(user_bias[user] + item_bias[item])
    chosen_affinity, scale = _rescale(affinity[user, item])
    score = GLOBAL_SCORE + bias + chosen_affinity
    optimal, variance = rating_moments(score)
    truth = Truth(
        group_weights=group_weights,
        bias=bias,
        affinity=chosen_affinity,
        group_affinity=scale * group_affinity[user, item],
        score=score,
        affinity_share=float(chosen_affinity.var() / (chosen_affinity.var() + bias.var())),
    )
    pairs = {"user_id": _ids("u", n_users).take(user), "item_id": _ids("i", n_items).take(item)}
    timestamps = _draw_timestamps(user, rng)
    return World(
        interactions=pa.table({**pairs, "rating": _draw_ratings(score, rng), "timestamp": timestamps}),
        items=_items_table(catalogue),
        oracle=pa.table({**pairs, "optimal": np.round(optimal, 6)}),  # rounded: libm's last bits differ between CPUs
        optimal_rmse=float(np.sqrt(variance.mean())),
        truth=truth,
    )


def rating_moments(score: Floats, noise_sd: float = NOISE_SD) -> tuple[Floats, Floats]:
    """Mean and variance of ``clip(round(score + noise), 1, 5)`` with Gaussian noise, exactly.

    The mean is the prediction with the least expected squared error, the variance is that error.
    """
    above = [ndtr((score - (k + 0.5)) / noise_sd) for k in range(1, 5)]  # P(rating > k)
    mean = 1.0 + sum(above)
    mean_square = 1.0 + sum((2 * k + 1) * p for k, p in enumerate(above, start=1))
    return mean, mean_square - mean**2


def _check_arguments(n_users: int, n_items: int, n_groups: int, mean_interactions: int, seed: int) -> None:
    least = {
        "n_users": (n_users, 2),
        "n_items": (n_items, MIN_INTERACTIONS),
        "n_groups": (n_groups, 1),
        "mean_interactions": (mean_interactions, MIN_INTERACTIONS),
        "seed": (seed, 0),
    }
    errors: list[PersonasTuneError] = [
        ConfigError(f"{value} is too small", where=f"data.world.{name}", remedy=f"set it to {minimum} or more")
        for name, (value, minimum) in least.items()
        if value < minimum
    ]
    if not errors and mean_interactions > n_items:
        errors.append(
            ConfigError(
                f"{mean_interactions} interactions per user need as many items, and there are {n_items}",
                where="data.world.mean_interactions",
                remedy=f"set it to at most {n_items} or raise data.world.n_items",
            )
        )
    raise_together(errors)


def _ids(letter: str, n: int) -> pa.Array:
    """Opaque ids, all of one length. Users and items are drawn alike, so that their number says nothing."""
    width = max(4, len(str(n)))
    return pa.array([f"{letter}{number:0{width}d}" for number in range(1, n + 1)], pa.string())


def _draw_catalogue(n_items: int, rng: np.random.Generator) -> _Catalogue:
    genres = _draw_subsets(np.array(GENRE_WEIGHTS), rng.choice([1, 2, 3], size=n_items, p=[0.4, 0.45, 0.15]), rng)
    eras = _draw_subsets(np.array(DECADE_WEIGHTS), np.ones(n_items, dtype=np.int64), rng)
    themes = _draw_subsets(np.ones(len(THEMES)), rng.integers(1, 3, size=n_items), rng)
    people = _draw_subsets(np.ones(len(PEOPLE)), rng.integers(2, 4, size=n_items), rng)
    years = np.array(DECADES)[eras.argmax(axis=1)] + rng.integers(0, 10, size=n_items)
    return _Catalogue(
        features={"genres": genres, "eras": eras, "themes": themes, "people": people},
        years=years,
        texts={"title": _draw_titles(n_items, rng), "summary": _draw_summaries(themes, rng)},
    )


def _draw_subsets(weights: Floats, sizes: Ints, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Weighted draws without replacement, one subset a row (Gumbel top-k), shape ``(len(sizes), len(weights))``."""
    keys = np.log(weights) + rng.gumbel(size=(len(sizes), len(weights)))
    rank = (-keys).argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    return rank < sizes[:, None]


def _draw_titles(n_items: int, rng: np.random.Generator) -> list[str]:
    """Titles that differ from each other; a catalogue beyond all pairs of words gets sequels."""
    n_pairs = len(ADJECTIVES) * len(NOUNS)
    pairs = rng.permutation(n_pairs)
    titles = []
    for n in range(n_items):
        adjective, noun = divmod(int(pairs[n % n_pairs]), len(NOUNS))
        sequel = f" {n // n_pairs + 1}" if n >= n_pairs else ""
        titles.append(f"The {ADJECTIVES[adjective]} {NOUNS[noun]}{sequel}")
    return titles


def _draw_summaries(themes: NDArray[np.bool_], rng: np.random.Generator) -> list[str]:
    templates = rng.integers(0, len(SUMMARIES), size=len(themes))
    settings = rng.integers(0, len(SETTINGS), size=len(themes))
    return [
        SUMMARIES[template].format(themes=" and ".join(_names(THEMES, row)), setting=SETTINGS[setting])
        for template, setting, row in zip(templates, settings, themes, strict=True)
    ]


def _names(values: list[str], row: NDArray[np.bool_]) -> list[str]:
    return [values[n] for n in np.flatnonzero(row)]


def _items_table(catalogue: _Catalogue) -> pa.Table:
    strings = pa.list_(pa.string())
    return pa.table(
        {
            "item_id": _ids("i", len(catalogue.years)),
            "title": pa.array(catalogue.texts["title"], pa.string()),
            "year": pa.array(catalogue.years, pa.int32()),
            "genres": pa.array([_names(GENRES, row) for row in catalogue.features["genres"]], strings),
            "summary": pa.array(catalogue.texts["summary"], pa.string()),
            "cast": pa.array([_names(PEOPLE, row) for row in catalogue.features["people"]], strings),
        }
    )


def _draw_popularity(n_items: int, rng: np.random.Generator) -> Floats:
    """Zipf-like shares that sum to one; the flattened head keeps the first items from being rated by all."""
    ranks = rng.permutation(n_items) + 1.0
    weights = (ranks + 0.05 * n_items) ** -POPULARITY_EXPONENT
    return np.asarray(weights / weights.sum())


def _centred_features(catalogue: _Catalogue, popularity: Floats) -> Floats:
    """Item features, shape ``(I, F)``: blocks weighted by share, less the catalogue's popularity-weighted mean."""
    blocks = [
        np.sqrt(BLOCK_SHARES[name]) * block / np.sqrt(block.sum(axis=1, keepdims=True))
        for name, block in catalogue.features.items()
    ]
    features = np.concatenate(blocks, axis=1)
    return np.asarray(features - (popularity[:, None] * features).sum(axis=0))


def _draw_affinities(group_weights: Floats, features: Floats, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Affinities from the groups and from each user's own deviation, two arrays of shape ``(U, I)``.

    Tastes are centred over users and features over items, so that averages explain none of it.
    einsum rather than ``@``: no BLAS, so the number of threads can't change a bit.
    """
    n_users, n_groups = group_weights.shape
    group_tastes = rng.standard_normal((n_groups, features.shape[1]))
    own_tastes = OWN_TASTE_SD * rng.standard_normal((n_users, features.shape[1]))
    mixed_tastes = np.einsum("ug,gf->uf", group_weights, group_tastes)
    group_affinity = np.einsum("uf,if->ui", mixed_tastes - mixed_tastes.mean(axis=0), features)
    own_affinity = np.einsum("uf,if->ui", own_tastes - own_tastes.mean(axis=0), features)
    return group_affinity, own_affinity


def _draw_activity(n_users: int, n_items: int, mean_interactions: int, rng: np.random.Generator) -> Ints:
    """Interactions of each user: 20 and a log-normal rest with the mean asked for."""
    rest = rng.lognormal(-(ACTIVITY_LOG_SD**2) / 2, ACTIVITY_LOG_SD, size=n_users)
    counts = MIN_INTERACTIONS + np.rint((mean_interactions - MIN_INTERACTIONS) * rest).astype(np.int64)
    return np.minimum(counts, n_items)


def _choose_items(attraction: Floats, activity: Ints, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Users' distinct items in random order, chosen with odds ``exp(attraction)`` (Gumbel top-k).

    Returns:
        Row numbers of user and item, each of shape ``(N,)``, users ascending.
    """
    keys = attraction + rng.gumbel(size=attraction.shape)
    ranking = (-keys).argsort(axis=1, kind="stable")
    chosen = np.arange(attraction.shape[1]) < activity[:, None]
    user = np.repeat(np.arange(len(activity)), activity)
    return user, ranking[chosen][np.lexsort((rng.random(len(user)), user))]


def _rescale(signal: Floats) -> tuple[Floats, float]:
    """Shift and scale a signal to mean 0 and ``SIGNAL_SD`` over the interactions; also returns the scale."""
    scale = SIGNAL_SD / float(signal.std())
    return scale * (signal - signal.mean()), scale


def _draw_ratings(score: Floats, rng: np.random.Generator) -> Floats:
    noise = NOISE_SD * rng.standard_normal(len(score))
    return np.asarray(np.clip(np.rint(score + noise), 1.0, 5.0))


def _draw_timestamps(user: Ints, rng: np.random.Generator) -> Ints:
    """Seconds, never falling within a user: sessions days apart, ratings seconds apart or in the same second."""
    n = len(user)
    is_first = np.diff(user, prepend=-1) > 0
    within = np.where(rng.random(n) < SAME_SECOND_PROBABILITY, 0, rng.geometric(1 / RATING_GAP_SECONDS, size=n))
    between = 3600 + np.floor(rng.exponential(SESSION_GAP_SECONDS, size=n)).astype(np.int64)
    steps = np.where(rng.random(n) < NEW_SESSION_PROBABILITY, between, within)
    steps[is_first] = 0
    elapsed = np.cumsum(steps)
    arrival = FIRST_SECOND + rng.integers(0, ARRIVAL_SECONDS, size=int(is_first.sum()))
    return np.asarray(arrival[user] + elapsed - elapsed[is_first][user])
