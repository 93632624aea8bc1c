"""An adapter merged into its base: a whole Hugging Face checkpoint, file by file as the base was.

LoRA adds ``s B A`` to a weight ``W``, with ``s = alpha / r`` (Hu et al., LoRA, section 4.1). DoRA rescales the rows of
the sum to the magnitudes it has learnt: ``W' = m (W + s B A) / ||W + s B A||`` (Liu et al., DoRA, equation 5). Both are
computed in fp32 and rounded once, to the dtype that is written. torchtune's DoRA rescales a module's bias like its
rows. One weight file is in memory at a time.

Shapes: out x in for a weight, R x in for A, out x R for B, out for magnitudes.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from personas_tune.adapters.base_weights import missing_weight, open_shard, weight_reader
from personas_tune.adapters.checkpoint_headers import INDEX, read_object
from personas_tune.adapters.peft_config import scale_of
from personas_tune.adapters.peft_form import BaseWeight, PeftAdapter, hf_modules, row_norms
from personas_tune.errors import CheckpointError

# What of a base's folder belongs to a merged checkpoint beside the weights: what transformers and tokenizers read, code
# that a config may name, and terms. Whatever else lies there stays there.
_COPIED = (
    "config.json", "generation_config.json", "configuration_*.py", "modeling_*.py", "tokenization_*.py",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "special_tokens.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model",
    "chat_template.json", "chat_template.jinja", "additional_chat_templates/*.jinja",
    "LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*",
)  # fmt: skip


@dataclass(frozen=True)
class Change:
    """What an adapter does to one weight; ``magnitude`` with DoRA only."""

    scale: float
    a: Tensor
    b: Tensor
    magnitude: Tensor | None

    def applied_to(self, weight: Tensor) -> Tensor:
        """The merged weight, fp32."""
        merged = self._added_to(weight)
        return merged if self.magnitude is None else merged * self._factors(merged).unsqueeze(1)

    def applied_to_bias(self, bias: Tensor, weight: Tensor) -> Tensor:
        """The merged bias of the module that has this weight in the base, fp32."""
        return bias.float() if self.magnitude is None else bias.float() * self._factors(self._added_to(weight))

    def _added_to(self, weight: Tensor) -> Tensor:
        return weight.float() + self.scale * (self.b.float() @ self.a.float())

    def _factors(self, merged: Tensor) -> Tensor:
        assert self.magnitude is not None
        return self.magnitude.float() / row_norms(merged)


def changes_of(peft: PeftAdapter) -> dict[str, Change]:
    """What an adapter changes, by Hugging Face's name of the weight."""
    changes = {}
    for module, names in hf_modules(peft.weights).items():
        a, b = (peft.weights[names[ending]] for ending in ("lora_A.weight", "lora_B.weight"))
        magnitude = peft.weights[names["lora_magnitude_vector"]] if "lora_magnitude_vector" in names else None
        changes[f"{module}.weight"] = Change(scale_of(module, a.shape[0], peft.config), a, b, magnitude)
    return changes


def merge_checkpoint(
    folder: Path, base_files: Sequence[Path], peft: PeftAdapter, *, dtype: torch.dtype | None, is_tied: bool
) -> list[str]:
    """Write a base with an adapter merged into it; the base's own files are only read.

    Args:
        folder: Where to; it should be empty.
        base_files: The base's weight files, all in one folder with its ``config.json``.
        peft: The adapter, in PEFT's form for that base.
        dtype: Of every floating-point tensor; each one's own if None.
        is_tied: Whether the output layer is the embedding's, so that no ``lm_head`` belongs in it.

    Returns:
        Names of the files written.

    Raises:
        CheckpointError: If the base is damaged or isn't the adapter's, or a value doesn't fit ``dtype``.
    """
    changes = changes_of(peft)
    _require_fitting(changes, base_files)
    places: dict[str, str] = {}
    size = 0
    for path in base_files:
        tensors = _merged_shard(path, changes, weight_reader(base_files), dtype, is_tied)
        if not tensors:  # it held nothing but a tied output layer
            continue
        target = _target_name(path.name)
        save_file(tensors, folder / target, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, target)
        size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        del tensors  # before the next file is read
    written = [*dict.fromkeys(places.values()), *_copy(copied_files(base_files[0].parent), folder, dtype)]
    if len(base_files) > 1 or _old_index(base_files[0].parent) is not None:
        _write_index(base_files[0].parent, folder, places, size)
        written.append(INDEX)
    return written


