"""What docs/stock_recipes.md says: each of its configs trains, on torchtune's own config, and the table is true."""

import math
import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from documented import commands_of
from omegaconf import OmegaConf
from pipelines import write_yaml
from stock import (
    COLLATE,
    FULL,
    PAGE,
    STOCK_FOLDER,
    alone_in_a_group,
    blocks_of_page,
    losses,
    ours,
    set_up,
    stock_config,
    teacher,
    tune_run,
    write_chats,
)
from torchtune._recipe_registry import get_all_recipes
from torchtune.config import validate

from personas_tune.config import load_experiment
from personas_tune.workspace import Workspace

HEAD = re.compile(r"# ([\w/]+), from (\S+)\n")
BLOCKS = [block for block in blocks_of_page("yaml") if HEAD.match(block)]
RECIPES = {recipe.name: STOCK_FOLDER / recipe.file_path for recipe in get_all_recipes()}
READS_COLLATE_FN = {
    name for name, file in RECIPES.items() if 'cfg.get("collate_fn"' in file.read_text(encoding="utf-8")
}

pytestmark = pytest.mark.filterwarnings("ignore:DTensor random operators")


def named(block: str) -> tuple[str, str]:
    """The recipe and the torchtune config that a block is for."""
    match = HEAD.match(block)
    assert match
    return match[1], match[2]


def over_stock(block: str) -> Any:
    """torchtune's config with the block's keys; a dataset's keys take the place of its own."""
    stock = OmegaConf.load(STOCK_FOLDER / "configs" / f"{named(block)[1]}.yaml")
    keys = OmegaConf.create(block)
    stock.pop("dataset")
    return OmegaConf.merge(stock, keys)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: "-".join(named(block)))
def test_a_block_over_torchtunes_config_is_well_formed(block: str) -> None:
    cfg = over_stock(block)
    validate(OmegaConf.masked_copy(cfg, [key for key in cfg if key in ("model", "loss", "kd_loss", "teacher_model")]))
    assert cfg.tokenizer.max_seq_len == 4096


def on_tiny_base(cfg: Any, out: Path, checkpoint: Path) -> dict[str, Any]:
    """The config with a tiny base in the place of the large one, on a CPU, for two steps."""
    tiny = stock_config(out, checkpoint, None)
    keys = (
        "output_dir",
        "tokenizer",
        "checkpointer",
        "device",
        "dtype",
        "metric_logger",
        "enable_activation_offloading",
    )
    changes = {key: tiny[key] for key in keys}
    changes["metric_logger"] = {**tiny["metric_logger"], "log_dir": "${output_dir}/logs"}
    changes["model"] = FULL["model"] if "lora_rank" not in cfg.model else tiny["model"]
    changes |= {"gradient_accumulation_steps": 1, "max_steps_per_epoch": 2, "optimizer": tiny["optimizer"]}
    changes |= {"profiler": {"enabled": False}, "seed": 1}
    if "teacher_model" in cfg:
        changes |= {key: value for key, value in teacher(checkpoint).items() if key.startswith("teacher")}
    if "quantizer" in cfg:
        changes["quantizer"] = {**cfg.quantizer, "groupsize": 32}
    return {**OmegaConf.to_container(cfg, resolve=False), **changes}  # type: ignore[dict-item]


def assert_trains(recipe: str, config: dict[str, Any]) -> None:
    with alone_in_a_group():
        made = set_up(recipe, config)
        made.train()
        made.cleanup()
    found = losses(Path(config["output_dir"]))
    assert len(found) == 2
    assert all(math.isfinite(loss) for loss in found)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: "-".join(named(block)))
