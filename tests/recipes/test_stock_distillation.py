"""torchtune's distilling recipe trains a student on our rows."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import write_yaml
from stock import ours, set_up, stock_config, teacher, tune_run
from tiny import TINY

from personas_tune.training.tiny_base import TinyBaseShape, build_tiny_base
from personas_tune.training.tiny_checkpoint import save_tiny_base
from personas_tune.workspace import Workspace

RECIPE = "knowledge_distillation_single_device"
LARGER = {"embed_dim": 64, "num_layers": 3}


@pytest.fixture(scope="module")
def larger_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher: a base with the student's tokenizer, and wider and deeper."""
    folder = tmp_path_factory.mktemp("teacher")
    shape = TinyBaseShape(**TINY | LARGER)
    save_tiny_base(build_tiny_base(shape, seed=2), shape, {"<s>": 1, "<|endoftext|>": 2}, folder)
    return folder


def logged(out: Path, name: str) -> list[float]:
    text = (out / "logs" / "log.txt").read_text(encoding="utf-8")
    return [float(value) for value in re.findall(rf"\b{name}:(\S+)", text)]


def test_a_student_learns_our_rows_from_a_larger_teacher(
    experiment: Workspace,
    tiny_checkpoint: Path,
    larger_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    datasets = [ours(experiment, persona=0), ours(experiment, persona=1, memories="short")]
    sections = teacher(larger_checkpoint, **LARGER)
    config = stock_config(out, tiny_checkpoint, datasets, save_adapter_weights_only=True, **sections)
    tune_run(RECIPE, write_yaml(tmp_path / "stock.yaml", config), monkeypatch)
    for name in ("loss", "class_loss", "kd_loss"):
        assert len(logged(out, name)) == 3
        assert all(math.isfinite(value) for value in logged(out, name))
    adapter = torch.load(out / "epoch_0" / "adapter_model.pt", weights_only=True)
    assert all(weight.isfinite().all() and (weight != 0).any() for weight in adapter.values())


def move_of_b(recipe: str, config: dict[str, Any]) -> torch.Tensor:
    made = set_up(recipe, config)
    made.train()
    made.cleanup()
    return torch.cat([w.detach().flatten() for name, w in made._model.named_parameters() if "lora_b" in name])


def test_its_steps_are_divided_by_the_answer_tokens_twice(
    experiment: Workspace, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """A bug of torchtune 0.6.1 that docs/stock_recipes.md warns of; this fails when a version mends it."""
    schedule = {
        "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
        "num_warmup_steps": 0,
    }
    changes = {"optimizer": {"_component_": "torch.optim.SGD", "lr": 0.5}, "lr_scheduler": schedule, "batch_size": 36}
    changes |= {"save_adapter_weights_only": True, **teacher(tiny_checkpoint), "kd_ratio": 0.0}
    plain, distilled = (
        move_of_b(recipe, stock_config(tmp_path / recipe, tiny_checkpoint, ours(experiment), **changes))
        for recipe in ("lora_finetune_single_device", RECIPE)
    )
    n_answer_tokens = 36 * 2  # a label and the end of turn
    assert (distilled * n_answer_tokens - plain).norm() < 1e-4 * plain.norm()
