"""The models of the bundled configs as their `config.json` on the Hub should describe them, and random tiny ones alike.

The constants were written down by hand on 2026-11-20; the Hub was not within reach, so no `config.json` was read.

A tiny one keeps what the numbers of a model depend on: RoPE, the norms' epsilon, biases, tied embeddings, how many
query heads share a key head; names and number of its files are those of the YAML. Only its sizes are smaller.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import write_experiment
from torch import Tensor

from personas_tune.adapters.base_model import TOKENIZER_FILES
from personas_tune.config import load_experiment
from personas_tune.datasets import RatingSource
from personas_tune.prompts.render import render_prompt
from personas_tune.training.tiny_tokenizers import SPECIAL_FILE, train_tokenizer

LLAMA3 = {
    "vocab_size": 128256, "rms_norm_eps": 1e-5, "num_key_value_heads": 8, "bos_token_id": 128000,
    "eos_token_id": 128009,
}  # fmt: skip
LLAMA3_2 = {
    **LLAMA3, "max_position_embeddings": 131072, "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
QWEN2_5 = {
    "vocab_size": 151936, "rms_norm_eps": 1e-6, "num_key_value_heads": 2, "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}, "tie_word_embeddings": True,
    "use_sliding_window": False, "bos_token_id": 151643, "eos_token_id": 151645,
}  # fmt: skip


@dataclass(frozen=True)
class Published:
    """A model on the Hub.

    Args:
        hub: Its repository.
        hf_class: Its class in transformers.
        hf_config: Of its ``config.json``.
        component: torchtune's builder for its architecture, where the model's own builder finds it.
        tokenizer: Kind of its tokenizer's files.
        n_parameters: All of its weights, tied ones once.
    """

    hub: str
    hf_class: str
    hf_config: dict[str, Any]
    component: str
    tokenizer: str
    n_parameters: float


def _of(layers: int, heads: int, embed: int, hidden: int, more: dict[str, Any]) -> dict[str, Any]:
    sizes = {
        "num_hidden_layers": layers, "num_attention_heads": heads, "hidden_size": embed, "intermediate_size": hidden,
    }  # fmt: skip
    return {**more, **sizes}


def _llama(hub: str, package: str, n_parameters: float, hf_config: dict[str, Any]) -> Published:
    component = f"torchtune.models.{package}._model_builders.lora_{package}"
    return Published(f"meta-llama/{hub}", "LlamaForCausalLM", hf_config, component, "llama3", n_parameters)


def _qwen(hub: str, n_parameters: float, hf_config: dict[str, Any]) -> Published:
    component = "torchtune.models.qwen2_5._model_builders.lora_qwen2"
    return Published(f"Qwen/{hub}", "Qwen2ForCausalLM", hf_config, component, "qwen2_5", n_parameters)


PUBLISHED = {
    "phi3": Published(
        "microsoft/Phi-3-mini-4k-instruct", "Phi3ForCausalLM",
        _of(32, 32, 3072, 8192, {
            "vocab_size": 32064, "rms_norm_eps": 1e-5, "num_key_value_heads": 32, "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096, "rope_theta": 10000.0, "sliding_window": 2047,
            "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 32000, "pad_token_id": 32000,
        }),
        "torchtune.models.phi3._model_builders.lora_phi3", "phi3", 3.82e9,
    ),
    "llama3_8b": _llama(
        "Meta-Llama-3-8B-Instruct", "llama3", 8.03e9,
        _of(32, 32, 4096, 14336, {
            **LLAMA3, "max_position_embeddings": 8192, "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        }),
    ),
    "llama3_2_1b": _llama("Llama-3.2-1B-Instruct", "llama3_2", 1.24e9, _of(16, 32, 2048, 8192, LLAMA3_2)),
    "llama3_2_3b": _llama("Llama-3.2-3B-Instruct", "llama3_2", 3.21e9, _of(28, 24, 3072, 8192, LLAMA3_2)),
    "qwen2_5_0_5b": _qwen("Qwen2.5-0.5B-Instruct", 0.49e9, _of(24, 14, 896, 4864, QWEN2_5)),
    "qwen2_5_1_5b": _qwen("Qwen2.5-1.5B-Instruct", 1.54e9, _of(28, 12, 1536, 8960, QWEN2_5)),
    "qwen2_5_3b": _qwen("Qwen2.5-3B-Instruct", 3.09e9, _of(36, 16, 2048, 11008, QWEN2_5)),
}  # fmt: skip
LORA = {model: f"{model}_persona.yaml" for model in PUBLISHED}
QLORA = {model: f"{model}_persona_qlora.yaml" for model in PUBLISHED}
# The quantised ones have few tokens, so that their linear layers can be as wide as NF4 wants them.
FEW_TOKENS = 640


def tiny_sizes(model: str, *, wide: bool = False) -> dict[str, int]:
    """Sizes of a tiny model as torchtune's builders call them; as many query heads share a key head as in the real one.

    Args:
        model: Of :data:`PUBLISHED`.
        wide: Each linear layer a multiple of NF4's 64 x 256 weights, and few tokens in place of all of them.
    """
    config = PUBLISHED[model].hf_config
    heads = 2 * config["num_attention_heads"] // config["num_key_value_heads"]
    head_dim = 64 if wide else 8 if model.startswith("llama3_2") else 4  # 8: scaled RoPE has three kinds of waves
    return {
        "vocab_size": FEW_TOKENS if wide else config["vocab_size"], "num_layers": 1 if wide else 2, "num_heads": heads,
        "num_kv_heads": 2, "embed_dim": heads * head_dim, "intermediate_dim": 128,
    }  # fmt: skip


def build_tiny(model: str, monkeypatch: pytest.MonkeyPatch, **sizes: int) -> dict[str, Any]:
    """Have a model's torchtune builder build a tiny one; gives what it asks for by itself, once it has been called."""
    where, _, name = PUBLISHED[model].component.rpartition(".")
    module, asked = import_module(where), dict[str, Any]()
    build = getattr(module, name)

    def build_small(**arguments: Any) -> torch.nn.Module:
        asked.update(arguments)
        return build(**{**arguments, **sizes})

    monkeypatch.setattr(module, name, build_small)
    return asked


