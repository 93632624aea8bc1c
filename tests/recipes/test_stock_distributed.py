"""torchtune's distributed recipes train on our rows: without NCCL and CUDA, and otherwise as they are."""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import tune, write_yaml
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


@pytest.mark.usefixtures("one_process")
def test_full_finetuning_moves_weights_as_the_same_rows_on_their_own_do(
    experiment: Workspace, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    changes = {**FULL, "optimizer": {"_component_": "torch.optim.SGD", "lr": 0.1}, "lr_scheduler": None}
    alone = stock_config(tmp_path / "alone", tiny_checkpoint, ours(experiment), batch_size=36, **changes)
    shared = stock_config(tmp_path / "shared", tiny_checkpoint, None, batch_size=6, **changes)
    shared.update(ours_shared(experiment, rows_per_item=6))
    its, our = (trained("full_finetune_distributed", config) for config in (alone, shared))
    for name, move in its.items():
        assert move.norm() > 0, name
        assert (our[name] - move).norm() < 1e-5 * move.norm() + 1e-7, name


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
def test_quantization_aware_lora_does_not_start_with_todays_torchao(
    experiment: Workspace, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    config = stock_config(tmp_path / "out", tiny_checkpoint, ours(experiment), quantizer=QUANTIZER)
    with pytest.raises(AssertionError) as caught:
        set_up("qat_lora_finetune_distributed", config)
    assert "FakeQuantizeConfig" in str(caught.traceback[-1].statement)


def test_two_processes_share_the_items_and_count_all_rows(
    experiment: Workspace, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    changes = {**LORA, "max_steps_per_epoch": None, "lr_scheduler": AT_ONCE}
    alone = stock_config(tmp_path / "alone", tiny_checkpoint, ours(experiment), batch_size=36, **changes)
    made = set_up("lora_finetune_single_device", alone)
    made.train()
    made.cleanup()

    config = stock_config(tmp_path / "out", tiny_checkpoint, None, batch_size=3, **changes)
    path = write_yaml(tmp_path / "stock.yaml", config | ours_shared(experiment, rows_per_item=6))
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "STOCK_RECIPE": "lora_finetune_distributed"}
    outcome = tune(tmp_path, "run", "--nproc_per_node", "2", "stock_on_cpu", "--config", path, env=env)
    assert outcome.status == 0, outcome.err
    # B is zero in the first step, so that its loss is the base's on all 36 rows, whatever A was drawn.
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    adapter = torch.load(tmp_path / "out" / "epoch_0" / "adapter_model.pt", weights_only=True)
    assert all(weight.isfinite().all() and (weight != 0).any() for weight in adapter.values())
