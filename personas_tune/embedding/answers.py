"""What a server's answer to a request for embeddings holds."""

import base64
import binascii
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personas_tune.embedding.vectors import to_unit_length
from personas_tune.llm.calls import Rejected


def read_vectors(body: str, n_texts: int, dimensions: int | None = None) -> NDArray[np.float32]:
    """The vectors in an answer, scaled to length 1, in the order of the texts, shape ``(n_texts, dim)``.

    Args:
        body: The whole body; its vectors are lists of numbers, or float32 in base64.
        n_texts: How many texts were sent.
        dimensions: How long vectors were asked for; None for the model's own length.

    Raises:
        Rejected: If it isn't one usable vector for each text.
    """
    entries = _entries(body)
    if len(entries) != n_texts:
        raise Rejected(f"{len(entries)} vectors for {n_texts} texts")
    places = [entry.get("index") for entry in entries]
    if sorted(place for place in places if type(place) is int) != list(range(n_texts)):
        raise Rejected(f"the vectors' indices aren't 0 to {n_texts - 1}")
    vectors = [_vector(entry.get("embedding")) for _, entry in sorted(zip(places, entries, strict=True), key=_first)]
    sizes = sorted({len(vector) for vector in vectors})
    if len(sizes) > 1 or (dimensions is not None and sizes != [dimensions]):
        asked = "of one length" if dimensions is None else f"of {dimensions}"
        raise Rejected(f"vectors of {' and '.join(map(str, sizes))} numbers, not {asked}")
    matrix = np.stack(vectors)
    if not np.isfinite(matrix).all():
        raise Rejected("numbers that aren't finite")
    if not matrix.any(axis=1).all():
        raise Rejected("a vector of nothing but zeros")
    return to_unit_length(matrix)


def _entries(body: str) -> list[dict[str, Any]]:
    try:
        entries = json.loads(body)["data"]
    except (ValueError, LookupError, TypeError, RecursionError):
        entries = None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries) or not entries:
        raise Rejected("no list of vectors under `data`")
    return entries


def _vector(told: object) -> NDArray[np.float32]:
    try:
        if isinstance(told, str):
            numbers = np.frombuffer(base64.b64decode(told, validate=True), dtype="<f4")
        else:
            with np.errstate(over="ignore"):  # becomes infinite, and is refused as such
                numbers = np.array(told, dtype=np.float64).astype(np.float32)
    except (ValueError, TypeError, OverflowError, binascii.Error) as error:
        raise Rejected(f"a vector that can't be read ({error})") from error
    if numbers.ndim != 1 or not len(numbers):
        raise Rejected("a vector that is no list of numbers")
    return numbers


def _first(pair: tuple[Any, Any]) -> Any:
    return pair[0]