def _require_fitting(changes: Mapping[str, Change], base_files: Sequence[Path]) -> None:
    here = {name: shape for path in base_files for name, shape in open_shard(path).shapes.items()}
    for name, change in changes.items():
        if name not in here:
            raise missing_weight(name, base_files)
        adapted = (change.b.shape[0], change.a.shape[1])
        if here[name] != adapted:
            raise CheckpointError(
                f"the base's weight is {' x '.join(map(str, here[name]))}, the adapter's {adapted[0]} x {adapted[1]}",
                where=name,
                remedy="export with the base that the adapter was trained on",
            )


def _merged_shard(
    path: Path, changes: Mapping[str, Change], read: BaseWeight, dtype: torch.dtype | None, is_tied: bool
) -> dict[str, Tensor]:
    shard = open_shard(path)
    names = [name for name in shard.shapes if not (is_tied and name == "lm_head.weight")]
    return {name: _merged(name, shard.read(name), changes, read, dtype) for name in names}


def _merged(
    name: str, own: Tensor, changes: Mapping[str, Change], read: BaseWeight, dtype: torch.dtype | None
) -> Tensor:
    """A weight or bias of the base with what the adapter does to it: a copy, in the dtype that is written."""
    weight = f"{name.removesuffix('.bias')}.weight"
    merged = own
    if name in changes:
        merged = changes[name].applied_to(own)
    elif weight in changes:
        merged = changes[weight].applied_to_bias(own, read(weight))
    return _rounded(name, merged, dtype if dtype is not None and own.is_floating_point() else own.dtype)


def _rounded(name: str, merged: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = merged.to(dtype, copy=True).contiguous()
    if dtype.is_floating_point and not torch.isfinite(rounded).all():
        raise CheckpointError(
            f"values that {str(dtype).removeprefix('torch.')} can't hold",
            where=name,
            remedy="set export.dtype=bf16, or fp32",
        )
    return rounded


def _target_name(name: str) -> str:
    """A weight file's name as safetensors: of pytorch_model-1-of-2.bin, model-1-of-2.safetensors."""
    if name.endswith(".safetensors"):
        return name
    return name.removesuffix(".bin").replace("pytorch_model", "model") + ".safetensors"


def copied_files(base: Path) -> dict[str, Path]:
    """What of a base's folder goes into a merged checkpoint as it is, by name: config, tokenizer, licence, ..."""
    files = {path for pattern in _COPIED for path in base.glob(pattern) if path.is_file()}
    return {str(path.relative_to(base)): path for path in sorted(files)}


def _copy(files: Mapping[str, Path], folder: Path, dtype: torch.dtype | None) -> list[str]:
    """Copy files by name; ``config.json`` names the dtype that was chosen."""
    for name, path in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
    if dtype is not None:
        _name_dtype(folder / "config.json", str(dtype).removeprefix("torch."))
    return list(files)


def _name_dtype(config_file: Path, dtype: str) -> None:
    config = read_object(config_file)
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    config_file.write_text(json.dumps({**config, **dict.fromkeys(keys, dtype)}, indent=2) + "\n", encoding="utf-8")


def _old_index(base: Path) -> dict[str, Any] | None:
    """The base's own index, of safetensors or of ``.bin`` files; None if it has none."""
    for name in (INDEX, "pytorch_model.bin.index.json"):
        if (base / name).is_file():
            return read_object(base / name)
    return None


def _write_index(base: Path, folder: Path, places: Mapping[str, str], size: int) -> None:
    metadata = (_old_index(base) or {}).get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    index = {"metadata": {**metadata, "total_size": size}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
