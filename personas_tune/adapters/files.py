"""A trained adapter's folder: a native file that loads back bit for bit, and its PEFT form where there is one."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchtune.modules.peft import DoRALinear, LoRALinear

from personas_tune.adapters.layouts import Layout, read_layout
from personas_tune.adapters.peft_files import WEIGHT_SUFFIXES, save_peft
from personas_tune.adapters.peft_form import to_peft, why_no_peft_form
from personas_tune.errors import CheckpointError, ConfigError, MissingInputError
from personas_tune.workspace import Stage, full_disk_in_a_line, sha256_of_file

NATIVE_FILE = "adapter.safetensors"


@dataclass(frozen=True)
class LoraShape:
    """What of the model's config an adapter's PEFT form depends on.

    Args:
        rank: LoRA rank of each torchtune module.
        alpha: LoRA alpha of each torchtune module.
        dropout: LoRA dropout in training.
    """

    rank: int
    alpha: float
    dropout: float


@dataclass(frozen=True)
class BaseRecord:
    """What an adapter's files say of the base that it was trained on.

    Args:
        base_model: Its folder; goes into ``adapter_config.json``.
        base_weights: sha256 of each of its weight files, sorted; an import refuses another base by them.
        layout: Of its checkpoint; None if adapters on it have no PEFT form.
    """

    base_model: str
    base_weights: list[str]
    layout: Layout | None


def record_base(model_type: str, checkpoint_dir: Path, files: Sequence[Path]) -> BaseRecord:
    """Find out what adapters' files say of a base.

    Args:
        model_type: The checkpointer's.
        checkpoint_dir: Its folder.
        files: All files that it is made of.
    """
    try:
        layout = read_layout(model_type, checkpoint_dir)
    except (ConfigError, CheckpointError):  # another family, or another format than Hugging Face's
        layout = None
    hashes = sorted(sha256_of_file(file) for file in files if file.suffix in WEIGHT_SUFFIXES)
    return BaseRecord(str(checkpoint_dir), hashes, layout)


def save_native(path: Path, weights: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write an adapter's fp32 weights under torchtune's parameter names; equal ones give equal bytes.

    ``about`` is one JSON text, since safetensors writes several metadata entries in a random order.
    """
    metadata = {"about": json.dumps(dict(about), sort_keys=True)}
    save_file({name: weight.contiguous() for name, weight in weights.items()}, path, metadata=metadata)


def load_native(folder: Path) -> dict[str, Tensor]:
    """Read an adapter that :func:`save_native` wrote into ``folder``.

    Raises:
        MissingInputError: If it isn't there.
        CheckpointError: If it is damaged.
    """
    file = _native_file(folder)
    try:
        return dict(load_file(file))
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from error


def load_about(folder: Path) -> dict[str, Any]:
    """What an adapter's native file says of it: ``rank``, ``alpha``, ``dropout``, ``base_weights``.

    Files of older versions lack some of them. Raises as :func:`load_native`.
    """
    file = _native_file(folder)
    try:
        with safe_open(file, framework="pt") as stream:
            return dict(json.loads((stream.metadata() or {}).get("about", "{}")))
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise _damaged(file, error) from error


def _native_file(folder: Path) -> Path:
    file = folder / NATIVE_FILE
    if not file.is_file():
        raise MissingInputError(
            "adapter not found", where=str(file), remedy="run `tune run persona_lora --config ...` first"
        )
    return file


def _damaged(file: Path, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split())
    return CheckpointError(f"adapter can't be read ({reason})", where=str(file), remedy="train it again")


def save_adapter(folder: Path, weights: Mapping[str, Tensor], shape: LoraShape, base: BaseRecord) -> list[str]:
    """Write an adapter's native file and, where there is an exact one, its PEFT form.

    Args:
        folder: Where to.
        weights: fp32, by torchtune parameter name.
        shape: From :func:`lora_shape`.
        base: What it was trained on. DoRA on a part of a fused projection takes the base's weights: it is left to the
            export.

    Returns:
        Names of the files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    origin = {"base_weights": base.base_weights}
    about = {"rank": shape.rank, "alpha": shape.alpha, "dropout": shape.dropout}
    save_native(folder / NATIVE_FILE, weights, {**about, **origin})
    if base.layout is None or why_no_peft_form(weights, base.layout):
        return [NATIVE_FILE]
    peft = to_peft(weights, base.layout, alpha=shape.alpha, dropout=shape.dropout, base_model=base.base_model)
    return [NATIVE_FILE, *save_peft(folder, peft, origin)]


def save_in_set(
    stage: Stage,
    name: str,
    weights: Mapping[str, Tensor],
    *,
    shape: LoraShape,
    base: BaseRecord,
    rows: int = 0,
    steps: int = 0,
    validation_losses: Sequence[float] = (),
    **origin: str | None,
) -> None:
    """Write an adapter's folder within its set: the files of :func:`save_adapter`, and ``training.json``.

    Args:
        stage: The set.
        name: The adapter's.
        weights: See :func:`save_adapter`, as ``shape`` and ``base``.
        rows: How many it was trained on; none if it is imported.
        steps: Optimizer steps that it took.
        validation_losses: One per epoch.
        origin: Where an imported one comes from.

    Raises:
        ConfigError: If the disk is full.
    """
    record = {"rows": rows, "steps": steps, "validation_losses": list(validation_losses), **origin}
    with full_disk_in_a_line(stage.folder):
        for file in save_adapter(stage.path(f"{name}/{NATIVE_FILE}").parent, weights, shape, base):
            stage.path(f"{name}/{file}")
        stage.write_json(f"{name}/training.json", record)


def lora_shape(model: nn.Module) -> LoraShape:
    """Read an adapter's rank, alpha and dropout off a torchtune model."""
    lora = next(module for module in model.modules() if isinstance(module, LoRALinear | DoRALinear))
    rank = int(lora.lora_a.out_features)
    return LoraShape(
        rank=rank,
        alpha=lora.scaling * rank if isinstance(lora, DoRALinear) else lora.alpha,  # a whole number stays one
        dropout=float(getattr(lora.dropout, "p", 0.0)),
    )
