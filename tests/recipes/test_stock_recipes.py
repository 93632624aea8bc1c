"""torchtune's own recipes train on our dataset, and to the same weights as ours."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import Outcome, run_recipe, tune, write_yaml
from safetensors.torch import load_file
from stock import FULL, assert_trained_an_adapter, losses, ours, set_up, stock_config, tune_run
from tiny import base_sections
from torchtune.modules.peft import get_adapter_params

from personas_tune.adapters.base_model import load_base
from personas_tune.workspace import Workspace


def test_the_stock_lora_recipe_trains_on_our_dataset_from_any_folder(
    experiment: Workspace, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    config = stock_config(out, tiny_checkpoint, ours(experiment, persona=0), save_adapter_weights_only=True)
    path = write_yaml(tmp_path / "stock.yaml", config)
    outcome = tune(elsewhere, "run", "lora_finetune_single_device", "--config", path)
    assert outcome.status == 0, outcome.err
    assert_trained_an_adapter(out)


@pytest.mark.parametrize("kind", ["packed", "several"])
def test_it_also_packs_our_rows_and_joins_several_of_our_datasets(
    kind: str, experiment: Workspace, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset: Any = {
        "packed": ours(experiment, persona=0, packed=True),
        "several": [ours(experiment, persona=0), ours(experiment, persona=1, memories="short")],
    }[kind]
    out = tmp_path / "out"
    changes = {"batch_size": 1} if kind == "packed" else {}
    config = stock_config(out, tiny_checkpoint, dataset, save_adapter_weights_only=True, **changes)
    tune_run("lora_finetune_single_device", write_yaml(tmp_path / "stock.yaml", config), monkeypatch)
    assert_trained_an_adapter(out)


def test_the_stock_full_finetuning_recipe_trains_on_our_dataset(
    experiment: Workspace, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    config = stock_config(
        out,
        tiny_checkpoint,
        ours(experiment, persona=0),
        **FULL,
    )
    tune_run("full_finetune_single_device", write_yaml(tmp_path / "stock.yaml", config), monkeypatch)
    assert len(losses(out)) == 3
    assert losses(out)[-1] < losses(out)[0]
    saved = load_file(out / "epoch_0" / "model-00001-of-00001.safetensors")
    first = load_file(tiny_checkpoint / "model.safetensors")
    assert saved.keys() == first.keys()
    assert any((saved[name].float() != first[name].float()).any() for name in saved)


def our_step(experiment: Workspace, checkpoint: Path, n_rows: int, tmp_path: Path) -> Outcome:
    """One step of SGD on all rows at once, by persona_lora."""
    config = {
        "output_dir": str(experiment.root),
        "seed": 5,
        **base_sections(checkpoint),
        "epochs": 1,
        "batch_size": n_rows,
        "gradient_accumulation_steps": 1,
        "optimizer": {"_component_": "torch.optim.SGD", "lr": 0.5},
        "adapter_sets": {"single": {"per": "all"}},
    }
    return run_recipe("persona_lora", write_yaml(tmp_path / "ours.yaml", config))


def test_one_step_of_ours_and_of_the_stock_recipe_give_the_same_adapter(
    experiment: Workspace, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    n_rows = 36
    outcome = our_step(experiment, tiny_checkpoint, n_rows, tmp_path)
    assert outcome.status == 0, outcome.err
    trained = load_file(experiment.root / "adapters" / "single" / "all" / "adapter.safetensors")

    bank = load_base(**base_sections(tiny_checkpoint), device="cpu", dtype="fp32").bank
    start = bank.add_new("single/all", seed=5).state_dict()  # what ours began with
    config = stock_config(
        tmp_path / "out",
        tiny_checkpoint,
        ours(experiment),
        batch_size=n_rows,
        optimizer={"_component_": "torch.optim.SGD", "lr": 0.5},
        save_adapter_weights_only=True,
        max_steps_per_epoch=None,
    )
    config["lr_scheduler"]["num_warmup_steps"] = 0
    recipe = set_up("lora_finetune_single_device", config)
    recipe._model.load_state_dict(start, strict=False)
    recipe.train()
    stock = {name: weight.detach() for name, weight in get_adapter_params(recipe._model).items()}
    recipe.cleanup()

    assert recipe.global_step == 1
    assert stock.keys() == trained.keys()
    for name, weight in stock.items():
        moved = (weight - start[name]).abs().max().item()
        assert (moved > 0) == ("lora_b" in name)  # B starts at zero, so A has no gradient yet
        torch.testing.assert_close(trained[name], weight, rtol=1e-5, atol=1e-5 * max(moved, 1e-3))