def hf_model(model: str, *, seed: int = 0, sizes: dict[str, int], **hf: Any) -> Any:
    """A random fp32 model of transformers with a published config, at other sizes; logits are of the order of one."""
    import transformers

    published = PUBLISHED[model]
    model_class = getattr(transformers, published.hf_class)
    tiny = {
        "vocab_size": sizes["vocab_size"], "num_hidden_layers": sizes["num_layers"],
        "num_attention_heads": sizes["num_heads"], "num_key_value_heads": sizes["num_kv_heads"],
        "hidden_size": sizes["embed_dim"], "intermediate_size": sizes["intermediate_dim"],
        "pad_token_id": 0,
    }  # fmt: skip
    config = model_class.config_class(**{**published.hf_config, **tiny, **hf})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = model_class(config)
        for weight in made.parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=sizes["embed_dim"] ** -0.5)
            else:  # norms' scales and biases: not all alike
                weight.data.add_(torch.randn_like(weight) * 0.1)
    return made.eval()


def lay_out(model: str, hf: Any, tokenizer_files: Path, root: Path) -> Path:
    """Save a model of transformers and its tokenizer below ``root`` where its config has them; gives the folder."""
    cfg = load_experiment(LORA[model])
    folder = root / cfg.checkpointer.checkpoint_dir
    hf.save_pretrained(folder)
    _rename(folder, list(cfg.checkpointer.checkpoint_files), hf.state_dict())
    for key in TOKENIZER_FILES:
        if (path := cfg.tokenizer.get(key)) is not None:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tokenizer_files / Path(path).name, root / path)
    shutil.copy(tokenizer_files / SPECIAL_FILE, folder)
    return folder


def _rename(folder: Path, names: Sequence[str], weights: dict[str, Tensor]) -> None:
    """One file of weights as ``names``, with transformers' index."""
    if len(names) == 1:
        return
    saved = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    held = {weight: names[number % len(names)] for number, weight in enumerate(sorted(saved))}
    for name in names:
        save_file({key: saved[key] for key in saved if held[key] == name}, folder / name, {"format": "pt"})
    index = {"metadata": {"total_size": sum(weight.nbytes for weight in saved.values())}, "weight_map": held}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def write_tokenizer(kind: str, folder: Path) -> Path:
    """Train a tokenizer of fewer than :data:`FEW_TOKENS` tokens in a kind's files, on a tiny experiment's prompts.

    Its special tokens have their real ids where the files don't say otherwise; ``special_tokens.json`` has small ones.
    """
    texts = _prompts(folder / "experiment")
    if kind == "qwen2_5":
        _write_byte_level(texts, folder)
    else:
        train_tokenizer(texts, 400, folder, architecture=kind)
    return folder


def _prompts(root: Path) -> list[str]:
    source = RatingSource(write_experiment(root).root)
    prompts = [render_prompt(source.template, source.parts(sample, "both")) for sample in source.samples("train")]
    return [message["content"] for prompt in prompts for message in prompt]


def _write_byte_level(texts: Sequence[str], folder: Path) -> None:
    """Write ``vocab.json``, ``merges.txt`` and the special tokens' small ids."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from torchtune.models.qwen2._tokenizer import PRETOKENIZE_REGEX
    from torchtune.models.qwen2_5._tokenizer import QWEN2_5_SPECIAL_TOKENS

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.model.save(str(folder))
    first = tokenizer.get_vocab_size()
    added = [{"id": first + number, "content": token} for number, token in enumerate(QWEN2_5_SPECIAL_TOKENS)]
    (folder / SPECIAL_FILE).write_text(json.dumps({"added_tokens": added}), encoding="utf-8")
