"""The ``template`` distiller: profiles and memories from train statistics, offline and deterministic."""

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from personas_tune.memory.history import Catalogue, History, Kind, read_histories
from personas_tune.memory.tables import Distilled, memories_table, profiles_table
from personas_tune.memory.taste import Scale, TasteReader
from personas_tune.memory.wording import (
    DomainWords,
    change_sentence,
    domain_words,
    genre_sentences,
    habit_sentences,
    mention_sentence,
    no_history_sentence,
    trait_sentence,
    write_memory,
    write_profile,
)


@dataclass(frozen=True)
class _Frame:
    """What is the same for all users."""

    catalogue: Catalogue
    scale: Scale
    words: DomainWords
    batch_size: int
    max_words: int


def distill_by_template(
    interactions: pa.Table,
    items: pa.Table,
    users: pa.Table,
    *,
    scale: Scale,
    template: str,
    batch_size: int,
    max_words: int,
) -> Distilled:
    """Write every user's profile, as it stood before each batch too, and a memory of each train interaction.

    A profile at ``upto_position`` p follows from the user's first p train interactions and the items'
    averages alone, and a memory from the interactions up to and including its own. Only the final
    profile names the traits, since these were measured on the whole train part.

    Args:
        interactions: All interactions of the cohort; only train rows are used.
        items: Their items.
        users: The cohort with the tiers of its traits.
        scale: The possible ratings.
        template: ``prompt.template``; chooses the domain's words.
        batch_size: How many interactions lie between two profiles of a user.
        max_words: Bound on each text.

    Raises:
        DataError: If an interaction's item is unknown.
    """
    records = sorted(users.to_pylist(), key=lambda user: user["user_id"])
    histories, catalogue = read_histories(interactions, items, [user["user_id"] for user in records])
    frame = _Frame(catalogue, scale, domain_words(template), batch_size, max_words)
    profiles, memories = [], []
    for history, user in zip(histories, records, strict=True):
        reader = TasteReader(history, catalogue, scale)
        tiers = (user["activity_tier"], user["conformity_tier"], user["diversity_tier"])
        profiles += [(history.user_id, upto, text) for upto, text in _profiles(reader, tiers, frame)]
        memories += list(_memories(reader, history, frame))
    return Distilled(profiles_table(profiles, "template"), memories_table(memories))


def _profiles(reader: TasteReader, tiers: tuple[int, int, int], frame: _Frame) -> Iterator[tuple[int, str]]:
    n = reader.history.ratings.size
    for upto in sorted({*range(0, n, frame.batch_size), n}):
        yield upto, write_profile(_sentences(reader, upto, tiers, frame), frame.max_words)


def _sentences(reader: TasteReader, upto: int, tiers: tuple[int, int, int], frame: _Frame) -> list[str]:
    if upto == 0:
        return [no_history_sentence(frame.words)]
    tastes = reader.tastes(upto)
    is_final = upto == reader.history.ratings.size
    return [
        *habit_sentences(reader.habits(upto), frame.scale, frame.words),
        *genre_sentences(tastes[Kind.GENRE]),
        *(mention_sentence(kind, tastes[kind], frame.words) for kind in (Kind.ERA, Kind.PERSON, Kind.THEME)),
        trait_sentence(*tiers, frame.words) if is_final else "",
        change_sentence(reader.change(upto), frame.words),
    ]


def _memories(reader: TasteReader, history: History, frame: _Frame) -> Iterator[tuple[str, str, int, float, str]]:
    catalogue = frame.catalogue
    for row, item in enumerate(history.items):
        upto = row + 1
        mean = float(catalogue.means[item])
        rating = float(history.ratings[row])
        memory = write_memory(
            catalogue.titles[item],
            rating,
            top=frame.scale.max,
            others=None if mean != mean else mean,
            surprise=reader.surprise(upto),
            reasons=reader.reasons(upto),
            max_words=frame.max_words,
        )
        yield history.user_id, catalogue.ids[item], int(history.positions[row]), rating, memory
