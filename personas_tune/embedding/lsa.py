"""The offline embedder: latent semantic analysis, that is TF-IDF weights and a truncated SVD.

Legend of shapes: N texts, W words of the vocabulary, D dimensions.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.utils.extmath import randomized_svd
from threadpoolctl import threadpool_limits

from personas_tune.embedding.tastes import taste_words
from personas_tune.embedding.vectors import Embeddings, Space, npy_bytes
from personas_tune.errors import DataError, MissingInputError
from personas_tune.workspace import to_json

NAME = "lsa"

# Words as they stand, or only those that the text takes a stance to, marked with it.
Reads: TypeAlias = Literal["words", "tastes"]

# Part of every fit's hash: raise it when tokenising or weighting changes.
_VERSION = "lsa-1"
# TF-IDF rows have length 1; what a projection shorter than this points at is rounding noise.
_SHORTEST = 1e-6
_POWER_ITERATIONS = 10


@dataclass(frozen=True)
class Lsa:
    """An LSA embedder that is still to be fitted.

    Args:
        dim: Dimensions wanted; a fit has fewer where the texts don't have that many.
        seed: Seeds the randomised SVD.
        reads: ``tastes`` for profiles, ``words`` for all else.
    """

    dim: int
    seed: int
    reads: Reads = "words"

    def fit(self, texts: Sequence[str]) -> "LsaEmbedder":
        """Learn vocabulary, word weights and dimensions from ``texts``.

        Equal texts and seed give equal bytes, whatever the number of threads.

        Raises:
            DataError: If there is no word to learn.

        Example:
            >>> embedder = Lsa(dim=2, seed=0).fit(["space war", "space love", "quiet love"])
            >>> embedder.embed(["love in space", "unheard-of"]).is_known.tolist()
            [True, False]
        """
        if not any(text.strip() for text in texts):
            raise DataError(f"none of the {len(texts)} texts to embed holds a word", remedy=_NO_WORDS)
        vectorizer = _vectorizer(self.reads)
        try:
            weights = vectorizer.fit_transform(texts)  # (N, W)
        except ValueError as error:
            raise DataError(f"can't learn words from {len(texts)} texts ({error})", remedy=_NO_WORDS) from error
        return LsaEmbedder(
            vocabulary=vectorizer.get_feature_names_out().tolist(),
            idf=vectorizer.idf_,
            components=_components(weights, self.dim, self.seed),
            reads=self.reads,
        )


@dataclass(frozen=True, eq=False)
class LsaEmbedder:
    """A fitted LSA embedder.

    Args:
        vocabulary: The known words, sorted.
        idf: Each word's inverse document frequency, shape ``(W,)``.
        components: The directions that texts are projected on, shape ``(D, W)``.
        reads: How texts become words.
    """

    vocabulary: list[str]
    idf: NDArray[np.float64]
    components: NDArray[np.float32]
    reads: Reads

    @cached_property
    def space(self) -> Space:
        """The space of this fit; its hash covers vocabulary, weights and directions."""
        digest = hashlib.sha256(f"{_VERSION} {self.reads}".encode())
        for content in (_json(self.vocabulary), npy_bytes(self.idf), npy_bytes(self.components)):
            digest.update(content)
        return Space(NAME, dim=len(self.components), fit=digest.hexdigest())

    @cached_property
    def _tfidf(self) -> Any:
        vectorizer = _vectorizer(self.reads, self.vocabulary)
        vectorizer.idf_ = self.idf
        return vectorizer

    def embed(self, texts: Sequence[str]) -> Embeddings:
        """One unit vector a text; all zero for a text without a known word."""
        if not texts:
            return Embeddings(np.zeros((0, self.space.dim), np.float32), self.space)
        # A sparse product runs in scipy's own loops, so no row depends on threads or on other rows.
        projected = self._tfidf.transform(texts) @ self.components.T.astype(np.float64)  # (N, D)
        lengths = np.sqrt((projected * projected).sum(axis=1, keepdims=True))
        is_known = lengths > _SHORTEST
        vectors = np.where(is_known, projected, 0.0) / np.where(is_known, lengths, 1.0)
        return Embeddings(vectors.astype(np.float32), self.space)

    def files(self) -> dict[str, bytes]:
        """The fit as files by name: JSON and plain arrays, no pickles."""
        return {
            "embedder.json": to_json({"space": asdict(self.space), "reads": self.reads}).encode(),
            "vocabulary.json": _json(self.vocabulary),
            "idf.npy": npy_bytes(self.idf),
            "components.npy": npy_bytes(self.components),
        }

    @classmethod
    def load(cls, folder: Path) -> "LsaEmbedder":
        """Read a fit that was written as :meth:`files`; it gives identical vectors.

        Raises:
            MissingInputError: If a file isn't there.
            DataError: If a file is damaged or belongs to another fit.
        """
        try:
            described = json.loads((folder / "embedder.json").read_bytes())
            stated = Space(**described["space"])
            embedder = cls(
                vocabulary=json.loads((folder / "vocabulary.json").read_bytes()),
                idf=np.load(folder / "idf.npy", allow_pickle=False),
                components=np.load(folder / "components.npy", allow_pickle=False),
                reads=described["reads"],
            )
        except FileNotFoundError as error:
            raise MissingInputError(
                "file of the embedder not found", where=str(error.filename), remedy=_REMEDY
            ) from error
        except (ValueError, TypeError, KeyError, EOFError) as error:
            raise DataError(f"unreadable embedder ({error})", where=str(folder), remedy=_REMEDY) from error
        if embedder.space != stated:
            raise DataError(f"the files aren't those of fit {stated}", where=str(folder), remedy=_REMEDY)
        return embedder


_NO_WORDS = "items need titles (data.item_metadata), users need profiles"
_REMEDY = "remove the folder's manifest.json and run the stage that wrote it again"


def _vectorizer(reads: Reads, vocabulary: Sequence[str] | None = None) -> Any:
    if reads == "tastes":
        return TfidfVectorizer(analyzer=taste_words, sublinear_tf=True, vocabulary=vocabulary)
    # Words of one letter count: they may be titles ("M") or ratings ("4").
    return TfidfVectorizer(
        strip_accents="unicode", token_pattern=r"(?u)\b\w+\b", sublinear_tf=True, vocabulary=vocabulary
    )


def _components(weights: Any, dim: int, seed: int) -> NDArray[np.float32]:
    """The leading right singular vectors of the weights, those of (nearly) zero strength left out."""
    with threadpool_limits(1):  # the sums' order, and so the last digits, depend on the number of threads
        _, strengths, directions = randomized_svd(
            weights, n_components=min(dim, *weights.shape), n_iter=_POWER_ITERATIONS, random_state=seed
        )
    is_real = strengths > _SHORTEST * strengths[0]
    return np.ascontiguousarray(directions[is_real], dtype=np.float32)


def _json(words: Sequence[str]) -> bytes:
    return (json.dumps(list(words), ensure_ascii=False, indent=0) + "\n").encode()
