"""What a stage keeps of its embedder: ``embedder.json`` names it, whichever it is."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from personas_tune.embedding.vectors import Space
from personas_tune.errors import DataError, MissingInputError

REMEDY = "remove the folder's manifest.json and run the stage that wrote it again"


@dataclass(frozen=True)
class Description:
    """The content of one ``embedder.json``.

    Args:
        file: Where it lies.
        space: The space of the embedder's vectors.
        content: All that it says.
    """

    file: Path
    space: Space
    content: Mapping[str, Any]

    def text(self, key: str) -> str:
        """What it says under ``key``.

        Raises:
            DataError: If that is missing or no text.
        """
        value = self.content.get(key)
        if not isinstance(value, str):
            raise DataError(f"no {key} in it", where=str(self.file), remedy=REMEDY)
        return value


def read_description(folder: Path) -> Description:
    """Read what a stage keeps of its embedder.

    Raises:
        MissingInputError: If it isn't there.
        DataError: If it is damaged.
    """
    file = folder / "embedder.json"
    try:
        content = json.loads(file.read_bytes())
        return Description(file, Space(**content["space"]), content)
    except FileNotFoundError as error:
        raise MissingInputError("file of the embedder not found", where=str(file), remedy=REMEDY) from error
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"unreadable embedder ({error})", where=str(file), remedy=REMEDY) from error
