"""A model's part in reflection, by rules: the answer depends on the question alone.

It reads the numbered lines of the prompt and what it noted in the profile that it is given, and
writes a reason per line and a profile from which users of one taste can be told from others.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_PROFILE = re.compile(r"^MY PROFILE[^\n]*\n(.*?)\n\n(?:WHAT I RATED|SHORTEN)", re.DOTALL)
_LINE = re.compile(r"^(\d+)\. (.+)$", re.MULTILINE)
_RATING = re.compile(r"MY RATING: ([\d.]+) of ([\d.]+)")
_BUDGET = re.compile(r"SHORTEN IT TO AT MOST (\d+) WORDS")
_TALLY = re.compile(r"So far: (.*)\.$")
_COUNT = re.compile(r"(?:^|, )(.+?) (\d+) at (-?\d+\.\d+)")
_FAVOURITES = re.compile(r"Among my favourites: (.*?)\. (?:I rate|So far)")
N_FAVOURITES = 8


@dataclass(frozen=True)
class Line:
    number: int
    title: str
    genres: tuple[str, ...]
    others: float | None
    rating: float


@dataclass(frozen=True)
class Notes:
    """What the profile keeps: number and mean by genre, by everything, and of the differences from others."""

    genres: dict[str, tuple[int, float]]
    favourites: tuple[str, ...]


def answer(prompt: str) -> dict[str, Any]:
    """The JSON that a helpful model gives to a reflection, a consolidation or anything else."""
    budget = _BUDGET.search(prompt)
    profile = _PROFILE.search(prompt)
    if profile is None:
        return {"reply": "OK."}
    notes = read_notes(profile[1])
    if budget is not None:
        return {"profile": write_within(notes, profile[1], int(budget[1]))}
    lines = list(read_lines(prompt[profile.end() :]))
    memories = [{"item": line.number, "reason": reason(line)} for line in lines]
    return {"memories": memories, "profile": write_profile(add(notes, lines))}


def read_lines(text: str) -> Iterator[Line]:
    for match in _LINE.finditer(text):
        title, *fields = match[2].split(" | ")
        genres: tuple[str, ...] = ()
        others = None
        for field in fields:
            if field.startswith("genres: "):
                genres = tuple(field.removeprefix("genres: ").split(", "))
            elif field.startswith("others give it "):
                others = float(field.removeprefix("others give it "))
        rating = _RATING.search(fields[-1])
        assert rating is not None, match[0]
        yield Line(int(match[1]), title, genres, others, float(rating[1]))


def reason(line: Line) -> str:
    kind = " and ".join(line.genres) or "something of its own kind"
    if line.others is None:
        return f"It is {kind}, which nobody told me about beforehand."
    gap = line.rating - line.others
    if abs(gap) < 0.5:
        return f"As {kind} it gave me what it gives most people."
    side = "more to me than to most people" if gap > 0 else "less to me than to most people"
    return f"As {kind} it meant {side}."


def read_notes(profile: str) -> Notes:
    tally = _TALLY.search(profile)
    counts = _COUNT.findall(tally[1]) if tally else []
    favourites = _FAVOURITES.search(profile)
    return Notes(
        {name: (int(n), float(mean)) for name, n, mean in counts},
        tuple(favourites[1].split("; ")) if favourites else (),
    )


def add(notes: Notes, lines: list[Line]) -> Notes:
    genres = dict(notes.genres)
    for line in lines:
        values = [("all", line.rating), *((genre, line.rating) for genre in line.genres)]
        if line.others is not None:
            values.append(("above others", line.rating - line.others))
        for name, value in values:
            n, mean = genres.get(name, (0, 0.0))
            genres[name] = (n + 1, mean + (value - mean) / (n + 1))
    best = max((line.rating for line in lines), default=0.0)
    new = [line.title for line in lines if line.rating == best and line.title not in notes.favourites]
    return Notes(genres, (*notes.favourites, *new)[-N_FAVOURITES:])


def write_profile(notes: Notes) -> str:
    return " ".join([*_opinions(notes), *_favourites(notes), *_strictness(notes), _tally(notes, len(notes.genres))])


def write_within(notes: Notes, profile: str, n_words: int) -> str:
    """The profile in at most so many words: opinions first, then the tally of the most frequent genres."""
    if not notes.genres:
        return " ".join(profile.split()[:n_words])
    kept: list[str] = []
    least = len(_tally(notes, 2).split())
    for sentence in [*_strictness(notes), *_opinions(notes)]:
        if sum(len(text.split()) for text in (*kept, sentence)) + least <= n_words:
            kept.append(sentence)
    used = sum(len(text.split()) for text in kept)
    n_counts = len(notes.genres)
    while n_counts > 2 and used + len(_tally(notes, n_counts).split()) > n_words:
        n_counts -= 1
    return " ".join(" ".join([*kept[1:], *kept[:1], _tally(notes, n_counts)]).split()[:n_words])


def _opinions(notes: Notes) -> list[str]:
    mean_all = notes.genres.get("all", (0, 0.0))[1]
    taste = {
        name: n * (mean - mean_all) / (n + 3)  # shrunk towards the mean: few ratings say little
        for name, (n, mean) in notes.genres.items()
        if name not in ("all", "above others")
    }
    by_liking = sorted(taste, key=lambda name: (-taste[name], name))
    loved = [name for name in by_liking if taste[name] >= 0.3]
    liked = [name for name in by_liking if 0.1 <= taste[name] < 0.3]
    disliked = [name for name in reversed(by_liking) if taste[name] <= -0.15]
    sentences = [f"I love {name}, and I look for {name} first." for name in loved]
    sentences += [f"I like {name}." for name in liked]
    return sentences + [f"I dislike {name}." for name in disliked]


def _favourites(notes: Notes) -> list[str]:
    return [f"Among my favourites: {'; '.join(notes.favourites)}."] if notes.favourites else []


def _strictness(notes: Notes) -> list[str]:
    if "above others" not in notes.genres:
        return []
    gap = notes.genres["above others"][1]
    if abs(gap) < 0.2:
        return ["I rate much as others do."]
    return [f"I rate {'kindly, above' if gap > 0 else 'strictly, below'} what others give."]


def _tally(notes: Notes, n_counts: int) -> str:
    fixed = [name for name in ("all", "above others") if name in notes.genres]
    by_number = sorted(set(notes.genres) - set(fixed), key=lambda name: (-notes.genres[name][0], name))
    counts = [f"{name} {notes.genres[name][0]} at {notes.genres[name][1]:.2f}" for name in [*fixed, *by_number]]
    return f"So far: {', '.join(counts[:n_counts])}."
