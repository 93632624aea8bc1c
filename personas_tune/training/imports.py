"""Which PEFT folders become the adapters of an imported set."""

from collections.abc import Mapping
from pathlib import Path

from personas_tune.adapters.peft_files import PEFT_CONFIG, PEFT_WEIGHTS
from personas_tune.errors import MissingInputError, raise_together
from personas_tune.training.sets import ALL_USERS


def peft_folders(path: Path, assignment: Mapping[str, str], where: str) -> dict[str, Path]:
    """The PEFT folder of each adapter of a set, by the adapter's name.

    Args:
        path: The one folder of a set for all users; of a set with an adapter per persona, the folder that holds
            theirs, called ``0``, ``1``, ... as an export writes them.
        assignment: The adapter of every user.
        where: What messages name.

    Raises:
        MissingInputError: If a folder isn't there.
        SeveralErrors: If several aren't.
    """
    names = sorted(set(assignment.values()))
    folders = {name: path if name == ALL_USERS else path / name for name in names}
    raise_together(
        [
            MissingInputError("PEFT folder not found", where=f"{where} ({folder})", remedy=_remedy(path, name, names))
            for name, folder in folders.items()
            if not folder.is_dir()
        ]
    )
    return folders


def _remedy(path: Path, name: str, names: list[str]) -> str:
    if name == ALL_USERS:
        return "set it to a folder with adapter_config.json"
    if (path / PEFT_CONFIG).is_file():
        return (
            f"with per: persona it holds a PEFT folder per persona ({', '.join(names)}); set per: all for one adapter"
        )
    return f"it should hold a PEFT folder for each of the personas {', '.join(names)}"


def peft_inputs(folders: Mapping[str, Path]) -> list[Path]:
    """The files that are read of PEFT folders."""
    return [folder / file for folder in folders.values() for file in (PEFT_CONFIG, PEFT_WEIGHTS)]
