"""Users who aren't of the cohort: a few ratings, or a profile, to what a prompt says of a user."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa

from personas_tune.agents.given import require_text
from personas_tune.agents.records import recorded
from personas_tune.agents.settings import AgentSettings
from personas_tune.datasets.source import Tiers
from personas_tune.errors import DataError, DistillError
from personas_tune.memory.tables import memories_table
from personas_tune.memory.taste import Scale
from personas_tune.memory.template import distill_by_template
from personas_tune.personas.files import assign_new_users
from personas_tune.prompts.render import ItemText
from personas_tune.prompts.templates import TRAITS
from personas_tune.workspace import MANIFEST

Rated = tuple[str, float]  # item_id, rating
MIDDLE: Tiers = (2, 2, 2)  # what traits are where nothing is known of them

_ITEMS = pa.schema(
    [
        ("item_id", pa.string()), ("title", pa.string()), ("year", pa.int32()), ("genres", pa.list_(pa.string())),
        ("summary", pa.string()), ("cast", pa.list_(pa.string())), ("mean_rating", pa.float64()),
        ("n_ratings", pa.int32()),
    ]
)  # fmt: skip


@dataclass(frozen=True)
class NewUser:
    """A user whom an agent has met.

    Args:
        user_id: What the agent calls this user.
        profile: The profile that prompts show.
        memories: A memory of each rating, oldest first.
        persona: The nearest persona.
        distance: How far the profile is from that persona's centre.
        adapter: The adapter that answers for this user, ``SET/ADAPTER``; None for the base alone.
    """

    user_id: str
    profile: str
    memories: tuple[str, ...]
    persona: int
    distance: float
    adapter: str | None = None


def describe_newcomer(
    settings: AgentSettings,
    user_id: str,
    ratings: Sequence[Rated],
    items: Mapping[str, ItemText],
    *,
    profile: str | None,
    memories: Sequence[str] | None,
    tiers: Tiers,
    by_template: bool,
) -> tuple[str, pa.Table]:
    """A new user's profile, and memories as ``memories.parquet`` has them.

    What isn't given is written by the offline template distiller, from the ratings alone.

    Args:
        settings: The agent's.
        user_id: The user.
        ratings: Oldest first.
        items: The known items.
        profile: The profile, if it is there already.
        memories: A memory of each rating, if they are there already.
        tiers: Of the traits activity, conformity and diversity.
        by_template: Use the template distiller though it didn't write the cohort's texts.

    Raises:
        DataError: If a given text is none.
        DistillError: If a text is missing that the template distiller may not write.
    """
    for text in [*([] if profile is None else [profile]), *_given_memories(memories)]:
        require_text(text, f"a text of {user_id}")
    if memories is not None and len(memories) != len(ratings):
        raise DistillError(f"{len(memories)} memories of {len(ratings)} ratings", where=user_id, remedy="give one each")
    if profile is None or (memories is None and ratings):
        written = _by_template(settings, user_id, ratings, items, tiers, by_template)
        profile = str(written[0]) if profile is None else profile
        memories = written[1] if memories is None else memories
    rows = zip(ratings, memories or (), strict=True)
    return profile, memories_table(
        (user_id, item_id, position, float(rating), memory) for position, ((item_id, rating), memory) in enumerate(rows)
    )


def _given_memories(memories: Sequence[str] | None) -> Sequence[str]:
    if isinstance(memories, str):
        raise DataError("memories is no list", where=repr(memories[:40]), remedy="give a list, one of each rating")
    return memories or ()


def place_newcomer(settings: AgentSettings, user_id: str, profile: str, *, allow_paid_calls: bool) -> tuple[int, float]:
    """The nearest persona and the distance to its centre; raises as :func:`assign_new_users` does."""
    means = settings.embedding_if(allow_paid_calls, "personas")
    personas, distances = assign_new_users(settings.workspace, [user_id], [profile], means)
    return int(personas[0]), float(distances[0])


def _by_template(
    settings: AgentSettings,
    user_id: str,
    ratings: Sequence[Rated],
    items: Mapping[str, ItemText],
    tiers: Tiers,
    by_template: bool,
) -> tuple[str, list[str]]:
    made_with = settings.made_with("memory", "distill")
    if made_with["distiller"] != "template" and not by_template:
        raise DistillError(
            f"the cohort's texts were written by {made_with['distiller']}, which isn't called for a new user",
            where=user_id,
            remedy="give profile=... and memories=[...], or by_template=True for the template distiller's words",
        )
    interactions = pa.table(
        {
            "user_id": pa.array([user_id] * len(ratings), pa.string()),
            "item_id": pa.array([item_id for item_id, _ in ratings], pa.string()),
            "rating": pa.array([rating for _, rating in ratings], pa.float64()),
            "position": pa.array(range(len(ratings)), pa.int32()),
            "split": pa.array(["train"] * len(ratings), pa.string()),
        }
    )
    described = [{"item_id": item_id, **asdict(items[item_id])} for item_id, _ in ratings]
    users = pa.table({"user_id": [user_id], **{f"{name}_tier": [tiers[at]] for at, name in enumerate(TRAITS)}})
    written = distill_by_template(
        interactions,
        pa.Table.from_pylist(described, _ITEMS),
        users,
        scale=Scale(**settings.cfg.data.rating_scale),
        template=str(recorded(settings.workspace.root / "memory" / MANIFEST, "settings").get("template")),
        batch_size=made_with["batch_size"],
        max_words=made_with["max_words"],
    )
    return written.profiles["profile"][-1].as_py(), written.memories["memory"].to_pylist()
