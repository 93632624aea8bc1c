"""A PEFT folder as one more adapter of a bank."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchtune.modules.peft import get_adapter_params

from personas_tune.adapters.bank import Adapter
from personas_tune.adapters.base_model import BaseModel, build_on_meta
from personas_tune.adapters.files import lora_shape
from personas_tune.adapters.layouts import read_layout
from personas_tune.adapters.peft_files import WEIGHT_SUFFIXES, read_peft
from personas_tune.adapters.peft_form import BaseWeight, PeftAdapter
from personas_tune.adapters.peft_import import from_peft
from personas_tune.errors import AdapterError
from personas_tune.workspace import sha256_of_file


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
        CheckpointError: If a file is damaged, or no safetensors file.
        AdapterError: If the adapter doesn't fit; names the setting that would help, where one would.
        ConfigError: If no PEFT form is known for this kind of base.
    """
    fresh = base.bank.add_new(name, seed)
    try:
        weights = _fit(folder, base.model, fresh.state_dict(), base.model_type, base.checkpoint_dir, base_weight)
    except Exception:
        base.bank.remove(name)
        raise
    base.bank.start_from(name, weights, where=str(folder))
    return fresh


def check_import(
    model: Mapping[str, Any], checkpointer: Mapping[str, Any], folder: Path, base_weight: BaseWeight | None = None
) -> None:
    """Find out whether a PEFT folder can be imported; the base's weights aren't loaded.

    Args:
        model: The base's torchtune builder and its arguments.
        checkpointer: Its checkpointer and its arguments.
        folder: As of :func:`import_peft`, which raises the same.
        base_weight: The same.
    """
    network = build_on_meta(model, "fp32")
    room = {name: torch.zeros(weight.shape) for name, weight in get_adapter_params(network).items()}
    _fit(folder, network, room, str(checkpointer.get("model_type")), Path(checkpointer["checkpoint_dir"]), base_weight)


def _fit(
    folder: Path,
    model: nn.Module,
    fresh: Mapping[str, Tensor],
    model_type: str,
    checkpoint_dir: Path,
    base_weight: BaseWeight | None,
) -> dict[str, Tensor]:
    layout = read_layout(model_type, checkpoint_dir)
    peft = read_peft(folder)
    weights = from_peft(
        peft, layout, fresh=fresh, alpha=lora_shape(model).alpha, where=str(folder), base_weight=base_weight
    )
    _require_same_weights(peft, checkpoint_dir, str(folder))
    return weights


def _require_same_weights(peft: PeftAdapter, checkpoint_dir: Path, where: str) -> None:
    """Refuse our own export on a base of the same shape with other weights."""
    stated = peft.about.get("base_weights")
    if not isinstance(stated, list) or not stated:  # trained elsewhere
        return
    here = [sha256_of_file(file) for file in checkpoint_dir.iterdir() if file.suffix in WEIGHT_SUFFIXES]
    if not all(each in here for each in stated):
        raise AdapterError(
            f"it was trained on a base with other weight files than those in {checkpoint_dir}",
            where=where,
            remedy="import it with its own base; if these hold the same weights, save it with PEFT, which forgets that",
        )
