"""How a Hugging Face architecture holds what torchtune's modules are.

torchtune splits what some architectures fuse (Phi-3's ``qkv_proj`` and ``gate_up_proj``), and its rotary embedding
pairs neighbouring rows of q and k where that of others pairs rows half a head apart: their rows have another order.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from personas_tune.errors import CheckpointError, ConfigError

# A checkpointer's model_type -> family.
FAMILIES = {
    "PHI3_MINI": "phi3", "PHI4": "phi3", "LLAMA2": "llama", "LLAMA3": "llama", "LLAMA3_2": "llama", "QWEN2": "qwen2",
    "MISTRAL": "mistral", "GEMMA": "gemma",
}  # fmt: skip

# torchtune's module -> Hugging Face's, within a layer
_UNFUSED = {
    "attn.q_proj": "self_attn.q_proj", "attn.k_proj": "self_attn.k_proj", "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj", "mlp.w3": "mlp.up_proj", "mlp.w2": "mlp.down_proj",
}  # fmt: skip
_FUSED = {
    "self_attn.qkv_proj": ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.w1", "mlp.w3"),
}
_OUTPUT = ("output", "lm_head")


@dataclass(frozen=True)
class Layout:
    """Sizes of a Hugging Face checkpoint, and how its modules relate to torchtune's.

    Args:
        family: ``phi3``, ``llama``, ``qwen2``, ``mistral`` or ``gemma``.
        n_layers: Number of layers.
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        head_dim: Rows of one head.
        embed_dim: Width of the model.
        intermediate_dim: Width of the feed-forward part.
        vocab_size: Rows of the output layer.
        fused: Whether q, k and v are one ``qkv_proj``, gate and up one ``gate_up_proj``.
        interleaved: Whether rows of q and k have another order than torchtune's.
        tied: Whether the output layer is the embedding's.
        biased: Whether q, k and v have biases.
    """

    family: str
    n_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    embed_dim: int
    intermediate_dim: int
    vocab_size: int
    fused: bool
    interleaved: bool
    tied: bool
    biased: bool = False


@dataclass(frozen=True)
class Place:
    """Where the output rows of a torchtune module lie: ``rows`` rows of ``module`` from ``start`` on.

    ``heads`` counts the heads whose rows have another order than torchtune's; 0 if the order is the same.
    """

    module: str
    start: int
    rows: int
    heads: int


def has_layout(model_type: str) -> bool:
    """Whether adapters of a checkpointer's ``model_type`` have a PEFT form."""
    return model_type in FAMILIES


def read_layout(model_type: str, checkpoint_dir: Path) -> Layout:
    """Read a checkpoint's layout off its ``config.json``.

    Raises:
        ConfigError: If the model type has none.
        CheckpointError: If ``config.json`` isn't there, or lacks a size.
    """
    if not has_layout(model_type):
        raise ConfigError(
            f"no PEFT form is known for {model_type!r}",
            where="checkpointer.model_type",
            remedy=f"known are {', '.join(FAMILIES)}",
        )
    file = checkpoint_dir / "config.json"
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
        return _layout(model_type, described)
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(
            f"the model's sizes can't be read ({what})", where=str(file), remedy="take the base's own config.json"
        ) from error


def _layout(model_type: str, described: Mapping[str, Any]) -> Layout:
    family = FAMILIES[model_type]
    heads, width = _size(described, "num_attention_heads"), _size(described, "hidden_size")
    own_head_dim = family in ("gemma", "llama", "mistral") and described.get("head_dim") is not None
    return Layout(
        family=family,
        n_layers=_size(described, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=_size(described, "num_key_value_heads") if "num_key_value_heads" in described else heads,
        head_dim=_size(described, "head_dim") if own_head_dim else width // heads,
        embed_dim=width,
        intermediate_dim=_size(described, "intermediate_size"),
        vocab_size=_size(described, "vocab_size"),
        fused=family == "phi3",
        interleaved=family in ("llama", "mistral", "gemma"),
        biased=family == "qwen2",
        tied=bool(described.get("tie_word_embeddings", family == "gemma")),
    )


def _size(described: Mapping[str, Any], key: str) -> int:
    value = described[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{key} is {value!r}")
    return value


def place_of(module: str, layout: Layout) -> Place:
    """Where the output rows of a torchtune module, such as ``layers.0.attn.q_proj``, lie.

    Raises:
        KeyError: If the layout knows no such module.
    """
    if module == _OUTPUT[0]:
        return Place(_OUTPUT[1], 0, layout.vocab_size, 0)
    layer, _, part = module.removeprefix("layers.").partition(".")
    own, rows = _UNFUSED[part], _rows(part, layout)
    heads = {"attn.q_proj": layout.num_heads, "attn.k_proj": layout.num_kv_heads}.get(part, 0) * layout.interleaved
    if layout.fused:
        for fused, parts in _FUSED.items():
            if part in parts:
                start = sum(_rows(other, layout) for other in parts[: parts.index(part)])
                return Place(f"model.layers.{layer}.{fused}", start, rows, heads)
    return Place(f"model.layers.{layer}.{own}", 0, rows, heads)


def modules_in(module: str, layout: Layout) -> list[str]:
    """torchtune's modules that a Hugging Face module holds, in the order of their rows; none if it is unknown.

    A projection that the architecture fuses is known by its unfused name too: adapters of checkpoints in which it
    had been split are the same.
    """
    if module == _OUTPUT[1]:
        return [_OUTPUT[0]]
    words = module.split(".", 3)
    if len(words) < 4 or words[:2] != ["model", "layers"] or not re.fullmatch("0|[1-9][0-9]{0,5}", words[2]):
        return []
    parts = _FUSED.get(words[3], ()) if layout.fused else ()
    parts = parts or tuple(own for own, other in _UNFUSED.items() if other == words[3])
    return [f"layers.{int(words[2])}.{part}" for part in parts]


def has_bias(module: str, layout: Layout) -> bool:
    """Whether a torchtune module has a bias."""
    return layout.biased and module.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj")


def rows_of(module: str, layout: Layout) -> int:
    """Output rows of a Hugging Face module."""
    return sum(place_of(part, layout).rows for part in modules_in(module, layout))


def columns_of(module: str, layout: Layout) -> int:
    """Input columns of a Hugging Face module."""
    if module.endswith(".o_proj"):
        return layout.num_heads * layout.head_dim
    return layout.intermediate_dim if module.endswith(".down_proj") else layout.embed_dim


def rows_to_hf(rows: Tensor, place: Place) -> Tensor:
    """A torchtune module's rows (of B, of a magnitude, of a weight) in Hugging Face's order, shape unchanged."""
    return rows[_order(place)] if place.heads else rows


def rows_from_hf(rows: Tensor, place: Place) -> Tensor:
    """The other way."""
    return rows[torch.argsort(_order(place))] if place.heads else rows


def _order(place: Place) -> Tensor:
    """Of each row of Hugging Face's, its number in torchtune: first the heads' even rows, then their odd ones."""
    numbers = torch.arange(place.rows).view(place.heads, -1, 2)
    return numbers.transpose(1, 2).reshape(-1)


def _rows(part: str, layout: Layout) -> int:
    kv_rows = layout.num_kv_heads * layout.head_dim
    return {
        "attn.q_proj": layout.num_heads * layout.head_dim, "attn.k_proj": kv_rows, "attn.v_proj": kv_rows,
        "mlp.w1": layout.intermediate_dim, "mlp.w3": layout.intermediate_dim,
    }.get(part, layout.embed_dim)  # fmt: skip
