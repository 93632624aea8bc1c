"""What stages recorded of how they were made."""

from pathlib import Path
from typing import Any

from personas_tune.errors import DataError
from personas_tune.workspace import STAGE_RECIPES, read_json


def recorded(path: Path, *keys: str) -> dict[str, Any]:
    """A part of a stage's manifest, or another mapping in a JSON file of its.

    Args:
        path: The file.
        keys: The way down to the part.

    Raises:
        MissingInputError: If the file isn't there.
        DataError: If it is damaged, or has no such part.
    """
    found = read_json(path)
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    if not isinstance(found, dict):
        recipe = next(STAGE_RECIPES[folder.name] for folder in path.parents if folder.name in STAGE_RECIPES)
        remedy = f"run `tune run {recipe} --config ...` again"
        raise DataError(f"no {'.'.join(keys) or 'record'} in it", where=str(path), remedy=remedy)
    return found
