"""A tiny base as a Hugging Face checkpoint, which torchtune's checkpointer and transformers read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torchtune.models.convert_weights import tune_to_hf
from torchtune.models.phi3._convert_weights import phi3_tune_to_hf

from personas_tune.training.tiny_base import TinyBaseShape


def save_tiny_base(model: nn.Module, shape: TinyBaseShape, special_ids: Mapping[str, int], folder: Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` (bf16) in Hugging Face's format of the architecture.

    Args:
        model: From :func:`~personas_tune.training.tiny_base.build_tiny_base`.
        shape: What it was built with.
        special_ids: The tokenizer's special tokens by name.
        folder: Where to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.detach() for name, weight in model.state_dict().items()}
    if shape.architecture == "phi3":
        converted, own = phi3_tune_to_hf(weights), _phi3_config(shape, special_ids)
    else:
        converted = tune_to_hf(weights, shape.num_heads, shape.num_kv_heads, shape.embed_dim)
        own = _llama3_config(special_ids)
    stored = {name: weight.to(torch.bfloat16).contiguous() for name, weight in converted.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.dumps({**own, **_common_config(shape)}, indent=2)
    (folder / "config.json").write_text(config + "\n", encoding="utf-8")


def _common_config(shape: TinyBaseShape) -> dict[str, Any]:
    return {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.embed_dim,
        "intermediate_size": shape.intermediate_dim,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "max_position_embeddings": shape.max_seq_len,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def _phi3_config(shape: TinyBaseShape, special_ids: Mapping[str, int]) -> dict[str, Any]:
    return {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "original_max_position_embeddings": shape.max_seq_len,
        "rope_theta": 10000.0,
        "bos_token_id": 1,
        "eos_token_id": special_ids["<|endoftext|>"],
        "pad_token_id": special_ids["<|endoftext|>"],
    }


def _llama3_config(special_ids: Mapping[str, int]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "rope_theta": 500000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": special_ids["<|begin_of_text|>"],
        "eos_token_id": special_ids["<|eot_id|>"],
        "pad_token_id": special_ids["<|finetune_right_pad_id|>"],
    }
