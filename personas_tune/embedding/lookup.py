"""Vectors of texts: the journal's, else the server's.

Every answer goes through the experiment's journal, in which a text is found again by a name of its
own, whatever request it was sent in.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from personas_tune.embedding.answers import read_vectors
from personas_tune.embedding.settings import EmbeddingSettings
from personas_tune.errors import DataError, ServerError
from personas_tune.llm.calls import EMBEDDINGS, Call, Chain, Rejected, Request
from personas_tune.llm.journal import Journal
from personas_tune.llm.parts import find_parts
from personas_tune.llm.replay import finished_chains

# Part of every text's name: raise it when texts are sent or vectors are read in another way.
_VERSION = "embeddings-1"
_MAX_TRIES = 3
# OpenAI takes 300,000 tokens a request, and English has about four characters a token.
_CHARACTERS_PER_REQUEST = 400_000
# A refused request is sent again as requests of so many times fewer texts.
_SPLIT = 16
_REFUSED = ("HTTP 400", "HTTP 413", "HTTP 422")
_SHOWN = 60

Vectors: TypeAlias = dict[str, NDArray[np.float32]]
_Texts: TypeAlias = tuple[str, ...]


def deciding(settings: EmbeddingSettings) -> dict[str, object]:
    """All that decides a text's vector, as far as it is ours to decide."""
    return {"model": settings.server.model, "dimensions": settings.dimensions, "version": _VERSION}


def vectors_of(texts: Sequence[str], settings: EmbeddingSettings, journal: Journal) -> Vectors:
    """The unit vector of each text.

    Args:
        texts: Different ones, none of them blank.
        settings: The server, its model and the bounds on its use.
        journal: Has the texts that were embedded before, and keeps all others.

    Raises:
        DataError: If a text can't be embedded, or the model's vectors aren't of one length.
        ServerError: If the server can't be used.
        BudgetError: If the sum set is spent.
    """
    vectors = _known(texts, settings, journal)
    missing = [text for text in texts if text not in vectors]
    vectors |= _embedded(missing, settings.inputs_per_request, settings, journal)
    sizes = sorted({len(vector) for vector in vectors.values()})
    if len(sizes) > 1:
        raise DataError(
            f"vectors of {' and of '.join(map(str, sizes))} numbers under the name of one model",
            where=f"model {settings.server.model}, journal {journal.path}",
            remedy="another model goes by that name now: set distill.journal to a new file",
        )
    return vectors


def _known(texts: Sequence[str], settings: EmbeddingSettings, journal: Journal) -> Vectors:
    """The vectors of the texts for which the journal holds a usable answer."""
    text_of = {_name(text, settings): text for text in texts}
    vectors: Vectors = {}
    for body, places in find_parts(journal, [each for name in text_of for each in (name, _second_name(name))]):
        own = {name: place for name, place in places.items() if name in text_of}
        (n_texts,) = {places[_second_name(name)] - place for name, place in own.items()}
        with suppress(Rejected):
            rows = read_vectors(body, n_texts, settings.dimensions)
            vectors.update((text_of[name], rows[place]) for name, place in own.items())
    return vectors


def _embedded(texts: Sequence[str], n_inputs: int, settings: EmbeddingSettings, journal: Journal) -> Vectors:
    """The vectors of texts that the journal doesn't know, at most so many of them a request.

    What the server refuses is asked again in smaller requests: it may have held more texts or tokens
    than the server takes at once, or a single text that is too long, which is alone in the end.
    """
    if not texts:
        return {}
    requests = list(_in_requests(texts, n_inputs))
    n_fewer = max(1, max(map(len, requests)) // _SPLIT)
    try:
        vectors, why_of = _asked(requests, settings, journal)
        left = list(why_of)
    except ServerError as error:
        if not error.what.startswith(_REFUSED):
            raise
        # It took no request at all. The first one's texts tell whether it ever takes one.
        vectors, why_of, left = {}, {requests[0]: error.what}, requests
    _give_up_on_the_hopeless(why_of, len(texts), settings)
    if left is requests:
        vectors = _embedded(left.pop(0), n_fewer, settings, journal)
    return vectors | _embedded([text for request in left for text in request], n_fewer, settings, journal)


def _asked(
    requests: Sequence[_Texts], settings: EmbeddingSettings, journal: Journal
) -> tuple[Vectors, dict[_Texts, str]]:
    """The vectors that the server gives, and why the other requests have none."""
    from personas_tune.llm.online import run_online  # the openai library takes a second to import

    def chains() -> Iterator[tuple[str, Chain[Vectors]]]:
        return ((str(number), _ask(texts, settings)) for number, texts in enumerate(requests))

    why_of = run_online(
        chains(),
        journal=journal,
        server=settings.server,
        max_tries=_MAX_TRIES,
        n_calls=len(requests),
        what="embedding",
    )
    vectors: Vectors = {}
    for found in finished_chains(chains(), journal, leave_out=why_of):
        vectors |= found
    return vectors, {requests[int(number)]: why for number, why in why_of.items()}


def _ask(texts: _Texts, settings: EmbeddingSettings) -> Chain[Vectors]:
    dimensions = settings.dimensions
    body: dict[str, Any] = {"model": settings.server.model, "input": list(texts), "encoding_format": "base64"}
    if dimensions is not None:
        body["dimensions"] = dimensions
    names = [_name(text, settings) for text in texts]
    rows = yield Call(
        Request(EMBEDDINGS, body, _VERSION),
        read=lambda answer: read_vectors(answer, len(texts), dimensions),
        expected_output_tokens=0,
        parts=(*names, *map(_second_name, names)),
    )
    return dict(zip(texts, rows, strict=True))


def _in_requests(texts: Sequence[str], n_inputs: int) -> Iterator[_Texts]:
    """Texts by requests, in order; a text longer than a request should be is alone in its own."""
    request: list[str] = []
    n_characters = 0
    for text in texts:
        if request and (len(request) == n_inputs or n_characters + len(text) > _CHARACTERS_PER_REQUEST):
            yield tuple(request)
            request, n_characters = [], 0
        request.append(text)
        n_characters += len(text)
    if request:
        yield tuple(request)


def _give_up_on_the_hopeless(why_of: Mapping[_Texts, str], n_texts: int, settings: EmbeddingSettings) -> None:
    """Raise for texts refused alone, and for requests that have no usable answer after all attempts."""
    hopeless = {texts: why for texts, why in why_of.items() if len(texts) == 1 or not why.startswith(_REFUSED)}
    if not hopeless:
        return
    texts, why = next(iter(hopeless.items()))
    shown = repr(texts[0] if len(texts[0]) <= _SHOWN else texts[0][:_SHOWN] + "...")
    raise DataError(
        f"{sum(map(len, hopeless))} of {n_texts} texts could not be embedded, the first {shown} ({why})",
        where=f"model {settings.server.model}",
        remedy="mend the text, or see embedding.model and embedding.dimensions"
        if why.startswith(_REFUSED)
        else "run the same command to go on: all other answers are kept",
    )


def _name(text: str, settings: EmbeddingSettings) -> str:
    return name_of({"path": EMBEDDINGS, **deciding(settings), "text": text})


def _second_name(name: str) -> str:
    """A text's second name; those of a request stand behind all of its first ones.

    So an answer that is found by one text tells how many vectors it should hold: the two names are
    so many places apart.
    """
    return name_of({"second name of": name})


def name_of(content: Mapping[str, object]) -> str:
    """Hex sha256 of canonical JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
