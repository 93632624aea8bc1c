"""Words with the stance that a profile takes to them.

A bag of words reads "I love horror, I dislike romance" and "I love romance, I dislike horror" alike.
So each word is joined to the stance that governs it: the last word of liking or disliking before it
in its sentence. English; a text without such words is read as liking all that it names.
"""

import re
from itertools import pairwise

_STANCES = {
    "+": "love loves loved loving like likes liked enjoy enjoys enjoyed enjoying prefer prefers preferred "
    "adore adores adored appreciate appreciates appreciated favor favors favour favours fond",
    "0": "neutral indifferent",
    "-": "dislike dislikes disliked disliking hate hates hated avoid avoids avoided avoiding cool detest detests bored",
}
_STANCE_OF = {word: stance for stance, words in _STANCES.items() for word in words.split()}
_OPPOSITE = {"+": "-", "0": "0", "-": "+"}
_COOL_TO = ("about", "on", "towards")  # "cool about jazz"; "cool jazz" takes no stance
_NEGATION = re.compile(r"not|never|cannot|hardly|rarely|\w+n['’]t")
_SENTENCE_END = re.compile(r"[.;!?\n]+")
_WORD = re.compile(r"\w+(?:['’]\w+)*")


def taste_words(text: str) -> list[str]:
    """The words that a text takes a stance to, each behind its stance; all as liked where it takes none.

    Example:
        >>> taste_words("I rate often. I like war films, but don't like romance.")
        ['+war', '+films', '+but', '-romance']
        >>> taste_words("J'aime la guerre")
        ["+j'aime", '+la', '+guerre']
    """
    sentences = [_WORD.findall(sentence) for sentence in _SENTENCE_END.split(text.lower())]
    governed = [word for sentence in sentences for word in _behind_stances(sentence)]
    return governed or ["+" + word for sentence in sentences for word in sentence]


def _behind_stances(sentence: list[str]) -> list[str]:
    stance, is_negated, governed = "", False, []
    for word, following in pairwise([*sentence, ""]):
        if word in _STANCE_OF and (word != "cool" or following in _COOL_TO):
            stance = _OPPOSITE[_STANCE_OF[word]] if is_negated else _STANCE_OF[word]
            is_negated = False
        elif _NEGATION.fullmatch(word):
            is_negated = True
        elif stance:
            governed.append(stance + word)
    return governed
