"""Texts to vectors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from personas_tune.embedding import api, lsa, sentences
from personas_tune.embedding.lsa import Lsa, LsaEmbedder, Reads
from personas_tune.embedding.settings import EmbeddingSettings
from personas_tune.embedding.stored import REMEDY, read_description
from personas_tune.embedding.vectors import Embedder, Fittable
from personas_tune.errors import ConfigError, DataError

__all__ = ["EmbeddingSettings", "deciding_settings", "load_embedder", "make_embedder"]


def make_embedder(
    name: str, dim: int, seed: int, reads: Reads = "words", settings: EmbeddingSettings | None = None
) -> Fittable:
    """The embedder of that name, to be fitted with ``fit(texts)``.

    Args:
        name: ``lsa``, ``openai`` or ``sentence-transformers``.
        dim: Dimensions of its vectors, for ``lsa``; the others' are the model's.
        seed: Seeds what is random in the fit, for ``lsa``.
        reads: ``tastes`` for profiles, ``words`` for all else; only a bag of words needs telling.
        settings: The means of the embedders other than ``lsa``.

    Raises:
        ConfigError: If there is no such embedder, or its means aren't given.
    """
    if name == lsa.NAME:
        return Lsa(dim=dim, seed=seed, reads=reads)
    if name == api.NAME:
        return api.ApiModel(_given(settings, name))
    if name == sentences.NAME:
        means = _given(settings, name)
        return sentences.SentenceModel(means.path, means.device)
    raise ConfigError(f"no embedder {name}", where="personas.embedder, retrieval.embedder", remedy=_KNOWN)


def load_embedder(folder: Path, settings: EmbeddingSettings | None = None) -> Embedder:
    """Read a fitted embedder from the folder that a stage wrote it to.

    Args:
        folder: The stage's folder ``embedder``.
        settings: The means of the embedders other than ``lsa``. Model and dimensions are those of the
            stored embedder, whatever the settings say.

    Raises:
        MissingInputError: If a file isn't there.
        DataError: If a file is damaged or belongs to another fit.
        ConfigError: If the embedder needs means that aren't given.
    """
    description = read_description(folder)
    name = description.space.embedder
    if name == lsa.NAME:
        return LsaEmbedder.load(folder)
    if name == api.NAME:
        return api.ApiEmbedder.load(description, _given(settings, name))
    if name == sentences.NAME:
        path, device = (None, "cpu") if settings is None else (settings.path, settings.device)
        return sentences.SentenceEmbedder.load(description, path, device)
    raise DataError(f"no embedder {name!r} is known", where=str(description.file), remedy=REMEDY)


def deciding_settings(name: str, section: Mapping[str, Any], settings: EmbeddingSettings) -> dict[str, Any]:
    """A stage's own section, and what else decides its vectors: limits and prices don't.

    Args:
        name: The embedder's.
        section: The stage's section, whose ``dim`` is for ``lsa`` alone.
        settings: The means of the embedders other than ``lsa``.

    Returns:
        The section, with the key ``embedding`` for embedders other than ``lsa``.

    Raises:
        ConfigError: If a model isn't there.
    """
    if name == lsa.NAME:
        return dict(section)
    own = {key: value for key, value in section.items() if key != "dim"}
    if name == api.NAME:
        return {**own, "embedding": api.ApiModel(settings).description}
    return {**own, "embedding": {"sha256": sentences.SentenceModel(settings.path).sha256}}


_KNOWN = f"use {lsa.NAME}, {api.NAME} or {sentences.NAME}"


def _given(settings: EmbeddingSettings | None, name: str) -> EmbeddingSettings:
    if settings is None:
        raise ConfigError(
            f"embedder {name} needs a server and a journal, or a model's folder",
            where="embedding",
            remedy="pass personas_tune.embedding.EmbeddingSettings",
        )
    return settings
