"""How texts are embedded by anything but ``lsa``: the section ``embedding`` of a config, and what it rests on."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

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
            server=ServerSettings.of(section),
            journal=journal,
            dimensions=section["dimensions"],
            inputs_per_request=section["inputs_per_request"],
            stated_base_url=without_secrets(stated_base_url),
            path=section["path"],
            device=device,
        )


def without_secrets(base_url: str | None) -> str | None:
    """An address without user, password and query; a reference to the environment stays as it was written.

    Example:
        >>> without_secrets("http://me:secret@localhost:8000/v1?key=1")
        'http://localhost:8000/v1'
    """
    if base_url is None or base_url.startswith("${"):
        return base_url
    try:
        address = urlsplit(base_url)
    except ValueError:  # no address; whoever uses it will say so
        return None
    return urlunsplit((address.scheme, address.netloc.rpartition("@")[2], address.path, "", ""))
