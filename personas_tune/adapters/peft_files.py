"""PEFT folders on disk: ``adapter_model.safetensors`` and ``adapter_config.json``.

What is read may come from anywhere: nothing in it is run, and whatever is wrong with it is told in one line.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from personas_tune.adapters.checkpoint_headers import reason_of
from personas_tune.adapters.peft_form import PeftAdapter, hf_modules
from personas_tune.errors import CheckpointError, MissingInputError
from personas_tune.workspace import to_json

PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")  # of a base's weight files
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
_LARGEST_CONFIG = 1 << 20  # bytes
_LARGEST_HEADER = 1 << 23  # bytes; an adapter of a base of 126 layers has a third of a megabyte
_MOST_WEIGHTS = 10_000
_DTYPES = ("F64", "F32", "F16", "BF16")


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

    Names, types and shapes are looked at in the weights' header first. The weights themselves are mapped from the
    file: until somebody uses them they take no memory, however large the file says that they are.

    Raises:
        MissingInputError: If one of its files isn't there.
        CheckpointError: If one can't be read, is damaged or a pickle, or holds weights of a kind that no adapter has.
        AdapterError: If a weight is none of A, B and magnitude.
    """
    try:
        if not folder.is_dir():
            raise MissingInputError("PEFT folder not found", where=str(folder), remedy="check the path")
        config = _read_config(folder / PEFT_CONFIG)
        weights, about = _read_weights(folder)
    except OSError as error:
        raise CheckpointError(
            f"can't be read ({error.strerror or reason_of(error)})",
            where=str(error.filename or folder),
            remedy="check the path and its permissions",
        ) from error
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
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"not a PEFT config ({reason_of(error)})", where=str(file), remedy=remedy) from error
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
    _require_short_header(file)
    try:
        with safe_open(file, framework="pt") as stream:
            names = sorted(stream.keys())
            _require_weights_of_adapters({name: stream.get_slice(name) for name in names}, file)
            return {name: stream.get_tensor(name) for name in names}, _about(stream.metadata() or {})
    except (SafetensorError, ValueError, RuntimeError, OverflowError, MemoryError) as error:
        raise _unsound(file, reason_of(error)) from error


def _require_short_header(file: Path) -> None:
    """Refuse what is no safetensors file, or has a longer header than any adapter, by its first eight bytes."""
    with file.open("rb") as stream:
        start = stream.read(8)
    length = int.from_bytes(start, "little")
    if length > _LARGEST_HEADER:
        is_pickle = start.startswith((b"PK\x03\x04", b"\x80"))
        raise _unsound(file, "a pickle, which isn't read" if is_pickle else f"a header of {length} bytes")


def _require_weights_of_adapters(slices: Mapping[str, Any], file: Path) -> None:
    """Refuse names, types and shapes that no adapter's weights have; ``slices`` are the library's, by name."""
    if len(slices) > _MOST_WEIGHTS:
        raise _unsound(file, f"{len(slices)} weights; an adapter has at most {_MOST_WEIGHTS}")
    hf_modules(slices, str(file))
    for name, each in slices.items():
        dtype, n_dims = each.get_dtype(), len(each.get_shape())
        if dtype not in _DTYPES or n_dims > 2:
            raise CheckpointError(
                f"weight {name[:100]!r} has {n_dims} dimensions and is of type {dtype}",
                where=str(file),
                remedy=f"save the adapter as matrices of type {', '.join(_DTYPES)}",
            )


def _unsound(file: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"not a sound safetensors file ({reason})", where=str(file), remedy="take a sound copy of the adapter"
    )


def _about(metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        about = json.loads(metadata.get("about", "{}"))
    except (ValueError, RecursionError):  # somebody else's
        return {}
    return about if isinstance(about, dict) else {}
