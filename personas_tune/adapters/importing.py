"""PEFT folders as adapters of a bank, and as whole sets."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchtune.modules.peft import get_adapter_params

from personas_tune.adapters.bank import Adapter
from personas_tune.adapters.base_model import BaseModel, build_on_meta, checkpoint_inputs
from personas_tune.adapters.base_weights import weight_files, weight_reader
from personas_tune.adapters.files import lora_shape
from personas_tune.adapters.layouts import read_layout
from personas_tune.adapters.peft_files import PEFT_CONFIG, PEFT_WEIGHTS, WEIGHT_SUFFIXES, read_peft
from personas_tune.adapters.peft_form import BaseWeight, PeftAdapter
from personas_tune.adapters.peft_import import from_peft
from personas_tune.errors import AdapterError, CheckpointError, MissingInputError, PersonasTuneError
from personas_tune.workspace import absolute_path, sha256_of_file

_LONGEST_NAME = 200


def peft_folders(path: str, names: Iterable[str], per: str) -> dict[str, Path]:
    """The PEFT folder of each adapter of a set, by the adapter's name.

    Args:
        path: As in a config: the one folder of a set for all users; of a set with an adapter per persona, the folder
            that holds theirs, called ``0``, ``1``, ... as an export writes them.
        names: Of the adapters.
        per: ``persona`` or ``all``.

    Raises:
        ConfigError: If the path is in the home of a user that there is not.
    """
    root = absolute_path(path)
    return {name: root if per == "all" else root / name for name in sorted(set(names))}


def peft_inputs(folders: Mapping[str, Path]) -> list[Path]:
    """The files that are read of PEFT folders."""
    return [folder / file for folder in folders.values() for file in (PEFT_CONFIG, PEFT_WEIGHTS)]


def check_imports(
    path: str,
    names: Iterable[str],
    per: str,
    *,
    model: Mapping[str, Any],
    tokenizer: Mapping[str, Any],
    checkpointer: Mapping[str, Any],
    where: str,
) -> list[PersonasTuneError]:
    """Find out whether the adapters of a set can be imported; the base's weights aren't loaded.

    Args:
        path: See :func:`peft_folders`, as ``names`` and ``per``.
        model: The base's torchtune builder and its arguments.
        tokenizer: Its tokenizer and its arguments.
        checkpointer: Its checkpointer and its arguments.
        where: The config's key, for errors.

    Returns:
        Why they can't: the mistakes of all folders, each once. Empty if they can.
    """
    try:
        folders = peft_folders(path, names, per)
        read = weight_reader(weight_files(checkpoint_inputs(model, tokenizer, checkpointer)))
        network = build_on_meta(model, "fp32")
    except PersonasTuneError as error:
        return [error]
    room = {name: torch.zeros(weight.shape) for name, weight in get_adapter_params(network).items()}
    base = (str(checkpointer.get("model_type")), Path(checkpointer["checkpoint_dir"]))
    problems: dict[str, PersonasTuneError] = {}  # what is wrong with the base is found with every folder
    for folder in folders.values():
        try:
            _require_folder(folder, list(folders), per, where)
            _fit(read_peft(folder), str(folder), network, room, *base, read)
        except PersonasTuneError as error:
            problems[str(error)] = error
    return list(problems.values())


def import_set(
    base: BaseModel,
    set_name: str,
    folders: Mapping[str, Path],
    save: Callable[..., None],
    *,
    seed: int,
    base_weight: BaseWeight,
) -> list[str]:
    """Import the adapters of a set one after the other; the bank is left as it was.

    Args:
        base: See :func:`import_peft`, as ``seed`` and ``base_weight``.
        set_name: Goes before their names in the bank.
        folders: From :func:`peft_folders`.
        save: Called with an adapter's name and weights, and by keyword ``imported_from`` (its folder) and
            ``trained_on`` (what its config calls the base; None if it doesn't).

    Returns:
        Names of other bases than this one that they were trained on, each once; see :func:`other_base`.
    """
    others: list[str | None] = []
    for adapter, folder in folders.items():
        name, peft = f"{set_name}/{adapter}", read_peft(folder)
        weights = _add(base, name, peft, str(folder), seed, base_weight).state_dict()
        save(adapter, weights, imported_from=str(folder), trained_on=_stated_base(peft))
        base.bank.remove(name)
        others.append(other_base(peft, base.checkpoint_dir))
    return [name for name in dict.fromkeys(others) if name is not None]


def import_peft(
    base: BaseModel, name: str, folder: Path, *, seed: int = 0, base_weight: BaseWeight | None = None
) -> Adapter:
    """Add an adapter in PEFT's form, ours or one trained elsewhere, to a base's bank: exactly, or not at all.

    Args:
        base: What it is to be used on; its model has room for the adapter's modules and rank.
        name: Its name in the bank.
        folder: With ``adapter_config.json`` and ``adapter_model.safetensors``.
        seed: Of what the file leaves open: modules and ranks that it lacks begin as fresh ones, and change nothing.
        base_weight: See :func:`personas_tune.adapters.peft_import.from_peft`.

    Raises:
        MissingInputError: If the folder or one of its files isn't there.
        CheckpointError: If a file can't be read, is damaged, or no safetensors file.
        AdapterError: If the adapter doesn't fit; names the setting that would help, where one would.
        ConfigError: If no PEFT form is known for this kind of base.
    """
    return _add(base, name, read_peft(folder), str(folder), seed, base_weight)


def other_base(peft: PeftAdapter, checkpoint_dir: Path) -> str | None:
    """What an adapter's config calls the base that it was trained on, if that isn't the name of the base here.

    Names are compared by their last part: what is ``owner/name`` on the Hub is ``name`` on the disk. Our own exports
    state the bytes of their base, so its name doesn't matter.
    """
    name = _stated_base(peft)
    if name is None or _stated_weights(peft):
        return None
    return None if Path(name).name.lower() == checkpoint_dir.absolute().name.lower() else name


def _add(
    base: BaseModel, name: str, peft: PeftAdapter, where: str, seed: int, base_weight: BaseWeight | None
) -> Adapter:
    fresh = base.bank.add_new(name, seed)
    try:
        weights = _fit(peft, where, base.model, fresh.state_dict(), base.model_type, base.checkpoint_dir, base_weight)
    except Exception:
        base.bank.remove(name)
        raise
    base.bank.start_from(name, weights, where=where)
    return fresh


def _fit(
    peft: PeftAdapter,
    where: str,
    model: nn.Module,
    fresh: Mapping[str, Tensor],
    model_type: str,
    checkpoint_dir: Path,
    base_weight: BaseWeight | None,
) -> dict[str, Tensor]:
    layout = read_layout(model_type, checkpoint_dir)
    weights = from_peft(peft, layout, fresh=fresh, alpha=lora_shape(model).alpha, where=where, base_weight=base_weight)
    _require_same_weights(peft, checkpoint_dir, where)
    return weights


def _require_folder(folder: Path, names: list[str], per: str, where: str) -> None:
    try:
        if folder.is_dir():
            return
        missing, remedy = _lack_of(folder, names, per)
    except OSError as error:  # a path that is too long, or may not be looked into
        raise CheckpointError(
            f"PEFT folder can't be read ({error.strerror})",
            where=str(folder),
            remedy="check the path, and who may read it",
        ) from error
    raise MissingInputError("PEFT folder not found", where=f"{where} ({missing})", remedy=remedy)


def _lack_of(folder: Path, names: list[str], per: str) -> tuple[Path, str]:
    """Which folder to name as missing (once, if those of all personas are), and what would help."""
    root, listed = folder.parent, ", ".join(names)
    if per == "all":
        return folder, "set it to a folder with adapter_config.json"
    if (root / PEFT_CONFIG).is_file():
        return root, f"with per: persona it holds a PEFT folder per persona ({listed}); set per: all for one adapter"
    some = any((root / name).is_dir() for name in names)
    return folder if some else root, f"it should hold a PEFT folder for each of the personas {listed}"


def _require_same_weights(peft: PeftAdapter, checkpoint_dir: Path, where: str) -> None:
    """Refuse our own export on a base of the same shape with other weights."""
    stated = _stated_weights(peft)
    if not stated:  # trained elsewhere
        return
    here = [sha256_of_file(file) for file in checkpoint_dir.iterdir() if file.suffix in WEIGHT_SUFFIXES]
    if not all(each in here for each in stated):
        raise AdapterError(
            f"it was trained on a base with other weight files than those in {checkpoint_dir}",
            where=where,
            remedy="import it with its own base; if these hold the same weights, save it with PEFT, which forgets that",
        )


def _stated_weights(peft: PeftAdapter) -> list[Any]:
    """sha256 of its base's weight files, as our own exports say them; it may be any nonsense."""
    stated = peft.about.get("base_weights")
    return stated if isinstance(stated, list) else []


def _stated_base(peft: PeftAdapter) -> str | None:
    """The base's name as one line: it comes from anywhere."""
    name = peft.config.get("base_model_name_or_path")
    if not isinstance(name, str):
        return None
    return "".join(letter for letter in " ".join(name.split()) if letter.isprintable())[:_LONGEST_NAME] or None
