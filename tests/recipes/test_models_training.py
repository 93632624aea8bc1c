"""Bundled configs trained as `tune run persona_lora --config` trains them: tiny models, a tiny experiment, a CPU."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pipelines import run_recipe
from published import LORA, PUBLISHED, QLORA, build_tiny, hf_model, lay_out, tiny_sizes
from tiny import write_experiment

from personas_tune.adapters.files import load_native
from personas_tune.config import load_experiment

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

# Of each family one, and each way to quantise: all linear layers, or the adapted ones.
TRAINED = [QLORA["phi3"], LORA["llama3_8b"], QLORA["llama3_2_1b"], LORA["qwen2_5_0_5b"], QLORA["qwen2_5_1_5b"]]
OTHER_SETS = ["persona_short", "single_max", "single_min", "single_max_short", "single_min_short"]


def set_up(config: str, root: Path, monkeypatch: pytest.MonkeyPatch, files: Callable[[str], Path]) -> list[str]:
    """Lay experiment and checkpoint out where a config has them; gives the overrides that make it small."""
    model, wide = config.partition("_persona")[0], config in QLORA.values()
    monkeypatch.chdir(root)
    sizes = tiny_sizes(model, wide=wide)
    build_tiny(model, monkeypatch, **sizes)
    folder = lay_out(model, hf_model(model, sizes=sizes), files(PUBLISHED[model].tokenizer), root)
    cfg = load_experiment(config)
    write_experiment(root / cfg.output_dir)
    few_tokens = [f"tokenizer.special_tokens_path={folder}/special_tokens.json"] if wide else []
    without = [f"~adapter_sets.{name}" for name in OTHER_SETS]
    without += [f"~agents.{name}" for name, agent in cfg.agents.items() if agent.adapters in OTHER_SETS]
    return ["device=cpu", "epochs=1", "max_steps_per_epoch=1", *few_tokens, *without]


@pytest.mark.parametrize("config", TRAINED)
def test_a_bundled_config_trains_its_persona_adapters(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer_files: Callable[[str], Path]
) -> None:
    small = set_up(config, tmp_path, monkeypatch, tokenizer_files)
    outcome = run_recipe("persona_lora", config, *small)
    assert outcome.status == 0, outcome.err
    cfg = load_experiment(config)
    for persona in ("0", "1"):
        weights = load_native(Path(cfg.output_dir) / "adapters" / "persona" / persona)
        adapted = {name.split(".", 2)[2].rpartition(".lora_")[0] for name in weights}
        in_mlp = {"mlp.w1", "mlp.w2", "mlp.w3"} if cfg.model.apply_lora_to_mlp else set()
        assert adapted == {f"attn.{name}" for name in cfg.model.lora_attn_modules} | in_mlp
        assert all(torch.isfinite(weight).all() for weight in weights.values())
        assert all(weight.any() for name, weight in weights.items() if "lora_b" in name)
