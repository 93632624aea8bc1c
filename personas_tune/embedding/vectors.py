"""Vectors of texts, and the space they lie in."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from personas_tune.errors import DataError


@dataclass(frozen=True)
class Space:
    """Where vectors come from: only vectors of one space may be compared.

    Args:
        embedder: The embedder's name, as in the config.
        dim: How many numbers a vector has.
        fit: Hex sha256 of all that decides a text's vector.
    """

    embedder: str
    dim: int
    fit: str

    def __str__(self) -> str:
        return f"{self.embedder}/{self.dim}/{self.fit[:12]}"


@dataclass(frozen=True, eq=False)
class Embeddings:
    """One vector a text, shape ``(n_texts, dim)``: of unit length, or all zero where the text has no known word."""

    vectors: NDArray[np.float32]
    space: Space

    @property
    def is_known(self) -> NDArray[np.bool_]:
        """Which texts have a direction, shape ``(n_texts,)``."""
        is_known: NDArray[np.bool_] = (self.vectors != 0).any(axis=1)
        return is_known

    def take(self, rows: NDArray[np.integer] | NDArray[np.bool_]) -> "Embeddings":
        """The named rows, by number or by mask."""
        return Embeddings(self.vectors[rows], self.space)


class Embedder(Protocol):
    """Turns texts into vectors of one space."""

    @property
    def space(self) -> Space:
        """The space that all of this embedder's vectors lie in."""

    def embed(self, texts: Sequence[str]) -> Embeddings:
        """One vector a text, independent of the other texts."""

    def files(self) -> dict[str, bytes]:
        """What tells which embedder this is and loads it again, by file name; no secrets."""


class Fittable(Protocol):
    """An embedder before it has seen texts."""

    def fit(self, texts: Sequence[str]) -> Embedder:
        """The embedder that has learnt from ``texts`` what it has to: its words, or how long its vectors are."""


def embed_repeated(embedder: Embedder, texts: Sequence[str]) -> Embeddings:
    """Embed texts of which many are equal, each distinct one once."""
    row_of = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    rows = np.array([row_of[text] for text in texts], dtype=np.int64)
    return embedder.embed(list(row_of)).take(rows)


def in_their_places(texts: Sequence[str], vector_of: Mapping[str, NDArray[np.float32]], space: Space) -> Embeddings:
    """One row a text; all zero for a text that has no vector."""
    vectors = np.zeros((len(texts), space.dim), np.float32)
    for row, text in enumerate(texts):
        if text in vector_of:
            vectors[row] = vector_of[text]
    return Embeddings(vectors, space)


def to_unit_length(vectors: NDArray[np.floating]) -> NDArray[np.float32]:
    """Rows scaled to length 1, each by itself; none may be zero."""
    wide = vectors.astype(np.float64)
    unit: NDArray[np.float32] = (wide / np.sqrt((wide * wide).sum(axis=1, keepdims=True))).astype(np.float32)
    return unit


def npy_bytes(array: NDArray[Any]) -> bytes:
    """An array as the content of a ``.npy`` file."""
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def require_same_space(space: Space, other: Space, *, where: str) -> None:
    """Refuse to compare vectors of different embedders or fits.

    Raises:
        DataError: If the spaces differ.
    """
    if space != other:
        raise DataError(
            f"vectors of embedder {other} can't be compared with vectors of {space}",
            where=where,
            remedy="embed both with the embedder that is stored beside the index or the personas",
        )
