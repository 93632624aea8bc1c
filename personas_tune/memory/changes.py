"""What differs between two profiles of a user, sentence by sentence."""

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

# After a full stop (or ! or ?) and white space, unless what follows goes on in lower case ("vs. others"); after the
# full stops of Chinese and Japanese; at line breaks.
_SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"')\]]))\s+(?![a-z(])|(?<=[。！？])\s*|\s*\n\s*")

_WORD = re.compile(r"\w+")
LIKE = 0.5  # of their words


@dataclass(frozen=True)
class Change:
    """One sentence: ``+`` new, ``-`` gone, ``=`` in both profiles."""

    mark: Literal["+", "-", "="]
    sentence: str


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, in order; abbreviations may end one too early.

    Example:
        >>> split_sentences("I like Heat (1995). Mr. Bean vs. others?\\n- Drama")
        ['I like Heat (1995).', 'Mr.', 'Bean vs. others?', '- Drama']
    """
    return [sentence for part in _SENTENCE_END.split(text) if (sentence := " ".join(part.split()))]


def compare_profiles(before: str, after: str) -> list[Change]:
    """Each sentence of both profiles: kept, gone or new, in reading order; a reworded one follows what it was.

    Example:
        >>> [change.mark for change in compare_profiles("I like War. I love Noir.", "I like War. I love Drama.")]
        ['=', '-', '+']
    """
    old, new = split_sentences(before), split_sentences(after)
    changes: list[Change] = []
    for kind, old_begin, old_end, new_begin, new_end in difflib.SequenceMatcher(None, old, new, False).get_opcodes():
        if kind == "equal":
            changes += [Change("=", sentence) for sentence in new[new_begin:new_end]]
        else:
            changes += _rewording(old[old_begin:old_end], new[new_begin:new_end])
    return changes


def _rewording(old: Sequence[str], new: Sequence[str]) -> Iterator[Change]:
    """All of ``old`` gone and all of ``new`` new, like ones beside each other."""
    begin = 0, 0
    for own, other in [*_like_pairs(old, new), (len(old), len(new))]:
        yield from (Change("-", sentence) for sentence in old[begin[0] : own])
        yield from (Change("+", sentence) for sentence in new[begin[1] : other])
        yield from (Change("-", sentence) for sentence in old[own : own + 1])
        yield from (Change("+", sentence) for sentence in new[other : other + 1])
        begin = own + 1, other + 1


def _like_pairs(old: Sequence[str], new: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Places of the sentences that share at least half of their words, in order, for the largest sum of shares."""
    old_words, new_words = ([set(_WORD.findall(text.lower())) for text in texts] for texts in (old, new))
    best = [[0.0] * (len(new) + 1) for _ in range(len(old) + 1)]  # from sentences i and j on
    for i in reversed(range(len(old))):
        for j in reversed(range(len(new))):
            share = _shared(old_words[i], new_words[j])
            best[i][j] = max(best[i + 1][j], best[i][j + 1], share + best[i + 1][j + 1])
    i = j = 0
    while i < len(old) and j < len(new):
        if best[i][j] == best[i + 1][j]:
            i += 1
        elif best[i][j] == best[i][j + 1]:
            j += 1
        else:
            yield i, j
            i, j = i + 1, j + 1


def _shared(one: set[str], other: set[str]) -> float:
    share = len(one & other) / max(len(one | other), 1)
    return share if share >= LIKE else 0.0
