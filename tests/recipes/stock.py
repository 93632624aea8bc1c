"""torchtune's own recipes for tests: their config, and running one as `tune run` does."""

import json
import math
import os
import re
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torchtune
from omegaconf import OmegaConf
from stock_on_cpu import without_a_gpu
from tiny import TINY, base_sections
from torch.distributed import destroy_process_group, init_process_group, is_initialized
from torchtune._cli.tune import TuneCLIParser

from personas_tune.workspace import Workspace

PAGE = Path(__file__).parents[2] / "docs" / "stock_recipes.md"
STOCK_FOLDER = Path(torchtune.__file__).parent.parent / "recipes"
OURS = "personas_tune.datasets.persona_rating_dataset"
PREFIXES = "personas_tune.datasets.persona_prefix_dataset"
COLLATE = "personas_tune.datasets.collate_shared_prefixes"
FULL = {"model": {"_component_": "torchtune.models.phi3.phi3", **TINY}, "optimizer_in_bwd": False}
LLAMA = {
    "vocab_size": 1600, "num_layers": 5, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 160, "intermediate_dim": 448,
    "max_seq_len": 2048,
}  # fmt: skip
TINY_LLAMA = Path(str(files("personas_tune") / "bases" / "tiny_llama3"))
QUANTIZER = {"_component_": "torchtune.training.quantization.Int8DynActInt4WeightQATQuantizer", "groupsize": 32}


def stock_config(output_dir: Path, checkpoint: Path, dataset: Any, **changes: Any) -> dict[str, Any]:
    """What the recipes ask for; keys as in torchtune's own configs."""
    base = base_sections(checkpoint)
    base["checkpointer"].update(recipe_checkpoint=None, output_dir=str(output_dir))
    return {
        "output_dir": str(output_dir),
        **base,
        "dataset": dataset,
        "seed": 1,
        "shuffle": True,
        "epochs": 1,
        "max_steps_per_epoch": 3,
        "batch_size": 4,
        "gradient_accumulation_steps": 1,
        "resume_from_checkpoint": False,
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 0.01},
        "lr_scheduler": {
            "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
            "num_warmup_steps": 1,
        },
        "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
        "compile": False,
        "device": "cpu",
        "dtype": "fp32",
        "enable_activation_checkpointing": False,
        "enable_activation_offloading": False,
        "metric_logger": {
            "_component_": "torchtune.training.metric_logging.DiskLogger",
            "log_dir": str(output_dir / "logs"),
            "filename": "log.txt",
        },
        **changes,
    }


def tune_run(recipe: str, config: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> None:
    """`tune run RECIPE --config CONFIG ...`, in this process."""
    monkeypatch.setattr(sys, "argv", ["tune", "run", recipe, "--config", str(config), *overrides])
    monkeypatch.setattr(sys, "path", [*sys.path])  # `tune run` appends to it
    parser = TuneCLIParser()
    with pytest.raises(SystemExit) as leaving:
        parser.run(parser.parse_args())
    assert not leaving.value.code


def losses(output_dir: Path) -> list[float]:
    text = (output_dir / "logs" / "log.txt").read_text(encoding="utf-8")
    return [float(value) for value in re.findall(r"\bloss:(\S+)", text)]


def ours(experiment: Workspace, **keys: Any) -> dict[str, Any]:
    return {"_component_": OURS, "source": str(experiment.root), **keys}


def ours_shared(experiment: Workspace, **keys: Any) -> dict[str, Any]:
    """Sections of a config whose rows share prefixes."""
    return {"dataset": {"_component_": PREFIXES, "source": str(experiment.root), **keys}, "collate_fn": COLLATE}


def llama_sections(checkpoint: Path, file: str = "model.safetensors") -> dict[str, Any]:
    """The bundled Llama base, or what a recipe made of it."""
    sections = base_sections(TINY_LLAMA, **LLAMA, lora_attn_modules=["q_proj", "v_proj"])
    sections["model"]["_component_"] = "torchtune.models.llama3.lora_llama3"
    sections["tokenizer"] |= {"_component_": "torchtune.models.llama3.llama3_tokenizer", "max_seq_len": 2048}
    sections["checkpointer"] |= {
        "checkpoint_dir": str(checkpoint),
        "checkpoint_files": [file],
        "model_type": "LLAMA3",
        "recipe_checkpoint": None,
        "output_dir": str(checkpoint.parent / "unused"),
    }
    return sections


def write_chats(path: Path) -> dict[str, Any]:
    """Eight conversations on disk, and the section of torchtune's dataset that reads them."""
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"Is {n} odd?"},
                {"role": "assistant", "content": "yes" if n % 2 else "no"},
            ]
        }
        for n in range(8)
    ]
    path.write_text(json.dumps(chats), encoding="utf-8")
    return {
        "_component_": "torchtune.datasets.chat_dataset",
        "source": "json",
        "data_files": str(path),
        "split": "train",
        "conversation_column": "messages",
        "conversation_style": "openai",
    }


def teacher(checkpoint: Path, **model: Any) -> dict[str, Any]:
    """What the distilling recipes ask for besides."""
    return {
        "teacher_model": {"_component_": "torchtune.models.phi3.phi3", **TINY, **model},
        "teacher_checkpointer": {**base_sections(checkpoint)["checkpointer"], "recipe_checkpoint": None},
        "kd_loss": {"_component_": "torchtune.modules.loss.ForwardKLWithChunkedOutputLoss"},
        "kd_ratio": 0.5,
    }


@contextmanager
def alone_in_a_group() -> Iterator[None]:
    """What distributed recipes need: to be one process of one, without a GPU."""
    variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    with patch.dict(os.environ, variables), without_a_gpu():
        try:
            yield
        finally:
            if is_initialized():
                destroy_process_group()


def set_up(recipe: str, config: dict[str, Any]) -> Any:
    """A recipe's object, set up with a config and ready to train."""
    if recipe.endswith("distributed") and recipe != "full_finetune_distributed":
        init_process_group("gloo")  # as the others' main functions do; in the one it is the constructor
    module = runpy.run_path(str(STOCK_FOLDER / f"{recipe}.py"), run_name="stock")
    (recipe_class,) = (
        value for name, value in module.items() if "Recipe" in name and getattr(value, "__module__", "") == "stock"
    )
    cfg = OmegaConf.create(config)
    made = recipe_class(cfg)
    made.setup(cfg=cfg)
    return made


def blocks_of_page(language: str) -> list[str]:
    """The page's fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def block_of_page(language: str, text: str) -> str:
    """The page's one block with a text in it."""
    (block,) = (block for block in blocks_of_page(language) if text in block)
    return block


def assert_trained_an_adapter(out: Path) -> None:
    assert len(losses(out)) == 3
    assert all(math.isfinite(loss) for loss in losses(out))
    adapter = torch.load(out / "epoch_0" / "adapter_model.pt", weights_only=True)
    assert all(weight.isfinite().all() and (weight != 0).any() for weight in adapter.values())