def test_a_block_trains(block: str, experiment: Workspace, tiny_checkpoint: Path, tmp_path: Path) -> None:
    write_chats(tmp_path / "chats.json")
    block = block.replace("runs/phi3_persona", str(experiment.root)).replace("chats.json", str(tmp_path / "chats.json"))
    assert_trains(named(block)[0], on_tiny_base(over_stock(block), tmp_path / "out", tiny_checkpoint))


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("recipe", sorted({named(block)[0] for block in BLOCKS}))
def test_each_recipe_trains_on_our_rows_packed_or_not(
    recipe: str, packed: bool, experiment: Workspace, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    block = next(block for block in BLOCKS if named(block)[0] == recipe)
    config = on_tiny_base(over_stock(block), tmp_path / "out", tiny_checkpoint)
    config |= {"dataset": ours(experiment, packed=packed), "batch_size": 1 if packed else 2}
    config.pop("collate_fn", None)
    assert table()[recipe][1] == "yes"
    assert_trains(recipe, config)


def test_the_pages_command_lines_override_a_config_that_has_another_dataset(
    experiment: Workspace, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = OmegaConf.load(STOCK_FOLDER / "configs" / "phi3" / "mini_lora_single_device.yaml")
    path = write_yaml(tmp_path / "stock.yaml", on_tiny_base(stock, tmp_path / "out", tiny_checkpoint))
    commands = [command for command in commands_of(PAGE) if "--config stock.yaml" in shlex.join(command.words)]
    single = [command.words for command in commands if "lora_finetune_single_device" in command.words]
    assert len(single) == 2
    for number, words in enumerate(single):
        overrides = [word.replace("runs/phi3_persona", str(experiment.root)) for word in words if "=" in word]
        out = f"output_dir={tmp_path / str(number)}"
        tune_run("lora_finetune_single_device", path, monkeypatch, *overrides, out, "save_adapter_weights_only=True")
        assert math.isfinite(losses(tmp_path / str(number))[-1])


def test_the_pages_configs_are_of_all_recipes_that_start_and_share_prefixes_where_that_can_be() -> None:
    recipes = [named(block)[0] for block in BLOCKS]
    assert set(recipes) == {name for name, cells in table().items() if cells[0] == "yes"}
    with_prefixes = {named(block)[0] for block in BLOCKS if COLLATE in block}
    assert with_prefixes == {name for name, cells in table().items() if cells[2] == "yes"}


def table() -> dict[str, list[str]]:
    """The page's first table: the cells behind each recipe."""
    section = PAGE.read_text(encoding="utf-8").partition("\n## Which recipes\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| `")]
    return {name: cells for first, *cells in rows for name in re.findall(r"`([\w/*]+)`", first)}


def test_shared_prefixes_go_where_the_table_says() -> None:
    by_table = {name for name, cells in table().items() if cells[2] == "yes"}
    assert by_table == READS_COLLATE_FN - {"qat_lora_finetune_distributed"}  # which doesn't start


def test_the_table_has_every_recipe_of_torchtune() -> None:
    patterns = [re.escape(name).replace(r"\*", r"\w*") for name in table()]
    assert [name for name in RECIPES if not any(re.fullmatch(one, name) for one in patterns)] == []
    assert [one for one in patterns if not any(re.fullmatch(one, name) for name in RECIPES)] == []


def test_the_recipe_of_several_datasets_takes_huggingfaces_only() -> None:
    code = RECIPES["dev/lora_finetune_distributed_multi_dataset"].read_text(encoding="utf-8")
    assert "load_hf_dataset(" in code
    assert "config.instantiate(cfg_dataset, self._tokenizer)" not in code


def test_the_grpo_recipe_lacks_a_part_of_its_own() -> None:
    assert "from torchtune.dev.grpo" in (STOCK_FOLDER / "dev" / "grpo_full_finetune_distributed.py").read_text()
    assert find_spec("torchtune.dev") is None


def test_the_blocks_for_our_recipes_are_valid() -> None:
    blocks = [block for block in blocks_of_page("yaml") if block.startswith("# persona_")]
    assert len(blocks) == 2
    for block in blocks:
        words = [f"{key}={value}" for key, value in flat(yaml.safe_load(block)).items()]
        load_experiment("phi3_persona.yaml", words)


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys of a YAML's leaves."""
    if not isinstance(node, dict):
        return {prefix: str(node).replace(" ", "") if isinstance(node, list) else "null" if node is None else node}
    return {
        key: value for name, child in node.items() for key, value in flat(child, f"{prefix}.{name}".strip(".")).items()
    }
