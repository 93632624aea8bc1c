"""Which rows each adapter of a set is trained on."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from personas_tune.adapters.bank import stable_seed
from personas_tune.datasets.source import Sample
from personas_tune.errors import ConfigError, DataError

ALL_USERS = "all"


@dataclass(frozen=True)
class AdapterPlan:
    """What one adapter of a set is trained and validated on, as row indices."""

    adapter: str
    rows: list[int]
    validation_rows: list[int]


def plan_adapter_set(
    samples: Sequence[Sample],
    *,
    per: str,
    rows: int | str | None,
    shuffle_personas: bool,
    validation_share: float | None,
    seed: int,
    rows_from: str = "own",
    share: float = 1,
    where: str = "adapter_sets",
) -> tuple[list[AdapterPlan], dict[str, str]]:
    """The adapters of a set with their rows, and the adapter of every user.

    Validation rows are taken from all train rows, whatever the set; ``rows``, ``share`` and ``rows_from`` count and
    draw from the rows that are left, so no adapter is trained on a validation row of any user.

    Args:
        samples: The train samples.
        per: ``persona`` or ``all``.
        rows: Of a set for all users, how many rows, drawn evenly from every user; ``largest_persona``
            and ``smallest_persona`` stand for that persona's number of rows; None for all rows.
        shuffle_personas: See :func:`assign_users_to_adapters`.
        validation_share: Share of each user's train rows, the latest, that is held out; an adapter is validated on
            those of its users. None for none.
        seed: The experiment's seed.
        rows_from: Of a set with an adapter per persona, whose rows each is trained on: its ``own`` users', or as
            many drawn evenly from ``all`` users (a control: grouping is all that differs).
        share: Of each user's rows, how many the set is trained on (see :func:`share_of_each_user`).
        where: What messages name.

    Raises:
        ConfigError: If there are fewer rows than asked for, or an adapter gets none.
        DataError: If there is no row at all.
    """
    if not samples:
        raise DataError("no row to train on", where="samples/train.parquet", remedy="raise data.split.train_fraction")
    assignment = assign_users_to_adapters(samples, per=per, shuffle_personas=shuffle_personas, seed=seed)
    left, held_out = latest_share(samples, range(len(samples)), validation_share or 0.0)
    to_train = [samples[index] for index in left]
    n_rows = number_of_rows(to_train, rows, where=where)
    kept = share_of_each_user(to_train, share, seed)
    if n_rows < len(to_train):
        kept = subsample_per_user(to_train, n_rows, seed)
    by_adapter = rows_per_adapter(to_train, kept, assignment)
    _require_rows(by_adapter, assignment, share, where)
    if rows_from == "all":
        by_adapter = {name: as_many_of_all(to_train, kept, len(mine), name, seed) for name, mine in by_adapter.items()}
    validation = rows_per_adapter(samples, held_out, assignment)
    plans = [
        AdapterPlan(adapter, [left[place] for place in mine], validation.get(adapter, []))
        for adapter, mine in by_adapter.items()
    ]
    return plans, assignment


def assign_users_to_adapters(
    samples: Sequence[Sample], *, per: str, shuffle_personas: bool, seed: int
) -> dict[str, str]:
    """The adapter of every user.

    Args:
        samples: Rows that name each user's persona.
        per: ``persona`` for one adapter a persona, ``all`` for one that all users share.
        shuffle_personas: Deal the users out at random to personas of the same sizes (a control: what
            several adapters bring without meaningful groups).
        seed: Seeds the dealing.

    Returns:
        Adapter name (``"0"``, ``"1"``, ... or ``"all"``) by user id.
    """
    personas = {sample.user_id: sample.persona for sample in samples}
    if per == "all":
        return dict.fromkeys(sorted(personas), ALL_USERS)
    users = sorted(personas)
    dealt = [personas[user] for user in users]
    if shuffle_personas:
        dealt = np.random.default_rng(stable_seed(seed, "shuffled personas")).permutation(dealt).tolist()
    return {user: str(persona) for user, persona in zip(users, dealt, strict=True)}


def rows_per_adapter(
    samples: Sequence[Sample], kept: Sequence[int], assignment: Mapping[str, str]
) -> dict[str, list[int]]:
    """Which of the ``kept`` row indices belong to each adapter, largest adapter first."""
    rows: dict[str, list[int]] = {}
    for index in kept:
        rows.setdefault(assignment[samples[index].user_id], []).append(index)
    return dict(sorted(rows.items(), key=lambda entry: (-len(entry[1]), entry[0])))


def number_of_rows(samples: Sequence[Sample], rows: int | str | None, where: str = "adapter_sets") -> int:
    """How many rows a set's ``rows`` setting stands for.

    Raises:
        ConfigError: If there are fewer; it names ``where``.
    """
    sizes: dict[int, int] = {}
    for sample in samples:
        sizes[sample.persona] = sizes.get(sample.persona, 0) + 1
    if rows is None:
        return len(samples)
    if rows == "largest_persona":
        return max(sizes.values())
    if rows == "smallest_persona":
        return min(sizes.values())
    n_rows = int(rows)
    if n_rows > len(samples):
        raise ConfigError(
            f"{n_rows} rows asked for, {len(samples)} train rows there",
            where=where,
            remedy="lower rows or leave it out",
        )
    return n_rows


def subsample_per_user(samples: Sequence[Sample], n_rows: int, seed: int) -> list[int]:
    """Draw ``n_rows`` rows, the same share from every user (paper, appendix A).

    Shares are rounded by largest remainder, so that the total is exact.

    Returns:
        Row indices, ascending.
    """
    by_user: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        by_user.setdefault(sample.user_id, []).append(index)
    exact = np.array([len(rows) for rows in by_user.values()]) * (n_rows / len(samples))
    quota = np.floor(exact).astype(int)
    for position in np.argsort(-(exact - quota), kind="stable")[: n_rows - int(quota.sum())]:
        quota[position] += 1
    generator = np.random.default_rng(stable_seed(seed, "subsample"))
    chosen = [generator.permutation(rows)[:n].tolist() for rows, n in zip(by_user.values(), quota, strict=True)]
    return sorted(index for rows in chosen for index in rows)


def share_of_each_user(samples: Sequence[Sample], share: float, seed: int) -> list[int]:
    """Draw a share of every user's rows.

    Of a user with n rows it is ``share`` x n, rounded up for some users and down for others, so that the total is
    about right even where users have few rows. A larger share holds the rows of a smaller one. Sets with one share
    have the same rows, however they are grouped.

    Returns:
        Row indices, ascending.
    """
    places = _places_within_users(samples, range(len(samples)), stable_seed(seed, "share"))
    return np.flatnonzero(places < share).tolist()


def as_many_of_all(samples: Sequence[Sample], kept: Sequence[int], n_rows: int, adapter: str, seed: int) -> list[int]:
    """Draw ``n_rows`` of the ``kept`` rows, about the same share from every user; each adapter has its own draw.

    More rows hold those of fewer.

    Returns:
        Row indices, ascending.
    """
    places = _places_within_users(samples, kept, stable_seed(seed, "rows of all users", adapter))
    return sorted(kept[place] for place in np.argsort(places, kind="stable")[:n_rows])


def _places_within_users(samples: Sequence[Sample], rows: Sequence[int], seed: int) -> NDArray[np.float64]:
    """A place in [0, 1) for each row: a user's rows in random order, evenly spaced from a random start.

    The rows below a bound are then about that share of every user's (systematic sampling).
    """
    by_user: dict[str, list[int]] = {}
    for number, index in enumerate(rows):
        by_user.setdefault(samples[index].user_id, []).append(number)
    generator = np.random.default_rng(seed)
    # The starts are spread evenly over the users, so that as many round up as should.
    starts = (generator.permutation(len(by_user)) + 0.5) / len(by_user)
    places = np.empty(len(rows))
    for start, mine in zip(starts, by_user.values(), strict=True):
        places[generator.permutation(mine)] = (np.arange(len(mine)) + start) / len(mine)
    return places


def _require_rows(
    by_adapter: Mapping[str, Sequence[int]], assignment: Mapping[str, str], share: float, where: str
) -> None:
    without = sorted(set(assignment.values()) - by_adapter.keys())
    if without:
        n_users = Counter(assignment.values())[without[0]]
        raise ConfigError(
            f"adapter {without[0]} of {n_users} user(s) gets no row at share {share:g}",
            where=where,
            remedy="raise share or lower personas.k",
        )


def latest_share(samples: Sequence[Sample], rows: Sequence[int], share: float) -> tuple[list[int], list[int]]:
    """Split rows into those to train on and each user's chronologically last ``share`` to validate on."""
    by_user: dict[str, list[int]] = {}
    for index in rows:
        by_user.setdefault(samples[index].user_id, []).append(index)
    held_out = {index for mine in by_user.values() for index in mine[len(mine) - int(len(mine) * share) :]}
    return [index for index in rows if index not in held_out], [index for index in rows if index in held_out]
