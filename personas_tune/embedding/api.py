"""Embeddings by an OpenAI-compatible server, each text paid for once."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from personas_tune.embedding.lookup import Vectors, deciding, name_of, vectors_of
from personas_tune.embedding.settings import EmbeddingSettings
from personas_tune.embedding.stored import REMEDY, Description
from personas_tune.embedding.vectors import Embeddings, Space, in_their_places, require_same_space
from personas_tune.errors import DataError
from personas_tune.llm.journal import Journal
from personas_tune.llm.settings import access_to
from personas_tune.workspace import to_json

NAME = "openai"


@dataclass(frozen=True)
class ApiModel:
    """A model behind a server.

    Args:
        settings: The server, its model and the journal.
    """

    settings: EmbeddingSettings

    @property
    def description(self) -> dict[str, object]:
        """All that decides a text's vector, as far as it is ours to decide."""
        return deciding(self.settings)

    def fit(self, texts: Sequence[str]) -> "ApiEmbedder":
        """Embed the texts, of which nothing is learnt but how long the model's vectors are.

        Raises:
            DataError: If a text can't be embedded, or all are blank.
            ServerError: If the server can't be used.
            JournalError: If the journal can't be used.
            BudgetError: If the sum set is spent.
        """
        vectors = self.vectors_of(texts)
        if not vectors:
            raise DataError(f"none of the {len(texts)} texts to embed holds a word", remedy="items need titles")
        dim = len(next(iter(vectors.values())))
        return ApiEmbedder(self, Space(NAME, dim=dim, fit=name_of(self.description)))

    def vectors_of(self, texts: Sequence[str]) -> Vectors:
        """The unit vector of each text that isn't blank; raises as :meth:`fit` does."""
        spoken = list(dict.fromkeys(text for text in texts if text.strip()))
        if not self.settings.journal.exists():
            access_to(self.settings.server)  # begin no journal for a server that can't be asked
        with Journal.open(self.settings.journal) as journal:
            return vectors_of(spoken, self.settings, journal)


@dataclass(frozen=True, eq=False)
class ApiEmbedder:
    """A model behind a server, and the space of its vectors."""

    model: ApiModel
    space: Space

    def embed(self, texts: Sequence[str]) -> Embeddings:
        """One unit vector a text; all zero for a blank one.

        Raises:
            DataError: If a text can't be embedded, or the model's vectors have another length now.
            ServerError: If the server can't be used.
            JournalError: If the journal can't be used.
            BudgetError: If the sum set is spent.
        """
        vectors = self.model.vectors_of(texts)
        for dim in {len(vector) for vector in vectors.values()}:
            require_same_space(self.space, replace(self.space, dim=dim), where=str(self.model.settings.journal))
        return in_their_places(texts, vectors, self.space)

    def files(self) -> dict[str, bytes]:
        """Which model it is and where it was asked; the vectors are in the journal."""
        described = {
            "space": asdict(self.space),
            **self.model.description,
            "base_url": self.model.settings.stated_base_url,
        }
        return {"embedder.json": to_json(described).encode()}

    @classmethod
    def load(cls, description: Description, settings: EmbeddingSettings) -> "ApiEmbedder":
        """The embedder that wrote the description; the settings say where and how it is asked.

        Raises:
            DataError: If the description is damaged, or of a version that asked in another way.
        """
        server = replace(settings.server, model=description.text("model"))
        model = ApiModel(replace(settings, server=server, dimensions=description.content.get("dimensions")))
        if name_of(model.description) != description.space.fit:
            raise DataError(
                f"model and dimensions aren't those of fit {description.space}",
                where=str(description.file),
                remedy=REMEDY,
            )
        return cls(model, description.space)
