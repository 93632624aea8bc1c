"""Embeddings by a sentence-transformers model that lies on this machine; nothing is ever downloaded."""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personas_tune.embedding.stored import Description
from personas_tune.embedding.vectors import Embeddings, Space, in_their_places, to_unit_length
from personas_tune.errors import ConfigError, DataError
from personas_tune.workspace import absolute_path, sha256_of_file, to_json

NAME = "sentence-transformers"

# Part of every fit's hash: raise it when texts are read or vectors are made in another way.
_VERSION = "sentence-transformers-1"
# What a model's files are called that decide its vectors: settings, words, weights.
_KINDS = (".json", ".txt", ".model", ".safetensors")
_BATCH_SIZE = 32
_EXTRA = "pip install 'personas-tune[sentence-transformers]'"
_DOWNLOAD = "download the model once and set embedding.path to its folder"


@dataclass(frozen=True)
class SentenceModel:
    """A model in the folder format of sentence-transformers.

    Args:
        path: The folder.
        device: What computes, such as ``cpu`` or ``cuda``.
    """

    path: str | None
    device: str = "cpu"

    @cached_property
    def folder(self) -> Path:
        """The folder.

        Raises:
            ConfigError: If there is none, or it holds no model or one in pickles.
        """
        if self.path is None:
            raise ConfigError("no folder of a model is given", where="embedding.path", remedy=_DOWNLOAD)
        folder = absolute_path(self.path)
        if not folder.is_dir():
            raise ConfigError(f"{self.path} is no folder", where="embedding.path", remedy=_DOWNLOAD)
        _refuse_unusable(folder)
        return folder

    @cached_property
    def sha256(self) -> str:
        """Hex sha256 of all that decides a text's vector: settings, words and weights."""
        files = sorted(
            (str(file.relative_to(self.folder)), file)
            for file in self.folder.rglob("*")
            if file.suffix in _KINDS and file.is_file() and not _is_hidden(file.relative_to(self.folder))
        )
        digest = hashlib.sha256(_VERSION.encode())
        for name, file in files:
            digest.update(f"\n{sha256_of_file(file)} {name}".encode())
        return digest.hexdigest()

    def fit(self, texts: Sequence[str]) -> "SentenceEmbedder":
        """The embedder; of the texts it learns nothing but how long its vectors are.

        Raises:
            ConfigError: If the model can't be loaded.
            DataError: If none of the texts says anything.
        """
        spoken = [text for text in texts if text.strip()]
        if not spoken:
            raise DataError(f"none of the {len(texts)} texts to embed holds a word", remedy="items need titles")
        return SentenceEmbedder(self, Space(NAME, dim=self.encode(spoken[:1]).shape[1], fit=self.sha256))

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """One unit vector a text, shape ``(N, D)``.

        Equal texts in equal company give equal bytes on one machine; in other company the last
        digits may differ, since a batch is padded to its longest text.

        Raises:
            ConfigError: If the model can't be loaded.
            DataError: If a vector has no direction.
        """
        _say_what_is_cut(self._encoder, texts)
        vectors: NDArray[np.float32] = self._encoder.encode(
            list(texts), batch_size=_BATCH_SIZE, show_progress_bar=False, convert_to_numpy=True
        )
        wrong = np.flatnonzero(~np.isfinite(vectors).all(axis=1) | ~vectors.any(axis=1))
        if len(wrong):
            raise DataError(
                f"no direction for {len(wrong)} of {len(texts)} texts, the first {texts[wrong[0]][:60]!r}",
                where=str(self.folder),
                remedy="the model's weights may be damaged",
            )
        return to_unit_length(vectors)

    @cached_property
    def _encoder(self) -> Any:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ConfigError(
                f"sentence-transformers can't be imported ({error})", where="personas.embedder", remedy=_EXTRA
            ) from error
        try:
            encoder = SentenceTransformer(
                str(self.folder),
                device=self.device,
                local_files_only=True,
                model_kwargs={"use_safetensors": True, "dtype": "float32"},
            )
        except Exception as error:  # whatever the library raises, the folder and the device are the user's
            what = (" ".join(str(error).split()) or type(error).__name__)[:200]
            raise ConfigError(
                f"the model can't be loaded ({what})",
                where=f"embedding.path {self.folder}",
                remedy=f"check the folder and device={self.device}",
            ) from error
        return encoder.eval()


@dataclass(frozen=True, eq=False)
class SentenceEmbedder:
    """A model and the space of its vectors."""

    model: SentenceModel
    space: Space

    def embed(self, texts: Sequence[str]) -> Embeddings:
        """One unit vector a text; all zero for a text of nothing but blanks."""
        spoken = list(dict.fromkeys(text for text in texts if text.strip()))
        vectors = self.model.encode(spoken) if spoken else ()
        return in_their_places(texts, dict(zip(spoken, vectors, strict=True)), self.space)

    def files(self) -> dict[str, bytes]:
        """Which model it is and where it lies; the model itself stays there."""
        return {"embedder.json": to_json({"space": asdict(self.space), "path": str(self.model.folder)}).encode()}

    @classmethod
    def load(cls, description: Description, path: str | None, device: str) -> "SentenceEmbedder":
        """The embedder that wrote the description.

        Args:
            description: What is stored of it.
            path: Where the model lies now; None for where it lay.
            device: What computes.

        Raises:
            ConfigError: If the folder is no longer there.
            DataError: If another model lies in it.
        """
        model = SentenceModel(path or description.text("path"), device)
        if model.sha256 != description.space.fit:
            raise DataError(
                f"another model lies in {model.folder} than the one that made these vectors",
                where=str(description.file),
                remedy="set embedding.path to that model's folder",
            )
        return cls(model, description.space)


def _refuse_unusable(folder: Path) -> None:
    if not any((folder / name).is_file() for name in ("modules.json", "config.json")):
        raise ConfigError(
            f"{folder} holds no model (neither modules.json nor config.json)", where="embedding.path", remedy=_DOWNLOAD
        )
    for pickle in sorted(folder.rglob("pytorch_model*.bin")):
        if not any(pickle.parent.glob("*.safetensors")):
            raise ConfigError(
                f"{pickle} is a pickle, which may run any code when it is read",
                where="embedding.path",
                remedy="download or save the model as safetensors",
            )


def _is_hidden(file: Path) -> bool:
    return any(part.startswith(".") for part in file.parts)


def _say_what_is_cut(encoder: Any, texts: Sequence[str]) -> None:
    """Models read so many tokens and no more, and say nothing of the rest: a profile may well be longer."""
    limit, tokenizer = encoder.max_seq_length, encoder.tokenizer
    if limit is None or not callable(tokenizer):
        return
    lengths = [len(ids) for ids in tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]]
    n_cut = sum(length > limit for length in lengths)
    if n_cut:
        print(
            f"embedding: {n_cut} of {len(texts)} texts are longer than the {limit} tokens that the model reads "
            f"(the longest {max(lengths)}); their ends don't count",
            file=sys.stderr,
        )
