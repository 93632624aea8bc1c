"""PEFT folders on disk: ``adapter_model.safetensors`` and ``adapter_config.json``.

What is read may come from anywhere: nothing in it is run, and whatever is wrong with it is told in one line.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from personas_tune.adapters.peft_form import PeftAdapter
from personas_tune.errors import CheckpointError, MissingInputError
from personas_tune.workspace import to_json

PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")  # of a base's weight files
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
_LARGEST_CONFIG = 1 << 20  # bytes


def save_peft(folder: Path, peft: PeftAdapter, about: Mapping[str, Any]) -> list[str]:
    """Write a PEFT folder's two files; equal adapters give equal bytes.

    Args:
        folder: Made if it isn't there.
        peft: The adapter, in the dtype that the file is to have.
        about: Where it comes from, as plain JSON values; kept in the weights' file. ``base_weights``, the sorted
            sha256 of the base's weight files, lets an import refuse another base.

    Returns:
        Names of the files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"about": json.dumps(dict(about), sort_keys=True), "format": "pt"}
    weights = {name: weight.contiguous() for name, weight in peft.weights.items()}
    save_file(weights, folder / PEFT_WEIGHTS, metadata=metadata)
    _order_metadata(folder / PEFT_WEIGHTS)
    (folder / PEFT_CONFIG).write_text(to_json(peft.config), encoding="utf-8")
    return [PEFT_WEIGHTS, PEFT_CONFIG]


def _order_metadata(file: Path) -> None:
    """Sort the entries of a safetensors file's metadata, which the library writes in a random order."""
    with file.open("r+b") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:
            stream.seek(8)
            stream.write(text.ljust(length))


def read_peft(folder: Path) -> PeftAdapter:
    """Read a PEFT folder.

    Raises:
        MissingInputError: If one of its files isn't there.
        CheckpointError: If one is damaged, a pickle, or holds what no adapter has.
    """
    if not folder.is_dir():
        raise MissingInputError("PEFT folder not found", where=str(folder), remedy="check the path")
    config = _read_config(folder / PEFT_CONFIG)
    weights, about = _read_weights(folder)
    return PeftAdapter(weights, config, about)


def _read_config(file: Path) -> dict[str, Any]:
    remedy = "save the adapter with PEFT's save_pretrained"
    if not file.is_file():
        raise MissingInputError("file not found", where=str(file), remedy=remedy)
    try:
        if file.stat().st_size > _LARGEST_CONFIG:
            raise ValueError(f"it has {file.stat().st_size} bytes")
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"a {type(config).__name__} in the place of an object")
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise CheckpointError(f"not a PEFT config ({reason})", where=str(file), remedy=remedy) from error
    return config


def _read_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    file = folder / PEFT_WEIGHTS
    if not file.is_file():
        pickle = next((name for name in _PICKLES if (folder / name).exists()), None)
        if pickle is None:
            raise MissingInputError("file not found", where=str(file), remedy="check the path of the PEFT folder")
        raise CheckpointError(
            "a pickle may run code, so it isn't read",
            where=str(folder / pickle),
            remedy="save the adapter with safe_serialization=True, as PEFT does by default",
        )
    try:
        with safe_open(file, framework="pt") as stream:
            weights = {name: stream.get_tensor(name) for name in sorted(stream.keys())}
            about = _about(stream.metadata() or {})
    except (SafetensorError, OSError, ValueError, RuntimeError, OverflowError, MemoryError) as error:
        reason = "a pickle, which isn't read" if _is_pickle(file) else " ".join(str(error).split())
        raise CheckpointError(
            f"not a sound safetensors file ({reason})", where=str(file), remedy="take a sound copy of the adapter"
        ) from error
    broken = next((name for name, weight in weights.items() if not _is_finite(weight)), None)
    if broken is not None:
        raise CheckpointError(
            f"weight {broken[:100]} is not finite", where=str(file), remedy="take a sound copy of the adapter"
        )
    return weights, about


def _is_finite(weight: Tensor) -> bool:
    if not weight.dtype.is_floating_point or weight.dtype.itemsize == 1:  # other types are refused by whoever uses them
        return True
    return bool(torch.isfinite(weight).all())


def _is_pickle(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(4).startswith((b"PK\x03\x04", b"\x80"))


def _about(metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        about = json.loads(metadata.get("about", "{}"))
    except (ValueError, RecursionError):  # somebody else's
        return {}
    return about if isinstance(about, dict) else {}
