"""One user as plain text for a terminal."""

import textwrap
from collections.abc import Iterator

from personas_tune.memory.user_view import (
    Step,
    UserView,
    describe_facts,
    describe_profile,
    describe_rating,
    name_batch,
    plain,
    summarise_changes,
)

MIN_WIDTH, MAX_WIDTH = 40, 100


def write_user(view: UserView, width: int) -> str:
    """All that is known of a user, wrapped.

    The last profile stands in full at the top. Below, the history goes on batch by batch: the first profile in
    full, later ones as what changed against the one before.

    Args:
        view: The user.
        width: In columns; kept between ``MIN_WIDTH`` and ``MAX_WIDTH``.
    """
    width = min(max(width, MIN_WIDTH), MAX_WIDTH)
    lines = _wrap(f"USER {plain(view.user_id)}", width)
    for name, value in describe_facts(view):
        lines += _wrap(plain(value), width, f"  {name:<12}")
    if view.final is not None:
        origin = f"{describe_profile(view.final)}, by {plain(view.distiller or '')}"
        lines += ["", *_wrap(f"PROFILE {origin}", width)]
        lines += _full_profile(view.final, width, "  ")
    if view.steps:
        lines += ["", "HOW IT GREW"]
    for step in view.steps:
        lines += ["", *_step(step, width)]
    return "\n".join([*lines, ""])


def _step(step: Step, width: int) -> Iterator[str]:
    yield f"-- {name_batch(step)} ".ljust(width, "-")
    for rated in step.rated:
        yield from _wrap(f"{plain(rated.title)}: {describe_rating(rated)}", width, f"{rated.number:>4}  ")
        if rated.memory:
            yield from _wrap(plain(rated.memory), width, " " * 6)
    if step.profile is None:
        yield "  No profile was written after these."
    elif step.changes:
        yield from _wrap(f"Profile {describe_profile(step)}, against the one before:", width, "  ")
        for mark, text in summarise_changes(step.changes):
            yield from _wrap(text, width, f"    {mark} ")
    else:
        yield from _wrap(f"Profile {describe_profile(step)}:", width, "  ")
        yield from _full_profile(step, width, "    ")


def _full_profile(step: Step, width: int, indent: str) -> Iterator[str]:
    for paragraph in (step.profile or "").splitlines():
        yield from _wrap(plain(paragraph), width, indent)


def _wrap(text: str, width: int, lead: str = "") -> list[str]:
    """Lines of at most ``width`` columns; later ones are indented as deep as ``lead``."""
    indent = " " * len(lead)
    return textwrap.wrap(text, width, initial_indent=lead, subsequent_indent=indent, break_on_hyphens=False) or [lead]
