"""torchtune's distributed recipes train on our rows: without NCCL and CUDA, and otherwise as they are."""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from pipelines import tune, write_yaml
from safetensors.torch import load_file
from stock import FULL, QUANTIZER, alone_in_a_group, losses, ours, ours_shared, set_up, stock_config, teacher
from torch.distributed.tensor import DTensor

from personas_tune.errors import ConfigError
from personas_tune.workspace import Workspace

LORA = {"save_adapter_weights_only": True}
RECIPES: dict[str, dict[str, Any]] = {
    "lora_finetune_distributed": LORA,
    "full_finetune_distributed": FULL,
    "qat_distributed": {**FULL, "quantizer": QUANTIZER},
}
AT_ONCE = {
    "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
    "num_warmup_steps": 0,
}

pytestmark = pytest.mark.filterwarnings("ignore:DTensor random operators")


@pytest.fixture
def one_process() -> Iterator[None]:
    with alone_in_a_group():
        yield


def gathered(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of what is trained."""
    weights = {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
    return {
        name: (weight.full_tensor() if isinstance(weight, DTensor) else weight).clone()
        for name, weight in weights.items()
    }


def trained(recipe: str, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """How far each weight moved."""
    made = set_up(recipe, config)
    start = gathered(made._model)
    made.train()
    moves = {name: weight - start[name] for name, weight in gathered(made._model).items()}
    made.cleanup()
    return moves


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("recipe", RECIPES)
def test_each_trains_on_rows_with_shared_prefixes(
    recipe: str, experiment: Workspace, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    config = stock_config(tmp_path / "out", tiny_checkpoint, None, batch_size=2, **RECIPES[recipe])
    moves = trained(recipe, config | ours_shared(experiment, persona=0))
    assert len(losses(tmp_path / "out")) == 3
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "out"))
    assert all(move.isfinite().all() and (move != 0).any() for move in moves.values())
    assert list((tmp_path / "out" / "epoch_0").glob("*model*"))


EARLY_EXIT = {
    "loss": {"_component_": "torch.nn.CrossEntropyLoss"},
    "early_exit_loss": {"layers": ":"},
    "fsdp_reshard_after_forward": False,
}


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    ("recipe", "keys", "untrained"),
    [
        ("full_finetune_distributed", {}, "none"),
        # its hidden states are what layers get, so that the last one's output is in no loss: docs/stock_recipes.md
        ("dev/early_exit_finetune_distributed", EARLY_EXIT, "layers.1."),
    ],
)
def test_finetuning_all_weights_moves_them_as_the_same_rows_on_their_own_do(
    recipe: str, keys: dict[str, Any], untrained: str, experiment: Workspace, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    changes = {**FULL, "optimizer": {"_component_": "torch.optim.SGD", "lr": 0.1}, "lr_scheduler": None, **keys}
    alone = stock_config(tmp_path / "alone", tiny_checkpoint, ours(experiment), batch_size=36, **changes)
    shared = stock_config(tmp_path / "shared", tiny_checkpoint, None, batch_size=6, **changes)
    shared.update(ours_shared(experiment, rows_per_item=6))
    its, our = (trained(recipe, config) for config in (alone, shared))
    for name, move in its.items():
        assert (move.norm() > 0) == (not name.startswith(untrained)), name
        assert (our[name] - move).norm() < 1e-5 * move.norm() + 1e-7, name


@pytest.mark.usefixtures("one_process")
def test_early_exit_needs_the_norms_weights_where_it_calls_it(
    experiment: Workspace, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """What docs/stock_recipes.md warns of; its config, which keeps the weights gathered, is tested with the page."""
    changes = {**FULL, "loss": {"_component_": "torch.nn.CrossEntropyLoss"}, "early_exit_loss": {"layers": ":"}}
    config = stock_config(tmp_path / "out", tiny_checkpoint, ours(experiment), **changes)
    made = set_up("dev/early_exit_finetune_distributed", config)
    with pytest.raises(RuntimeError, match=r"mixed torch.Tensor and DTensor"):
        made.train()


@pytest.mark.usefixtures("one_process")
def test_distillation_takes_rows_on_their_own_only(
    experiment: Workspace, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    recipe = "knowledge_distillation_distributed"
    config = stock_config(tmp_path / "out", tiny_checkpoint, ours(experiment), **teacher(tiny_checkpoint))
    moves = trained(recipe, config)
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "out"))
    assert all((move != 0).any() for name, move in moves.items() if "lora_b" in name)
    made = set_up(recipe, config | ours_shared(experiment))
    with pytest.raises(ConfigError, match="where the recipe reads no collate_fn"):
        made.train()


@pytest.mark.usefixtures("one_process")
def test_a_checkpoint_of_quantization_aware_training_is_a_base_and_is_quantized_by_the_stock_recipe(
    experiment: Workspace, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    config = stock_config(tmp_path / "out", tiny_checkpoint, ours(experiment), **FULL, quantizer=QUANTIZER)
    trained("qat_distributed", config)
    file = "model-00001-of-00001.safetensors"
    saved, base = load_file(tmp_path / "out" / "epoch_0" / file), load_file(tiny_checkpoint / "model.safetensors")
    assert {name: weight.shape for name, weight in saved.items()} == {name: w.shape for name, w in base.items()}
    groups = saved["model.layers.0.self_attn.qkv_proj.weight"]  # a row of 32 is a group
    assert all(group.unique().numel() > 16 for group in groups)  # 4 bits have 16 values

    places = {"checkpoint_dir": str(tmp_path / "out" / "epoch_0"), "output_dir": str(tmp_path / "quantized")}
    keys = {name: config[name] for name in ("model", "quantizer", "device", "dtype", "seed")}
    keys["checkpointer"] = {**config["checkpointer"], **places, "checkpoint_files": [file]}
    made = set_up("quantize", keys)
    made.quantize(OmegaConf.create(keys))
    made.save_checkpoint(OmegaConf.create(keys))
    (path,) = (tmp_path / "quantized").glob("*-8da4w.pt")
    weight = torch.load(path, weights_only=True)["layers.0.attn.q_proj.weight"]
    assert weight.dtype == torch.int8
    assert weight.abs().max() <= 8


@pytest.mark.usefixtures("one_process")
def test_quantization_aware_lora_does_not_start_with_todays_torchao(
    experiment: Workspace, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    config = stock_config(tmp_path / "out", tiny_checkpoint, ours(experiment), quantizer=QUANTIZER)
    with pytest.raises(AssertionError) as caught:
        set_up("qat_lora_finetune_distributed", config)
    assert "FakeQuantizeConfig" in str(caught.traceback[-1].statement)


def two_steps_from(start: dict[str, torch.Tensor], config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The adapter that the recipe for one device makes of a given one."""
    made = set_up("lora_finetune_single_device", config)
    made._model.load_state_dict(start, strict=False)
    made.train()
    assert made.global_step == 2
    made.cleanup()
    return {name: weight.detach() for name, weight in made._model.named_parameters() if weight.requires_grad}


def test_two_processes_train_as_one_on_all_rows(experiment: Workspace, tiny_checkpoint: Path, tmp_path: Path) -> None:
    sgd = {"_component_": "torch.optim.SGD", "lr": 0.5}
    changes = {**LORA, "epochs": 2, "max_steps_per_epoch": None, "lr_scheduler": AT_ONCE, "optimizer": sgd}
    changes["shuffle"] = False  # items of 4 rows and of 2 take turns, so one process gets twice the other's rows
    config = stock_config(tmp_path / "out", tiny_checkpoint, None, batch_size=6, **changes)
    path = write_yaml(tmp_path / "stock.yaml", config | ours_shared(experiment, rows_per_item=4))
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "STOCK_RECIPE": "lora_finetune_distributed"}
    outcome = tune(tmp_path, "run", "--nproc_per_node", "2", "stock_on_cpu", "--config", path, env=env)
    assert outcome.status == 0, outcome.err
    first, second = (
        torch.load(tmp_path / "out" / f"epoch_{epoch}" / "adapter_model.pt", weights_only=True) for epoch in (0, 1)
    )
    # B begins as zero, so the first step leaves A as it was drawn.
    start = {name: torch.zeros_like(weight) if "lora_b" in name else weight for name, weight in first.items()}
    alone = stock_config(tmp_path / "alone", tiny_checkpoint, ours(experiment), batch_size=36, **changes)
    ours_alone = two_steps_from(start, alone)
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    assert second.keys() == ours_alone.keys()
    for name, weight in ours_alone.items():
        move = weight - start[name]
        assert move.norm() > 0, name
        assert (second[name] - start[name] - move).norm() < 1e-5 * move.norm() + 1e-7, name
