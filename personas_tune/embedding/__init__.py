"""Texts to vectors."""

from pathlib import Path

from personas_tune.embedding.lsa import NAME as _LSA
from personas_tune.embedding.lsa import Lsa, LsaEmbedder, Reads
from personas_tune.errors import ConfigError


def make_embedder(name: str, dim: int, seed: int, reads: Reads = "words") -> Lsa:
    """The embedder of that name, to be fitted with ``fit(texts)``.

    Args:
        name: ``lsa``; ``openai`` and ``sentence-transformers`` are not built yet.
        dim: Dimensions of its vectors.
        seed: Seeds what is random in the fit.
        reads: ``tastes`` for profiles, ``words`` for all else; only a bag of words needs telling.

    Raises:
        ConfigError: If there is no such embedder.
    """
    if name != _LSA:
        raise ConfigError(
            f"embedder {name} is not built yet",
            where="personas.embedder, retrieval.embedder",
            remedy="set personas.embedder=lsa retrieval.embedder=lsa",
        )
    return Lsa(dim=dim, seed=seed, reads=reads)


def load_embedder(folder: Path) -> LsaEmbedder:
    """Read a fitted embedder from the folder that a stage wrote it to.

    Raises:
        MissingInputError: If a file isn't there.
        DataError: If a file is damaged or belongs to another fit.
    """
    return LsaEmbedder.load(folder)
