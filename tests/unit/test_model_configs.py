"""The configs of the bundled models: what they share, their sizes as published, and what is told when weights lack."""

import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf
from published import LORA, PUBLISHED, QLORA
from torch import nn
from torchao.dtypes.nf4tensor import NF4Tensor
from torchtune._cli.tune import TuneCLIParser
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import LoRALinear, get_adapter_params

from personas_tune.adapters.base_model import build_on_meta, download_command, missing_base_files, size_of_weights
from personas_tune.cli import list_bundled
from personas_tune.config import base_sections, bundled_configs, find_config, load_experiment

DOCS = Path(__file__).parents[2] / "docs"
CONFIGS = [*LORA.values(), *QLORA.values()]
OF_ITS_OWN = {"output_dir", "model", "tokenizer", "checkpointer"}
each_config = pytest.mark.parametrize("config", CONFIGS)
each_model = pytest.mark.parametrize("model", PUBLISHED)


def model_of(config: str) -> str:
    return config.partition("_persona")[0]


@cache
def loaded(config: str) -> DictConfig:
    """A config as recipes get it; not to be changed."""
    return load_experiment(config)


@cache
def written(config: str) -> dict:
    return yaml.safe_load(find_config(config).read_text(encoding="utf-8"))


@cache
def full_size(config: str) -> TransformerDecoder:
    """The model of a config without its weights."""
    cfg = loaded(config)
    return build_on_meta(cfg.model, cfg.dtype)


def n_weights(config: str) -> tuple[int, int]:
    """Of the base, and of an adapter."""
    network = full_size(config)
    adapter = get_adapter_params(network)
    of_base = sum(weight.numel() for name, weight in network.named_parameters() if name not in adapter)
    return of_base, sum(weight.numel() for weight in adapter.values())


def nf4_names(network: TransformerDecoder) -> set[str]:
    return {name for name, weight in network.named_parameters() if isinstance(weight, NF4Tensor)}


# What they share


def test_every_model_has_a_lora_and_a_qlora_config():
    assert set(CONFIGS) <= set(bundled_configs())
    others = {name for name in bundled_configs() if "_persona" in name} - set(CONFIGS)
    assert not others


@each_config
def test_a_models_config_is_phi3_persona_but_for_the_model_and_the_bases_name(config):
    def experiment(name):
        sections = {key: value for key, value in written(name).items() if key not in OF_ITS_OWN}
        base = model_of(name)
        named = {agent.replace(base, "BASE", 1): value for agent, value in sections["agents"].items()}
        return {**sections, "agents": named}, list(sections), list(named)

    assert experiment(config) == experiment("phi3_persona.yaml")


@each_model
def test_a_qlora_config_loads_the_checkpoint_of_its_lora_config(model):
    lora, qlora = written(LORA[model]), written(QLORA[model])
    assert qlora["tokenizer"] == lora["tokenizer"]
    assert qlora["checkpointer"] == lora["checkpointer"]
    assert qlora["checkpointer"]["output_dir"] == "${output_dir}/base"


@each_config
def test_comments_beside_keys_are_those_of_phi3_persona(config):
    def comments(name):
        text = find_config(name).read_text(encoding="utf-8")
        of_others = re.sub(r"(?ms)^(?:model|tokenizer|checkpointer):\n.*?^\n", "", text.partition("\noutput_dir")[2])
        return re.findall(r"(\S+): .*?  # (.*)", of_others)

    assert comments(config) == comments("phi3_persona.yaml")


def test_the_list_of_configs_says_which_model_and_how(capsys):
    list_bundled()
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if "_persona" in line}
    for model, config in QLORA.items():
        name = PUBLISHED[model].hub.partition("/")[2].removeprefix("Meta-").lower().split("-instruct")[0]
        assert name.removesuffix("-4k") in lines[config].lower()
        assert "QLoRA" in lines[config]
        assert "QLoRA" not in lines[LORA[model]]
    assert max(map(len, lines.values())) < 160


# Sizes


@each_config
def test_a_base_has_as_many_weights_as_its_model_card_says(config):
    of_base, _ = n_weights(config)
    assert of_base == pytest.approx(PUBLISHED[model_of(config)].n_parameters, rel=0.01)


@each_model
def test_a_rank_is_the_papers_but_at_most_half_of_k_projs_full_rank(model):
    section = loaded(LORA[model]).model
    keys = full_size(LORA[model]).layers[0].attn.k_proj
    assert section.lora_rank == min(256, keys.out_dim // 2)
    assert list(section.lora_attn_modules) == ["q_proj", "k_proj"]


@each_model
def test_adapters_are_alike_in_size_with_and_without_quantisation_and_a_small_share(model):
    of_base, of_lora = n_weights(LORA[model])
    _, of_qlora = n_weights(QLORA[model])
    assert of_qlora == pytest.approx(of_lora, rel=0.07)
    assert 0.008 < of_lora / of_base < 0.027


@each_config
def test_alpha_and_dropout_are_the_papers(config):
    section = loaded(config).model
    assert (section.lora_alpha, section.lora_dropout) == (32, 0.1)


@each_model
def test_all_linear_layers_of_a_qlora_base_but_the_output_are_in_nf4_and_fill_its_blocks(model):
    network = full_size(QLORA[model])
    linear = {
        f"{name}.weight": module.weight.numel()
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | LoRALinear) and "lora_" not in name and name != "output"
    }
    assert len(linear) == 7 * len(network.layers)
    assert {name for name, n_values in linear.items() if n_values % (64 * 256)} == set()
    assert nf4_names(network) == set(linear)
    assert nf4_names(full_size(LORA[model])) == set()


