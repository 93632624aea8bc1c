"""A base's weight files: which tensors they hold, read one at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from personas_tune.errors import CheckpointError

_SUFFIXES = (".safetensors", ".bin")


@dataclass(frozen=True)
class Shard:
    """One weight file, opened: names and shapes of its tensors, and what reads one of them."""

    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]


def open_shard(path: Path) -> Shard:
    """Open a weight file; nothing but its header is read.

    Raises:
        CheckpointError: If it is damaged, or no file of tensors by name.
    """
    try:
        if path.suffix == ".safetensors":
            opened = safe_open(path, framework="pt")
            names = list(opened.keys())  # type: ignore[no-untyped-call]
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in names}  # type: ignore[no-untyped-call]
            return Shard(shapes, opened.get_tensor)
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not all(isinstance(weight, Tensor) for weight in weights.values()):
            raise TypeError("it holds more than tensors")
        return Shard({name: tuple(weight.shape) for name, weight in weights.items()}, weights.__getitem__)
    except Exception as error:  # torch and safetensors raise whatever a damaged file makes them
        raise CheckpointError(
            f"weights can't be read ({' '.join(str(error).split()) or type(error).__name__})",
            where=str(path),
            remedy="download or make the base again",
        ) from error


def weight_files(files: Sequence[Path]) -> list[Path]:
    """Those of a base's files that hold its weights in Hugging Face's form.

    Args:
        files: All that the base is made of.

    Raises:
        CheckpointError: If there are none.
    """
    found = [path for path in files if path.suffix in _SUFFIXES]
    if not found:
        raise CheckpointError(
            "no weights in Hugging Face's form (.safetensors or .bin)",
            where=str(files[0].parent) if files else None,
            remedy="set checkpointer to a FullModelHFCheckpointer of the base",
        )
    return found


def weight_reader(files: Sequence[Path]) -> Callable[[str], Tensor]:
    """What reads one weight by its name, wherever it lies; files are opened when the first weight is asked for.

    The reader raises :class:`CheckpointError` for a name that no file has.
    """
    shards: list[Shard] = []

    def read(name: str) -> Tensor:
        if not shards:
            shards.extend(open_shard(path) for path in files)
        holder = next((shard for shard in shards if name in shard.shapes), None)
        if holder is None:
            raise missing_weight(name, files)
        return holder.read(name)

    return read


def missing_weight(name: str, files: Sequence[Path]) -> CheckpointError:
    """That a base lacks what an adapter changes."""
    return CheckpointError(
        f"the base has no weight {name}, which the adapter changes",
        where=str(files[0].parent),
        remedy="take the base that the adapter was trained on",
    )
