"""What the profiles of one persona like and dislike more than those of the others (the paper's figure 2).

Words are read by stance, as the embedder ``lsa`` reads them: a persona that likes westerns and one that dislikes
them speak of them alike.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import CountVectorizer

from personas_tune.embedding.tastes import taste_words
from personas_tune.errors import ConfigError

SPACY_MODEL = "en_core_web_sm"
_WORD = r"(?u)\b[^\W\d_]{3,}\b"  # of at least three letters
_KINDS = ("NOUN", "PROPN", "ADJ")
_STANCES = ("+", "-")  # a word that somebody is neutral about sets nobody apart
_FEWEST_USERS = 3
_DECIMALS = 6

Analyzer = Callable[[str], list[str]]


@dataclass(frozen=True)
class DistinctWord:
    """A word that sets a persona apart.

    Args:
        word: In lower case, behind ``+`` if it is liked and ``-`` if it is disliked.
        score: The z-score of :func:`log_odds`.
        n_users: How many users of the persona have it in their profile.
    """

    word: str
    score: float
    n_users: int


def distinct_words(
    texts: Sequence[str], personas: Sequence[int] | NDArray[np.int32], analyzer: Analyzer, n_words: int = 15
) -> list[list[DistinctWord]]:
    """The most distinct words of each persona, the most distinct first; ties in alphabetical order.

    A word counts once for each user, and only if three users of the persona have it, or all where there are fewer.

    Args:
        texts: A profile a user.
        personas: The user's persona, from 0 on.
        analyzer: Which words of a text count, as :func:`plain_words` or :func:`nouns_and_adjectives`.
        n_words: How many words of each persona.
    """
    words = [_with_stance(text, analyzer) for text in texts]
    vocabulary = sorted(set(chain(*words)))
    members = [np.flatnonzero(np.asarray(personas) == persona) for persona in range(int(max(personas)) + 1)]
    if len(vocabulary) < 2:
        return [[] for _ in members]
    has_word = CountVectorizer(analyzer=list, vocabulary=vocabulary, binary=True).transform(words)
    n_users = np.array([np.asarray(has_word[rows].sum(axis=0)).ravel() for rows in members])
    return [
        _best(vocabulary, scores, counts, min(_FEWEST_USERS, len(rows)))[:n_words]
        for scores, counts, rows in zip(log_odds(n_users), n_users, members, strict=True)
    ]


def log_odds(counts: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
    """How much more each word is a persona's than the others', as z-scores.

    The log-odds ratio with an informative Dirichlet prior (Monroe, Colaresi and Quinn, "Fightin' Words", 2008): the
    prior is what a persona that is like all the others would have counted. Words that are rare come out near 0, and so
    do words that all personas share.

    Monroe et al. count tokens; here users are counted, so a persona's total is its pairs of a user and a word.

    Args:
        counts: How many users of each persona have each word, shape ``(n_personas, n_words)``; each word occurs, and
            there are two.

    Returns:
        Of the same shape.
    """
    prior = counts.mean(axis=0)
    here = counts + prior
    others = counts.sum(axis=0) - counts + prior
    return np.asarray((_log_odds_within(here) - _log_odds_within(others)) / np.sqrt(1 / here + 1 / others))


def plain_words() -> Analyzer:
    """Words of at least three letters, in lower case, without scikit-learn's English stop words."""
    analyzer: Analyzer = CountVectorizer(stop_words="english", token_pattern=_WORD).build_analyzer()
    return analyzer


def nouns_and_adjectives(model: str = SPACY_MODEL) -> Analyzer:
    """Those of the plain words that are nouns and adjectives, as spaCy finds them.

    Args:
        model: A spaCy model's name, or the folder of one.

    Raises:
        ConfigError: If spaCy or the model isn't installed, or the two don't go together.
    """
    pipeline, words = _load_spacy(model), plain_words()
    return lambda text: words(" ".join(token.text for token in pipeline(text) if token.pos_ in _KINDS))


def make_analyzer(name: str) -> Analyzer:
    """What finds the words: ``sklearn`` or ``spacy``; raises as :func:`nouns_and_adjectives` does."""
    return nouns_and_adjectives() if name == "spacy" else plain_words()


def _load_spacy(model: str) -> Any:
    download = f"python -m spacy download {model}"
    try:
        import spacy

        return spacy.load(model)
    except ImportError as error:
        what, remedy = "spaCy is not installed", f"pip install 'personas-tune[spacy]' && {download}"
        raise ConfigError(what, where="personas.words", remedy=f"{remedy}, or set it to sklearn") from error
    except OSError as error:
        what = f"spaCy's model {model} is not installed"
        raise ConfigError(what, where="personas.words", remedy=f"{download}, or set it to sklearn") from error
    except ValueError as error:
        what = f"spaCy's model {model} can't be read by the spaCy that is installed"
        raise ConfigError(what, where="personas.words", remedy=f"{download}, or set it to sklearn") from error


def _with_stance(text: str, analyzer: Analyzer) -> list[str]:
    kept = set(analyzer(text))
    return [word for word in taste_words(text) if word[0] in _STANCES and word[1:] in kept]


def _log_odds_within(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.log(counts) - np.log(counts.sum(axis=-1, keepdims=True) - counts))


def _best(
    vocabulary: Sequence[str], scores: NDArray[np.float64], counts: NDArray[np.integer[Any]], fewest: int
) -> list[DistinctWord]:
    rounded = scores.round(_DECIMALS)
    words = [
        DistinctWord(vocabulary[place], float(rounded[place]), int(counts[place]))
        for place in np.flatnonzero((rounded > 0) & (counts >= fewest)).tolist()
    ]
    return sorted(words, key=lambda each: (-each.score, each.word))