@each_config
def test_max_seq_len_is_within_the_models_context(config):
    published = PUBLISHED[model_of(config)].hf_config["max_position_embeddings"]
    assert loaded(config).tokenizer.max_seq_len == 4096 <= published == full_size(config).max_seq_len


MODELS_PAGE = (DOCS / "models.md").read_text(encoding="utf-8")
CELLS = {
    cells[0]: cells[1:]
    for line in MODELS_PAGE.splitlines()
    if line.startswith("| `") and (cells := [cell.strip(" `") for cell in line.strip("| ").split("|")])
}


@each_model
def test_the_table_of_models_says_what_each_is(model):
    hub, licence, builder, n_parameters, context = CELLS[model]
    component = loaded(LORA[model]).model["_component_"]
    assert (hub, builder) == (PUBLISHED[model].hub, component.rpartition(".")[2])
    assert ("gated" in licence) == ("--hf-token" in download_command(component, Path("base")))
    assert n_parameters == f"{n_weights(LORA[model])[0] / 1e9:.2f} B"
    assert context == f"{full_size(LORA[model]).max_seq_len:,}"


@each_config
def test_the_table_of_configs_has_their_numbers(config):
    cfg = loaded(config)
    is_fused = model_of(config) == "phi3"
    assert CELLS[config] == [
        f"{size_of_weights(full_size(config)) / 1e9:.2f} GB",
        "q, k" if len(cfg.model.lora_attn_modules) == 2 else "all linear layers",
        str(cfg.model.lora_rank),
        f"{n_weights(config)[1] / 1e6:.1f} M",
        str(cfg.model.lora_rank * (2 if is_fused else 1)),
    ]


def test_the_page_says_what_qwens_tables_of_positions_take():
    models = [model for model in PUBLISHED if model.startswith("qwen")]
    taken = [sum(table.nbytes for table in full_size(LORA[model]).buffers()) / 1e9 for model in models]
    assert "{:.1f}, {:.1f} and {:.1f} GB".format(*taken) in " ".join(MODELS_PAGE.split())


# What is told


@each_config
def test_missing_weights_are_told_in_one_line_with_the_command_that_gets_them(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    published = PUBLISHED[model_of(config)]
    sections = base_sections(loaded(config), None)
    (error,) = missing_base_files(**sections)
    folder = f"checkpoints/{published.hub.partition('/')[2]}"
    assert str(error).startswith(f"{folder}: checkpoint folder not found; get it with `tune download {published.hub} ")
    assert "\n" not in str(error)
    assert download_arguments(str(error), monkeypatch) == {
        "repo_id": published.hub,
        "output_dir": Path(folder),
        "ignore_patterns": "original/consolidated*" if "llama" in published.hub else None,
        "hf_token": "$HF_TOKEN" if "llama" in published.hub else None,
    }


@each_config
def test_a_configs_header_has_the_command_that_gets_its_weights(config, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (error,) = missing_base_files(**base_sections(loaded(config), None))
    header = find_config(config).read_text(encoding="utf-8").partition("\n\n")[0]
    joined = re.sub(r"\\\n#\s+", "", header)
    (line,) = [line for line in joined.splitlines() if "tune download" in line]
    assert shlex.split(line.strip("# "), comments=True) == shlex.split(str(error).split("`")[1])


def download_arguments(line: str, monkeypatch: pytest.MonkeyPatch) -> dict:
    """What `tune` would do for the command between a line's backticks."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    words = shlex.split(line.split("`")[1])
    monkeypatch.setattr("sys.argv", words)
    parsed = vars(TuneCLIParser()._parser.parse_args(words[1:]))
    return {key: parsed[key] for key in ("repo_id", "output_dir", "ignore_patterns", "hf_token")}


@each_config
def test_each_file_that_a_base_lacks_is_told(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = loaded(config)
    folder = Path(cfg.checkpointer.checkpoint_dir)
    folder.mkdir(parents=True)
    told = [str(error).partition(": ")[0] for error in missing_base_files(**base_sections(cfg, None))]
    names = ["config.json", *cfg.checkpointer.checkpoint_files]
    files = [value for key, value in OmegaConf.to_container(cfg.tokenizer).items() if key in ("path", "merges_file")]
    assert told == [*(str(folder / name) for name in names), *files]
