"""Adapters on disk: a native file that loads back bit for bit, and a PEFT folder where one is possible.

Phi-3's Hugging Face layout fuses q, k and v (and gate and up) into one projection, so an adapter
on some of them is written as one adapter of the fused projection: the A matrices stacked, the B
matrices block-diagonal, zero rows for what isn't adapted. With m parts of rank r that is an adapter
of rank m r; alpha grows with it, so the scale alpha / r is unchanged and the product B A is exact.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchtune.modules import FeedForward, MultiHeadAttention
from torchtune.modules.peft import DoRALinear, LoRALinear

from personas_tune.errors import CheckpointError, MissingInputError

NATIVE_FILE = "adapter.safetensors"
PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"

# torchtune's module -> (Hugging Face's module, place within the fused projection)
_PHI3_ATTENTION = {"q_proj": 0, "k_proj": 1, "v_proj": 2}
_PHI3_MLP = {"w1": 0, "w3": 1}
_PHI3_PLAIN = {"attn.output_proj": "self_attn.o_proj", "mlp.w2": "mlp.down_proj"}
_LAYER = re.compile(r"layers\.(\d+)\.(attn|mlp)\.(\w+)\.lora_([ab])\.weight")


@dataclass(frozen=True)
class LoraShape:
    """What of the model's config an adapter's PEFT form depends on.

    Args:
        rank: LoRA rank of each torchtune module.
        alpha: LoRA alpha of each torchtune module.
        dropout: LoRA dropout in training.
        q_dim: Output size of the query projection.
        kv_dim: Output size of the key and of the value projection.
        intermediate_dim: Output size of the gate and of the up projection.
    """

    rank: int
    alpha: float
    dropout: float
    q_dim: int
    kv_dim: int
    intermediate_dim: int


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
    file = folder / NATIVE_FILE
    if not file.is_file():
        raise MissingInputError(
            "adapter not found", where=str(file), remedy="run `tune run persona_lora --config ...` first"
        )
    try:
        return dict(load_file(file))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"adapter can't be read ({' '.join(str(error).split())})", where=str(file), remedy="train it again"
        ) from error


def save_adapter(
    folder: Path, weights: Mapping[str, Tensor], shape: LoraShape, *, model_type: str, base_model: str
) -> list[str]:
    """Write an adapter's native file and, where there is an exact one, its PEFT form.

    Args:
        folder: Where to.
        weights: fp32, by torchtune parameter name.
        shape: From :func:`lora_shape`.
        model_type: The checkpointer's; ``PHI3_MINI`` has a PEFT form.
        base_model: Goes into ``adapter_config.json``.

    Returns:
        Names of the files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_native(folder / NATIVE_FILE, weights, {"rank": shape.rank, "alpha": shape.alpha})
    if not exports_to_peft(weights, model_type):
        return [NATIVE_FILE]
    save_peft(folder, phi3_peft_weights(weights, shape), phi3_peft_config(weights, shape, base_model))
    return [NATIVE_FILE, PEFT_WEIGHTS, PEFT_CONFIG]


def lora_shape(model: nn.Module) -> LoraShape:
    """Read an adapter's rank, alpha and dropout and the base's sizes off a torchtune model."""
    lora = next(module for module in model.modules() if isinstance(module, LoRALinear | DoRALinear))
    rank = int(lora.lora_a.out_features)
    attention = next(module for module in model.modules() if isinstance(module, MultiHeadAttention))
    feed_forward = next(module for module in model.modules() if isinstance(module, FeedForward))
    return LoraShape(
        rank=rank,
        alpha=lora.scaling * rank if isinstance(lora, DoRALinear) else lora.alpha,  # a whole number stays one
        dropout=float(getattr(lora.dropout, "p", 0.0)),
        q_dim=attention.num_heads * attention.head_dim,
        kv_dim=attention.num_kv_heads * attention.head_dim,
        intermediate_dim=_out_features(feed_forward.w1),
    )


def _out_features(linear: nn.Module) -> int:
    found: Any = getattr(linear, "out_features", None) or linear.out_dim  # nn.Linear's name, LoRALinear's name
    return int(found)


