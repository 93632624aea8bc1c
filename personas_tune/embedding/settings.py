"""How texts are embedded by anything but ``lsa``: the section ``embedding`` of a config, and what it rests on."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from personas_tune.addresses import bare_address
from personas_tune.llm.settings import ServerSettings


@dataclass(frozen=True)
class EmbeddingSettings:
    """The means that an embedder may use.

    Args:
        server: For ``openai``: the server, its model and the bounds on its use.
        journal: For ``openai``: the file that keeps every answer.
        dimensions: For ``openai``: how long vectors the model is asked for; None for its own length.
        inputs_per_request: For ``openai``: at most so many texts a request.
        stated_base_url: The server's address as the config has it, for the record.
        path: For ``sentence-transformers``: the folder of the model.
        device: For ``sentence-transformers``: what computes.
    """

    server: ServerSettings
    journal: Path
    dimensions: int | None = None
    inputs_per_request: int = 256
    stated_base_url: str | None = None
    path: str | None = None
    device: str = "cpu"

    @classmethod
    def of(
        cls, section: Mapping[str, Any], *, stated_base_url: str | None, journal: Path, device: str
    ) -> "EmbeddingSettings":
        """The settings in the section ``embedding`` of a config.

        Args:
            section: The section's values, references resolved.
            stated_base_url: Its ``base_url`` as it was written: a reference stays one.
            journal: The experiment's journal.
            device: The experiment's device.
        """
        return cls(
            server=ServerSettings.of({**section, "section": "embedding"}),
            journal=journal,
            dimensions=section["dimensions"],
            inputs_per_request=section["inputs_per_request"],
            stated_base_url=_stated(stated_base_url),
            path=section["path"],
            device=device,
        )


def _stated(base_url: str | None) -> str | None:
    """What may be stored of an address; a reference to the environment stays as it was written."""
    return base_url if base_url is None or base_url.startswith("${") else bare_address(base_url)
