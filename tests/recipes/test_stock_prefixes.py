"""Users' prefixes are run once in torchtune's own recipes, and nothing else about a training changes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import write_yaml
from stock import (
    COLLATE,
    FULL,
    assert_trained_an_adapter,
    losses,
    ours,
    ours_shared,
    set_up,
    stock_config,
    tune_run,
    write_chats,
)

from personas_tune.errors import ConfigError
from personas_tune.workspace import Workspace

RECIPES = {"lora_finetune_single_device": {"save_adapter_weights_only": True}, "full_finetune_single_device": FULL}


def two_steps(recipe: str, config: dict[str, Any]) -> tuple[list[float], dict[str, torch.Tensor], int]:
    """Losses and weights of two steps on all rows, and how many tokens a step ran."""
    made = set_up(recipe, config)
    n_tokens = sum(batch["tokens"].numel() for batch in made._dataloader)
    start = {name: weight.detach().clone() for name, weight in made._model.named_parameters() if weight.requires_grad}
    made.train()
    assert made.global_step == 2
    moved = {name: made._model.get_parameter(name).detach() - weight for name, weight in start.items()}
    made.cleanup()
    return losses(Path(config["output_dir"])), moved, n_tokens


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_steps_give_the_weights_that_the_same_rows_on_their_own_give(
    recipe: str, experiment: Workspace, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    changes = {
        **RECIPES[recipe],
        "optimizer": {"_component_": "torch.optim.SGD", "lr": 0.5},
        "lr_scheduler": {
            "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
            "num_warmup_steps": 0,
        },
        "epochs": 2,
        "max_steps_per_epoch": None,
    }
    alone = stock_config(tmp_path / "alone", tiny_checkpoint, ours(experiment), batch_size=36, **changes)
    shared = stock_config(tmp_path / "shared", tiny_checkpoint, None, batch_size=12, **changes)
    shared.update(ours_shared(experiment, rows_per_item=3))
    (its_losses, its_moves, its_tokens), (our_losses, our_moves, our_tokens) = (
        two_steps(recipe, config) for config in (alone, shared)
    )
    assert our_tokens < 0.6 * its_tokens
    assert our_losses == pytest.approx(its_losses, rel=1e-6)
    assert our_moves.keys() == its_moves.keys()
    for name, move in its_moves.items():
        assert move.norm() > 0, name
        rounding = 1e-7  # of fp32 weights, whose norm is about 1
        assert (our_moves[name] - move).norm() < 1e-5 * move.norm() + rounding, name


def test_they_are_joined_with_torchtunes_own_datasets(
    experiment: Workspace, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = ours_shared(experiment, persona=0)
    datasets = [sections["dataset"], ours(experiment, persona=1), write_chats(tmp_path / "chats.json")]
    config = stock_config(tmp_path / "out", tiny_checkpoint, datasets, save_adapter_weights_only=True)
    config["collate_fn"] = COLLATE
    made = set_up("lora_finetune_single_device", config)
    assert len(made._dataloader.sampler) == 6 + 18 + 8  # three users' six rows by four; rows; chats
    made.cleanup()
    tune_run("lora_finetune_single_device", write_yaml(tmp_path / "stock.yaml", config), monkeypatch)
    assert_trained_an_adapter(tmp_path / "out")


def test_a_recipe_with_another_collator_stops_and_says_which_it_needs(
    experiment: Workspace, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    config = stock_config(tmp_path / "out", tiny_checkpoint, ours_shared(experiment)["dataset"])
    made = set_up("lora_finetune_single_device", config)
    with pytest.raises(ConfigError, match=f"set collate_fn={COLLATE}, or use persona_rating_dataset"):
        made.train()
    assert not (tmp_path / "out" / "epoch_0").exists()