def phi3_peft_weights(weights: Mapping[str, Tensor], shape: LoraShape) -> dict[str, Tensor]:
    """An adapter's weights in PEFT's form for Hugging Face's Phi-3, exactly.

    Args:
        weights: By torchtune name, LoRA (not DoRA).
        shape: Sizes of the fused projections.

    Returns:
        ``base_model.model....lora_A.weight`` of shape ``(rank', in)`` and ``lora_B`` of ``(out, rank')``.
    """
    grouped: dict[str, dict[int, dict[str, Tensor]]] = {}
    converted: dict[str, Tensor] = {}
    for name, weight in weights.items():
        module, part, letter = _phi3_module(name)
        if part is None:
            converted[f"base_model.model.{module}.lora_{letter.upper()}.weight"] = weight
        else:
            grouped.setdefault(module, {}).setdefault(part, {})[letter] = weight
    for module, parts in grouped.items():
        sizes = _fused_sizes(module, shape)
        converted[f"base_model.model.{module}.lora_A.weight"] = torch.cat([parts[p]["a"] for p in sorted(parts)])
        converted[f"base_model.model.{module}.lora_B.weight"] = _stacked_b(parts, sizes)
    return {name: weight.contiguous() for name, weight in converted.items()}


def phi3_peft_config(weights: Mapping[str, Tensor], shape: LoraShape, base_model: str) -> dict[str, Any]:
    """``adapter_config.json`` for :func:`phi3_peft_weights`.

    Fused modules have m times the rank of plain ones; ranks and alphas that differ from the most
    common go into ``rank_pattern`` and ``alpha_pattern``.
    """
    n_parts: dict[str, set[int]] = {}
    for name in weights:
        module, part, _ = _phi3_module(name)
        n_parts.setdefault(module.rpartition(".")[2], set()).add(-1 if part is None else part)
    factors = {module: len(parts) for module, parts in sorted(n_parts.items())}
    common = max(factors.values(), key=list(factors.values()).count)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": shape.rank * common,
        "lora_alpha": shape.alpha * common,
        "lora_dropout": shape.dropout,
        "target_modules": list(factors),
        "rank_pattern": {module: shape.rank * factor for module, factor in factors.items() if factor != common},
        "alpha_pattern": {module: shape.alpha * factor for module, factor in factors.items() if factor != common},
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }


def save_peft(folder: Path, weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write a PEFT folder's two files."""
    save_file(dict(weights), folder / PEFT_WEIGHTS, metadata={"format": "pt"})
    (folder / PEFT_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def exports_to_peft(weights: Mapping[str, Tensor], model_type: str) -> bool:
    """Whether an adapter has an exact PEFT form here: LoRA without DoRA magnitudes, on Phi-3."""
    return model_type == "PHI3_MINI" and not any("magnitude" in name for name in weights)


def _phi3_module(name: str) -> tuple[str, int | None, str]:
    """(Hugging Face module, place within a fused projection or None, "a" or "b")."""
    match = _LAYER.fullmatch(name)
    if match is None:  # the output layer
        return "lm_head", None, name.split(".")[-2][-1]
    layer, block, module, letter = match.groups()
    prefix = f"model.layers.{layer}"
    if block == "attn" and module in _PHI3_ATTENTION:
        return f"{prefix}.self_attn.qkv_proj", _PHI3_ATTENTION[module], letter
    if block == "mlp" and module in _PHI3_MLP:
        return f"{prefix}.mlp.gate_up_proj", _PHI3_MLP[module], letter
    return f"{prefix}.{_PHI3_PLAIN[f'{block}.{module}']}", None, letter


def _fused_sizes(module: str, shape: LoraShape) -> list[int]:
    if module.endswith("qkv_proj"):
        return [shape.q_dim, shape.kv_dim, shape.kv_dim]
    return [shape.intermediate_dim, shape.intermediate_dim]


def _stacked_b(parts: Mapping[int, Mapping[str, Tensor]], sizes: list[int]) -> Tensor:
    """B matrices of the parts, block-diagonal over the fused output rows."""
    ranks = [parts[part]["b"].shape[1] for part in sorted(parts)]
    stacked = torch.zeros(sum(sizes), sum(ranks), dtype=next(iter(parts.values()))["b"].dtype)
    column = 0
    for part, rank in zip(sorted(parts), ranks, strict=True):
        row = sum(sizes[:part])
        stacked[row : row + sizes[part], column : column + rank] = parts[part]["b"]
        column += rank
    return stacked
