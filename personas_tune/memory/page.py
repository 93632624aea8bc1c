"""Users as one static HTML page: no script, nothing loaded from anywhere, the same bytes for the same tables."""

import re
from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path

import numpy as np
import pyarrow as pa

from personas_tune.errors import raise_together
from personas_tune.memory.user_tables import UserTables, read_user, read_user_ids
from personas_tune.memory.user_view import (
    Rated,
    Step,
    UserView,
    count,
    describe_facts,
    describe_profile,
    name_batch,
    plain,
    summarise_changes,
)
from personas_tune.memory.wording import label_of
from personas_tune.workspace import missing_inputs

_GIST_LETTERS = 160
_CODE = re.compile("`([^`]+)`")
_MARKS = {"+": ("new", "+"), "-": ("gone", "\N{MINUS SIGN}"), "=": ("same", "=")}


def render_users_page(
    interactions: Path, items: Path, users: Path, profiles: Path, memories: Path, n_users: int = 24
) -> str:
    """A page of some users, spread evenly over the cohort; memory doesn't grow with the tables.

    Args:
        interactions: What ``persona_prepare`` wrote, as are ``items`` and ``users``.
        items: Titles and averages.
        users: The cohort.
        profiles: What a distiller wrote, as are ``memories``.
        memories: May be an empty table.
        n_users: At most so many are on the page.

    Raises:
        MissingInputError: If a table isn't there.
        DataError: If one is damaged.
    """
    raise_together(missing_inputs([interactions, items, users, profiles, memories]))
    tables = UserTables(interactions, items, users, profiles, memories)
    ids = read_user_ids(users)
    chosen = _spread(ids, n_users)
    shown = f"{len(chosen)} of {count(len(ids), 'user')}, spread evenly over the sorted ids. "
    note = "`personas-tune show USER` prints any of them, and with `--html FILE` writes a page like this one."
    views = (read_user(user_id, tables) for user_id in chosen)
    return render_page(views, "Profiles and memories", (shown if len(chosen) < len(ids) else "") + note)


def render_page(views: Iterable[UserView], title: str, note: str = "") -> str:
    """One HTML file that shows users.

    Ids, titles and texts are data: they are escaped, and the page allows itself no script and no request.

    Args:
        views: The users. One alone stands open; several are folded.
        title: Of the page.
        note: A paragraph below it; what stands between backticks is shown as code.
    """
    views = list(views)
    parts = [_HEAD.format(title=_text(title), style=_STYLE)]
    if note:
        parts.append(_CODE.sub(r"<code>\1</code>", f"<p>{_text(note)}</p>"))
    for view in views:
        parts += ['<section class="user">', *_user(view), "</section>"] if len(views) == 1 else _folded(view)
    return "\n".join([*parts, "</main>", "</body>", "</html>", ""])


def _spread(ids: pa.Array, n: int) -> list[str]:
    """At most ``n`` of the ids at even distances, the first and the last among them."""
    places = np.linspace(0, len(ids) - 1, min(n, len(ids))).round().astype(np.int64)
    chosen: list[str] = ids.take(pa.array(places)).to_pylist()
    return chosen


def _folded(view: UserView) -> Iterator[str]:
    gist = plain(view.final.profile or "") if view.final is not None else "no profile"
    if len(gist) > _GIST_LETTERS:
        gist = f"{gist[:_GIST_LETTERS].rstrip()} ..."
    yield '<details class="user">'
    yield f"<summary><h2><bdi>{_text(view.user_id)}</bdi></h2> <small>{count(len(view.rated), 'rating')}</small>"
    yield f'<small class="gist" dir="auto">{_text(gist)}</small>'
    yield "</summary>"
    yield from _user(view)
    yield "</details>"


def _user(view: UserView) -> Iterator[str]:
    yield "<dl>"
    for name, value in describe_facts(view):
        yield f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>"
    yield "</dl>"
    if view.final is not None:
        origin = f"{describe_profile(view.final)}, by {_text(view.distiller or '')}"
        yield f"<h3>Profile <small>{origin}</small></h3>"
        yield from _profile(view.final)
    yield "<h3>How it grew</h3>"
    for step in view.steps:
        yield from _step(step)


