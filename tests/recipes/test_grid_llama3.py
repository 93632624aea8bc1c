"""A base of Llama-3's architecture from `persona_base`, in LLaMA-3's seat beside another base."""

import json

import pytest
import yaml
from pipelines import run_to_the_end, write_yaml

SIZES = {
    "vocab_size": 400, "embed_dim": 16, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2, "intermediate_dim": 32,
    "max_seq_len": 1024,
}  # fmt: skip


@pytest.fixture(scope="module")
def llama3_base(csv_run, tmp_path_factory):
    """A one-layer base that learnt the test rows of the CSV experiment."""
    folder = tmp_path_factory.mktemp("llama3_base")
    options = {
        **SIZES, "architecture": "llama3", "corpora": [str(csv_run.root)], "rows_per_step": 16, "rows_per_user": 4,
        "warmup_steps": 1, "validation_users": 1, "tokenizer_stride": 1,
    }  # fmt: skip
    config = write_yaml(folder / "base.yaml", {"output_dir": str(folder), "seed": 3, "base_training": options})
    return run_to_the_end(config, recipe="persona_base").root / "base"


def test_persona_base_writes_a_llama_checkpoint_with_grouped_queries(llama3_base):
    config = json.loads((llama3_base / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "llama"
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (4, 2)
    assert config["vocab_size"] == 400
    special = json.loads((llama3_base / "special_tokens.json").read_text(encoding="utf-8"))["added_tokens"]
    assert config["eos_token_id"] in [token["id"] for token in special if token["content"] == "<|eot_id|>"]


def test_agents_on_two_bases_are_measured_in_one_run_with_the_papers_figures(csv_run, copy_of, llama3_base, tmp_path):
    experiment = yaml.safe_load(csv_run.config.read_text(encoding="utf-8"))
    published = {"rmse": 1.158, "mae": 0.847, "urr": 0.0}
    experiment |= {"output_dir": str(copy_of(csv_run)), "bases": {"llama3": llama3_sections(llama3_base)}}
    experiment["agents"] = {
        "llama3_short": {"base": "llama3", "memories": "short", "readout": "generate", "published": published},
        "llama3_short_expected": {"base": "llama3", "memories": "short"},
        "base": {"memories": "both"},
    }
    run = run_to_the_end(write_yaml(tmp_path / "grid.yaml", experiment), recipe="persona_eval")
    agents = json.loads((run.root / "eval/metrics.json").read_text(encoding="utf-8"))["agents"]
    assert [(agent["name"], agent["base"]) for agent in agents] == [
        ("llama3_short", "llama3"), ("llama3_short_expected", "llama3"), ("base", "default"),
    ]  # fmt: skip
    assert [agent["published"] for agent in agents] == [published, None, None]


def llama3_sections(base):
    return {
        "model": {
            "_component_": "torchtune.models.llama3.lora_llama3", **SIZES, "lora_attn_modules": ["q_proj"],
            "lora_rank": 2, "lora_alpha": 4,
        },
        "tokenizer": {
            "_component_": "torchtune.models.llama3.llama3_tokenizer", "path": str(base / "tokenizer.model"),
            "special_tokens_path": str(base / "special_tokens.json"), "max_seq_len": 1024,
        },
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer", "checkpoint_dir": str(base),
            "checkpoint_files": ["model.safetensors"], "recipe_checkpoint": None, "model_type": "LLAMA3",
            "output_dir": str(base / "unused"),
        },
    }  # fmt: skip
