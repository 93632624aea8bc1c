"""Which rows each adapter of a set is trained on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

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
) -> tuple[list[AdapterPlan], dict[str, str]]:
    """The adapters of a set with their rows, and the adapter of every user.

    Args:
        samples: The train samples.
        per: ``persona`` or ``all``.
        rows: Of a set for all users, how many rows, drawn evenly from every user; ``largest_persona``
            and ``smallest_persona`` stand for that persona's number of rows; None for all rows.
        shuffle_personas: See :func:`assign_users_to_adapters`.
        validation_share: Share of each user's rows, the latest, that is held out; None for none.
        seed: The experiment's seed.

    Raises:
        ConfigError: If there are fewer rows than asked for.
        DataError: If there is no row at all.
    """
    if not samples:
        raise DataError("no row to train on", where="samples/train.parquet", remedy="raise data.split.train_fraction")
    assignment = assign_users_to_adapters(samples, per=per, shuffle_personas=shuffle_personas, seed=seed)
    n_rows = number_of_rows(samples, rows)
    kept = range(len(samples)) if n_rows == len(samples) else subsample_per_user(samples, n_rows, seed)
    plans = []
    for adapter, mine in rows_per_adapter(samples, kept, assignment).items():
        train, held_out = latest_share(samples, mine, validation_share or 0.0)
        plans.append(AdapterPlan(adapter, train, held_out))
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


def number_of_rows(samples: Sequence[Sample], rows: int | str | None) -> int:
    """How many rows a set's ``rows`` setting stands for.

    Raises:
        ConfigError: If there are fewer.
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
            where="adapter_sets",
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


def latest_share(samples: Sequence[Sample], rows: Sequence[int], share: float) -> tuple[list[int], list[int]]:
    """Split rows into those to train on and each user's chronologically last ``share`` to validate on."""
    by_user: dict[str, list[int]] = {}
    for index in rows:
        by_user.setdefault(samples[index].user_id, []).append(index)
    held_out = {index for mine in by_user.values() for index in mine[len(mine) - int(len(mine) * share) :]}
    return [index for index in rows if index not in held_out], [index for index in rows if index in held_out]
