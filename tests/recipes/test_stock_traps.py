"""What docs/stock_recipes.md warns of; a test that fails here says that torchtune has mended something."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError
from stock import TINY_LLAMA, llama_sections, losses, ours, ours_shared, set_up, stock_config
from tiny import base_sections
from torchtune import config as torchtune_config
from torchtune.data import Message

from personas_tune.datasets import ChatTokenizer
from personas_tune.workspace import Workspace

PROMPT = [{"role": "system", "content": "You rate films."}, {"role": "user", "content": "Rate The River."}]


def prompts(section: dict[str, Any]) -> tuple[list[int], list[int], Any]:
    """A prompt as training has it and as `generate` makes it, and the tokenizer."""
    tokenizer = torchtune_config.instantiate(OmegaConf.create(section))
    messages = [Message(role=each["role"], content=each["content"]) for each in PROMPT]
    asked = tokenizer({"messages": [*messages, Message(role="assistant", content="")]}, inference=True)["tokens"]
    return ChatTokenizer(tokenizer).row(PROMPT, "4").prompt, list(asked), tokenizer


def test_generate_leaves_the_turn_open_for_llama_and_ends_it_for_phi3(tiny_checkpoint: Path) -> None:
    trained, asked, _ = prompts(llama_sections(TINY_LLAMA)["tokenizer"])
    assert asked == trained
    trained, asked, phi3 = prompts(base_sections(tiny_checkpoint)["tokenizer"])
    end = phi3.special_tokens["<|end|>"]
    assert end in asked[asked.index(phi3.special_tokens["<|assistant|>"]) :]
    assert end not in trained[trained.index(phi3.special_tokens["<|assistant|>"]) :]


def test_the_checkpointer_refuses_to_write_where_it_reads(tiny_checkpoint: Path) -> None:
    section = {**base_sections(tiny_checkpoint)["checkpointer"], "output_dir": str(tiny_checkpoint)}
    with pytest.raises(ValueError, match="output directory cannot be the same"):
        torchtune_config.instantiate(OmegaConf.create(section))


def test_the_lora_recipe_needs_a_key_that_its_builder_does_not(
    experiment: Workspace, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    config = stock_config(tmp_path / "out", tiny_checkpoint, ours(experiment))
    del config["model"]["apply_lora_to_mlp"]
    with pytest.raises(ConfigAttributeError, match="apply_lora_to_mlp"):
        set_up("lora_finetune_single_device", config)


def test_fewer_items_than_a_batch_train_nothing(experiment: Workspace, tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = stock_config(tmp_path / "out", tiny_checkpoint, None, batch_size=7, max_steps_per_epoch=None)
    config |= ours_shared(experiment, rows_per_item=6)  # six items
    made = set_up("lora_finetune_single_device", config)
    made.train()
    assert made.global_step == 0
    assert losses(tmp_path / "out") == []
    made.cleanup()
