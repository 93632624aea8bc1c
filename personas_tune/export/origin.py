"""Where a base comes from: its name, its licence, whether it is the one that adapters were trained on."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yaml import YAMLError

from personas_tune.adapters.base_model import HUB_NAMES
from personas_tune.errors import AdapterError
from personas_tune.workspace import sha256_of_file

_REPO_ID_FILE = "original_repo_id.json"  # `tune download` leaves it


@dataclass(frozen=True)
class License:
    """A licence as model cards name it; ``link`` and ``title`` where the id is ``other``."""

    id: str
    title: str | None = None
    link: str | None = None


@dataclass(frozen=True)
class Origin:
    """The base of adapters.

    Args:
        name: What cards and adapters call it: never a path of this machine.
        loadable: What servers load it by: its name on the Hub, else its folder.
        folder: Where it lies.
        license: Its own; None if it states none.
        window: Tokens that its ``config.json`` lets a token see back (``sliding_window``); None for all.
    """

    name: str
    loadable: str
    folder: Path
    license: License | None
    window: int | None = None


def find_origin(model: Mapping[str, Any], checkpointer: Mapping[str, Any], given: str | None = None) -> Origin:
    """Read what there is to know of a base off its config sections and its folder; ``given`` is its name."""
    folder = Path(str(checkpointer["checkpoint_dir"])).absolute()
    name = find_base_name(str(model.get("_component_", "")), folder, given)
    return Origin(
        name=name,
        loadable=name if "/" in name else str(folder),
        folder=folder,
        license=find_license(folder),
        window=_find_window(_config(folder)),
    )


def require_same_base(files: Sequence[Path], trained_with: Mapping[str, str], where: str) -> None:
    """Compare a base's files with what adapters were trained on, by their bytes: names don't count.

    Args:
        files: Of the base.
        trained_with: sha256 by path, from the manifest of the adapters.
        where: The adapters, for the error.

    Raises:
        AdapterError: If a file is none of those.
    """
    known = set(trained_with.values())
    for file in files:
        if sha256_of_file(file) not in known:
            raise AdapterError(
                f"trained on another base: its {file.name} was not this one",
                where=where,
                remedy="set checkpointer to the files it was trained on (none has this one's sha256), or train again",
            )


def find_base_name(component: str, checkpoint_dir: Path, given: str | None = None) -> str:
    """What cards and adapters call a base: never a path of this machine.

    The name given, else the one that ``tune download`` noted, else that of the Hub's checkpoint for this model builder
    if the folder is called so, else the folder's own name.

    Args:
        component: The dotted path of the model builder.
        checkpoint_dir: The base's folder.
        given: ``export.base_name``.
    """
    if given is not None:
        return given
    noted = _noted_repository(checkpoint_dir)
    if noted is not None:
        return noted
    builder = component.rpartition(".")[2].removeprefix("qlora_").removeprefix("lora_")
    known = HUB_NAMES.get(builder, "")
    return known if known.rpartition("/")[2] == checkpoint_dir.name else checkpoint_dir.name


def _noted_repository(checkpoint_dir: Path) -> str | None:
    try:
        noted = json.loads((checkpoint_dir / _REPO_ID_FILE).read_text(encoding="utf-8"))["repo_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return noted if isinstance(noted, str) and noted else None


def find_license(checkpoint_dir: Path) -> License | None:
    """The licence that the base's own model card or config states; None if neither does."""
    from huggingface_hub import ModelCard

    try:
        stated = ModelCard.load(checkpoint_dir / "README.md", ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, TypeError, AttributeError, YAMLError):
        stated = {}
    if not isinstance(stated.get("license"), str):
        stated = _config(checkpoint_dir)
    if not isinstance(stated.get("license"), str):
        return None
    more = {key: stated.get(key) for key in ("license_name", "license_link")}
    title, link = (value if isinstance(value, str) else None for value in more.values())
    is_address = link is not None and link.startswith(("https://", "http://"))  # others are files of the base's folder
    return License(stated["license"], title, link if is_address else None)


def _config(checkpoint_dir: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((checkpoint_dir / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _find_window(config: Mapping[str, Any]) -> int | None:
    window = config.get("sliding_window")
    return window if isinstance(window, int) and config.get("use_sliding_window") is not False else None