def _step(step: Step) -> Iterator[str]:
    yield f"<details><summary>{name_batch(step)} <small>{_growth_in_short(step)}</small></summary>"
    if step.rated:
        yield f'<ol start="{step.rated[0].number}">'
        yield from (_rated(rated) for rated in step.rated)
        yield "</ol>"
    if step.profile is not None:
        yield f"<h4>Profile <small>{describe_profile(step)}</small></h4>"
        yield from _growth(step)
    yield "</details>"


def _growth_in_short(step: Step) -> str:
    if step.profile is None:
        return "no profile after these"
    marks = [change.mark for change in step.changes]
    return f"profile: {count(marks.count('+'), 'sentence')} new, {marks.count('-')} gone" if marks else ""


def _rated(rated: Rated) -> str:
    others = "" if rated.others is None else f" <small>others {rated.others:.1f}</small>"
    memory = f'<p dir="auto">{_text(rated.memory)}</p>' if rated.memory else ""
    return f"<li><bdi>{_text(rated.title)}</bdi> <b>{label_of(rated.rating)}</b>{others}{memory}</li>"


def _growth(step: Step) -> Iterator[str]:
    if not step.changes:
        yield from _profile(step)
        return
    yield '<ul class="changes">'
    for mark, sentence in summarise_changes(step.changes):
        name, sign = _MARKS[mark]
        yield f'<li class="{name}"><span>{sign}</span> <span dir="auto">{_text(sentence)}</span></li>'
    yield "</ul>"
    yield "<details><summary><small>the whole profile</small></summary>"
    yield from _profile(step)
    yield "</details>"


def _profile(step: Step) -> Iterator[str]:
    yield "<blockquote>"
    yield from (f'<p dir="auto">{_text(part)}</p>' for part in (step.profile or "").splitlines() if part.strip())
    yield "</blockquote>"


def _text(text: str) -> str:
    return escape(plain(text))


_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
{style}
</style>
</head>
<body>
<main>
<h1>{title}</h1>"""

_STYLE = """:root {
  color-scheme: light dark;
  --ink: #1d2126; --soft: #5d6671; --paper: #fbfbfa; --card: #fff; --line: #dfe2e6; --mark: #eef1f5;
  --new: #e3f4e6; --new-ink: #1c6b2c; --gone: #fbe7e5; --gone-ink: #a2311f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e4e7eb; --soft: #98a2ae; --paper: #14171a; --card: #1c2025; --line: #333a42; --mark: #272d34;
    --new: #16301c; --new-ink: #86d195; --gone: #3a1d1a; --gone-ink: #f0a196;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 50rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; }
h2 { font-size: 1.1rem; display: inline; margin: 0; }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
h4 { font-size: .95rem; margin: 1rem 0 .5rem; }
p { margin: 0 0 .5rem; }
small { color: var(--soft); font-size: .85rem; font-weight: normal; }
summary { cursor: pointer; padding: .4rem 0; }
.user { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
.user { margin: .75rem 0; padding: .25rem 1rem; }
.user[open], section.user { padding-bottom: 1rem; }
.user > details { border-top: 1px solid var(--line); }
.user > details[open] { padding-bottom: .75rem; }
.gist { display: block; }
[open] > summary .gist { display: none; }
code { background: var(--mark); border-radius: .25rem; padding: .1rem .3rem; font-size: .9em; white-space: nowrap; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .5rem 1rem; margin: .5rem 0 0; }
dt { color: var(--soft); font-size: .85rem; }
dd { margin: 0; }
blockquote { margin: 0; padding: .6rem .9rem; background: var(--mark); border-radius: .35rem; }
blockquote p:last-child { margin: 0; }
ol { margin: .25rem 0 .75rem; padding-left: 2.2rem; }
ol > li { margin-bottom: .5rem; }
ol > li::marker { color: var(--soft); font-variant-numeric: tabular-nums; }
ol b { display: inline-block; min-width: 1.7em; padding: 0 .3em; text-align: center; }
ol b { background: var(--mark); border-radius: .3rem; }
ol small { white-space: nowrap; }
ol p { color: var(--soft); font-size: .9rem; margin: 0; }
.changes { list-style: none; margin: 0 0 .25rem; padding: 0; font-size: .93rem; }
.changes li { display: flex; gap: .6rem; padding: .1rem .6rem; border-radius: .25rem; margin-bottom: 2px; }
.changes span:first-child { font-family: ui-monospace, monospace; }
.new { background: var(--new); } .new span:first-child { color: var(--new-ink); }
.gone { background: var(--gone); } .gone span:first-child { color: var(--gone-ink); }
.same { color: var(--soft); }"""
