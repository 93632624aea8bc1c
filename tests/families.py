"""Tiny random checkpoints of every model family, as `transformers` saves them, and how torchtune builds the same."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

VOCAB, LAYERS, HEADS, KV_HEADS, DIM, HIDDEN, LENGTH = 96, 2, 4, 2, 32, 48, 64
SIZES = {
    "vocab_size": VOCAB, "num_layers": LAYERS, "num_heads": HEADS, "num_kv_heads": KV_HEADS, "embed_dim": DIM,
    "intermediate_dim": HIDDEN, "max_seq_len": LENGTH,
}  # fmt: skip
HF_SIZES = {
    "vocab_size": VOCAB, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
    "hidden_size": DIM, "intermediate_size": HIDDEN, "max_position_embeddings": LENGTH,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LLAMA3_SCALING = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192, "rope_theta": 500000.0,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """One model family at tiny sizes.

    Args:
        hf_class: Its class in transformers.
        hf_config: Arguments of that class's config, beside the sizes.
        builder: torchtune's LoRA builder.
        sizes: Arguments of the builder, beside the common sizes.
        model_type: The checkpointer's.
        is_tied: Whether the output layer is the embedding's; then it takes no LoRA.
        fused: Whether Hugging Face fuses q, k and v, and gate and up.
    """

    hf_class: str
    hf_config: dict[str, Any]
    builder: str
    model_type: str
    sizes: dict[str, Any] = field(default_factory=dict)
    is_tied: bool = False
    fused: bool = False


FAMILIES = {
    "phi3": Family(
        "Phi3ForCausalLM", {"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "original_max_position_embeddings": LENGTH},
        "torchtune.models.phi3.lora_phi3", "PHI3_MINI", fused=True,
    ),
    "phi3_mha": Family(
        "Phi3ForCausalLM",
        {"rms_norm_eps": 1e-5, "original_max_position_embeddings": LENGTH, "num_key_value_heads": HEADS},
        "torchtune.models.phi3.lora_phi3", "PHI3_MINI", {"num_kv_heads": HEADS}, fused=True,
    ),
    "llama3": Family(
        "LlamaForCausalLM", {"rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        "torchtune.models.llama3.lora_llama3", "LLAMA3",
    ),
    "llama3_2": Family(
        "LlamaForCausalLM",
        {"rms_norm_eps": 1e-5, "rope_parameters": LLAMA3_SCALING, "tie_word_embeddings": True,
         "max_position_embeddings": 131072},
        "torchtune.models.llama3_2.lora_llama3_2", "LLAMA3_2", is_tied=True,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        {"rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
         "tie_word_embeddings": True},
        "torchtune.models.qwen2.lora_qwen2", "QWEN2",
        {"tie_word_embeddings": True, "norm_eps": 1e-6, "rope_base": 1000000.0}, is_tied=True,
    ),
    "qwen2_untied": Family(
        "Qwen2ForCausalLM",
        {"rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
        "torchtune.models.qwen2.lora_qwen2", "QWEN2", {"norm_eps": 1e-6, "rope_base": 1000000.0},
    ),
    "mistral": Family(
        "MistralForCausalLM",
        {"rms_norm_eps": 1e-5, "sliding_window": None,
         "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        "torchtune.models.mistral.lora_mistral", "MISTRAL",
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        {"rms_norm_eps": 1e-6, "head_dim": 16, "tie_word_embeddings": True,
         "hidden_activation": "gelu_pytorch_tanh"},
        "torchtune.models.gemma.lora_gemma", "GEMMA", {"head_dim": 16, "norm_eps": 1e-6}, is_tied=True,
    ),
}  # fmt: skip

# Every kind of target set: the paper's, each projection in a fused group, all of them.
TARGETS: dict[str, dict[str, Any]] = {
    "q_k": {"lora_attn_modules": ["q_proj", "k_proj"]},
    "v": {"lora_attn_modules": ["v_proj"]},
    "k_o": {"lora_attn_modules": ["k_proj", "output_proj"]},
    "attention": {"lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"]},
    "all": {"lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"], "apply_lora_to_mlp": True},
    "all_and_output": {
        "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
        "apply_lora_to_mlp": True, "apply_lora_to_output": True,
    },
}  # fmt: skip


def write_checkpoint(name: str, folder: Path, *, seed: int = 0, shard_size: str = "5GB", **hf: Any) -> Path:
    """A random fp32 checkpoint of a family, saved by transformers; weights large enough that logits differ.

    Args:
        name: Of :data:`FAMILIES`.
        folder: Where to.
        seed: Of its weights.
        shard_size: Of a shard, such as ``20KB``, to get several.
        hf: More of its config.
    """
    import transformers

    family = FAMILIES[name]
    model_class = getattr(transformers, family.hf_class)
    config = model_class.config_class(**{**HF_SIZES, **family.hf_config, **hf})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config)
        for weight in model.parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=0.2)
            else:  # norms' scales and biases: not all alike
                weight.data.add_(torch.randn_like(weight) * 0.1)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return folder


def checkpoint_files(folder: Path) -> list[str]:
    """Names of its weight files, in order."""
    return sorted(file.name for file in folder.glob("*.safetensors"))


def model_section(name: str, targets: str = "q_k", **changes: Any) -> dict[str, Any]:
    """Config section that builds a family's tiny model with LoRA on a target set of :data:`TARGETS`."""
    family = FAMILIES[name]
    gemma = name == "gemma"  # its builder knows no apply_lora_to_output
    lora = {"apply_lora_to_mlp": False, **({} if gemma else {"apply_lora_to_output": False}), **TARGETS[targets]}
    ranks = {"lora_rank": 4, "lora_alpha": 16, "lora_dropout": 0.0}
    return {"_component_": family.builder, **SIZES, **family.sizes, **lora, **ranks, **changes}


def checkpointer_section(name: str, folder: Path) -> dict[str, Any]:
    """Config section that reads a checkpoint of :func:`write_checkpoint`."""
    return {
        "_component_": "torchtune.training.FullModelHFCheckpointer",
        "checkpoint_dir": str(folder),
        "checkpoint_files": checkpoint_files(folder),
        "model_type": FAMILIES[name].model_type,
        "output_dir": str(folder.parent / "unused"),
    }


def hf_config(folder: Path) -> dict[str, Any]:
    """A checkpoint's ``config.json``."""
    return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
