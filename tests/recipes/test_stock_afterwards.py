"""What torchtune's own recipes trained, generated from and measured."""

import json
import re
import runpy
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pipelines import PREPARATION, Finished, rows, run_recipe, run_to_the_end, world_experiment, write_yaml
from stock import LLAMA, TINY_LLAMA, block_of_page, llama_sections, ours, set_up, stock_config, tune_run
from tiny import base_sections

from personas_tune.datasets import RatingSource
from personas_tune.prompts.render import render_prompt
from personas_tune.workspace import Workspace

MERGED = "model-00001-of-00001.safetensors"


def llama_config(out: Path, prepared: Finished, **changes: Any) -> dict[str, Any]:
    """A stock recipe's config for the bundled Llama base."""
    sections = llama_sections(TINY_LLAMA)
    sections["checkpointer"]["output_dir"] = str(out)
    return {**stock_config(out, TINY_LLAMA, ours(Workspace.at(prepared.root))), **sections, "batch_size": 6, **changes}


@pytest.fixture(scope="module")
def prepared(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """An experiment with its samples, on the bundled Llama base."""
    folder = tmp_path_factory.mktemp("prepared")
    config = world_experiment(folder, tiny_checkpoint) | llama_sections(TINY_LLAMA)
    return run_to_the_end(write_yaml(folder / "experiment.yaml", config), PREPARATION)


@pytest.fixture(scope="module")
def fully_finetuned(prepared: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a checkpoint that full finetuning wrote."""
    out = tmp_path_factory.mktemp("full") / "out"
    model = {"_component_": "torchtune.models.llama3.llama3", **LLAMA}
    optimizer = {"_component_": "torch.optim.AdamW", "lr": 0.001}
    config = llama_config(out, prepared, model=model, optimizer=optimizer, optimizer_in_bwd=False)
    made = set_up("full_finetune_single_device", config)
    made.train()
    made.cleanup()
    return out / "epoch_0"


def evaluate(prepared: Finished, folder: Path, **changes: Any) -> list[dict[str, Any]]:
    """The agents' rows of metrics.json that persona_eval writes."""
    config = yaml.safe_load(prepared.config.read_text(encoding="utf-8")) | {"adapter_sets": {}, **changes}
    outcome = run_recipe("persona_eval", write_yaml(folder / "eval.yaml", config))
    assert outcome.status == 0, outcome.err
    return list(json.loads((prepared.root / "eval" / "metrics.json").read_text())["agents"])


def probabilities(prepared: Finished, agent: str) -> np.ndarray:
    return np.array([row["p"] for row in rows(prepared.root, f"eval/predictions_{agent}")])


def test_a_fully_finetuned_checkpoint_is_measured_as_a_base_and_generates_what_was_measured(
    prepared: Finished,
    fully_finetuned: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sections = llama_sections(fully_finetuned, MERGED)
    bases = {"stock": {**sections, "model": "${model}", "tokenizer": "${tokenizer}"}}
    agents = {"base": {}, "stock": {"base": "stock", "readout": "argmax"}}
    measured = evaluate(prepared, tmp_path, bases=bases, agents=agents)
    assert [row["name"] for row in measured] == ["base", "stock"]
    before, after = (probabilities(prepared, name) for name in ("base", "stock"))
    assert np.abs(before - after).max() > 0.01

    source = RatingSource(prepared.root)
    sample = source.samples("test")[0]
    prompt = render_prompt(source.template, source.parts(sample, "both"))
    config = {
        **llama_sections(fully_finetuned, MERGED),
        "model": {"_component_": "torchtune.models.llama3.llama3", **LLAMA},
        "device": "cpu", "dtype": "fp32", "seed": 1, "quantizer": None, "enable_kv_cache": True,
        "max_new_tokens": 2, "temperature": 0.6, "top_k": 1, "log_level": "INFO",
        "prompt": {message["role"]: message["content"] for message in prompt},
    }  # fmt: skip
    likeliest = source.labels[int(after[0].argmax())]
    for recipe in ("generate", "dev/generate_v2"):
        caplog.clear()
        tune_run(recipe, write_yaml(tmp_path / "generate.yaml", config), monkeypatch)
        said = "\n".join(record.getMessage() for record in caplog.records)
        assert re.search(rf"\b{likeliest}\s*$", said, flags=re.MULTILINE), said


def trained_adapter(out: Path, config: dict[str, Any]) -> Path:
    """Folder of what the stock LoRA recipe saved: the adapter, and the checkpoint that it is merged into."""
    config["optimizer"] = {"_component_": "torch.optim.AdamW", "lr": 0.05}
    made = set_up("lora_finetune_single_device", config)
    made.train()
    made.cleanup()
    return out / "epoch_0"


def assert_imported_as_merged(prepared: Finished, tmp_path: Path, folder: Path, sections: dict[str, Any]) -> None:
    """The imported adapter on the base, and the checkpoint that the recipe merged it into, say the same."""
    merged = deepcopy(sections)
    merged["checkpointer"] |= {"checkpoint_dir": str(folder.parent / "epoch_0"), "checkpoint_files": [MERGED]}
    config = yaml.safe_load(prepared.config.read_text(encoding="utf-8"))
    config |= {
        "bases": {"one": sections, "merged": merged},
        "adapter_sets": {"stock": {"per": "all", "peft": str(folder), "base": "one"}},
        "agents": {"before": {"base": "one"}, "imported": {"adapters": "stock"}, "merged": {"base": "merged"}},
    }
    path = write_yaml(tmp_path / "import.yaml", config)
    for recipe in ("persona_lora", "persona_eval"):
        outcome = run_recipe(recipe, path)
        assert outcome.status == 0, outcome.out + outcome.err
    before, imported, merged_in = (probabilities(prepared, name) for name in ("before", "imported", "merged"))
    assert np.abs(imported - before).max() > 0.01
    np.testing.assert_allclose(imported, merged_in, atol=2e-5)


def test_a_llama_adapter_of_the_stock_recipe_is_imported_from_its_peft_folder(
    prepared: Finished, tmp_path: Path
) -> None:
    folder = trained_adapter(tmp_path / "out", llama_config(tmp_path / "out", prepared))
    assert (folder / "adapter_config.json").is_file()
    assert_imported_as_merged(prepared, tmp_path, folder, llama_sections(TINY_LLAMA))


def test_a_phi3_adapter_of_the_stock_recipe_is_imported_by_way_of_the_pages_lines(
    prepared: Finished, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    dataset = ours(Workspace.at(prepared.root))
    folder = trained_adapter(tmp_path / "out", stock_config(tmp_path / "out", tiny_checkpoint, dataset))
    assert not (folder / "adapter_config.json").exists()  # torchtune writes none for Phi-3
    lines = block_of_page("python", "adapter_model.pt")
    for documented, here in {
        "checkpoints/Phi-3-mini-4k-instruct": str(tiny_checkpoint),
        "runs/stock/epoch_0": str(folder),
        "runs/stock/peft": str(tmp_path / "out" / "peft"),
        "alpha=16": "alpha=8",
    }.items():
        assert documented in lines
        lines = lines.replace(documented, here)
    (tmp_path / "lines.py").write_text(lines, encoding="utf-8")
    runpy.run_path(str(tmp_path / "lines.py"))
    assert_imported_as_merged(prepared, tmp_path, tmp_path / "out" / "peft", base_sections(tiny_checkpoint))
