import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TINY, base_sections

from personas_tune.adapters import base_model
from personas_tune.adapters.base_model import checkpoint_inputs, download_command, load_base, missing_base_files
from personas_tune.config import base_sections as sections_of
from personas_tune.config import load_experiment
from personas_tune.errors import CheckpointError, ConfigError, PersonasTuneError


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path):
    """A copy of the tiny base, to be damaged."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "base"))


def load(sections, **more):
    return load_base(**sections, **{"device": "cpu", "dtype": "fp32", **more})


def refusal(sections, **more):
    with pytest.raises(PersonasTuneError) as caught:
        load(sections, **more)
    (line,) = caught.value.lines
    return line


def shard(checkpoint):
    """Replace the one file of weights by two."""
    weights = load_file(checkpoint / "model.safetensors")
    names = sorted(weights)
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        save_file({name: weights[name] for name in part}, checkpoint / f"model-0000{number}-of-00002.safetensors")
    (checkpoint / "model.safetensors").unlink()


# What must be there


def test_what_phi3_lacks_is_named_with_the_command_that_gets_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sections = sections_of(load_experiment("phi3_persona.yaml"), None)
    folder = "checkpoints/Phi-3-mini-4k-instruct"
    command = f"`tune download microsoft/Phi-3-mini-4k-instruct --output-dir {folder}`"
    (error,) = missing_base_files(**sections)
    assert str(error).startswith(f"{folder}: checkpoint folder not found; get it with {command}")
    Path(folder).mkdir(parents=True)
    (Path(folder) / "config.json").write_text("{}", encoding="utf-8")
    lines = [str(error) for error in missing_base_files(**sections)]
    assert [line.partition(": ")[0] for line in lines] == [
        f"{folder}/model-00001-of-00002.safetensors",
        f"{folder}/model-00002-of-00002.safetensors",
        f"{folder}/tokenizer.model",
    ]
    assert all(command in line for line in lines)


def test_a_tokenizer_elsewhere_is_missed_beside_the_folder(tmp_path):
    sections = base_sections(tmp_path / "gone")
    sections["tokenizer"]["path"] = "tok/tokenizer.model"
    lines = [str(error) for error in missing_base_files(**sections)]
    assert [line.partition(": ")[0] for line in lines] == [str(tmp_path / "gone"), "tok/tokenizer.model"]


def test_the_inputs_are_every_file_that_the_base_is_made_of(checkpoint):
    names = {path.name for path in checkpoint_inputs(**base_sections(checkpoint))}
    assert names == {"config.json", "model.safetensors", "tokenizer.model", "special_tokens.json"}


def test_formats_without_config_json_need_none(checkpoint):
    sections = base_sections(checkpoint)
    sections["checkpointer"]["_component_"] = "torchtune.training.FullModelTorchTuneCheckpointer"
    (checkpoint / "config.json").unlink()
    assert missing_base_files(**sections) == []


@pytest.mark.parametrize(
    ("component", "repository"),
    [
        ("torchtune.models.phi3.lora_phi3_mini", "microsoft/Phi-3-mini-4k-instruct"),
        ("torchtune.models.phi3.qlora_phi3_mini", "microsoft/Phi-3-mini-4k-instruct"),
        ("torchtune.models.qwen2_5.lora_qwen2_5_0_5b", "Qwen/Qwen2.5-0.5B-Instruct"),
        ("torchtune.models.qwen2_5.lora_qwen2_5_1_5b_base", "REPOSITORY"),
        ("my.own.builder", "REPOSITORY"),
    ],
)
def test_the_download_command_knows_the_models_that_are_used_most(component, repository):
    assert download_command(component, Path("a b")) == f"tune download {repository} --output-dir 'a b'"


# Loading


def test_the_base_is_frozen_and_its_adapters_change_nothing_at_first(load_tiny):
    base = load_tiny()
    trainable = {name for name, weight in base.model.named_parameters() if weight.requires_grad}
    assert trainable
    assert all("lora" in name for name in trainable)
    assert base.bank.names == []
    assert (base.model_type, base.max_seq_len) == ("PHI3_MINI", TINY["max_seq_len"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_logits_equal_those_of_transformers(load_tiny, tiny_checkpoint):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Phi3ForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    theirs.eval()
    ours = load_tiny().model.eval()
    tokens = torch.randint(3, TINY["vocab_size"], (2, 37), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens, use_cache=False).logits, atol=2e-5, rtol=2e-5)


def test_a_checkpoint_in_shards_gives_the_same_weights_in_both_ways_of_naming_them(checkpoint, load_tiny):
    whole = load_tiny().model.state_dict()
    shard(checkpoint)
    listed = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    formatted = {"filename_format": "model-{}-of-{}.safetensors", "max_filename": "00002"}
    for files in (listed, formatted):
        sections = base_sections(checkpoint)
        sections["checkpointer"]["checkpoint_files"] = files
        names = [path.name for path in checkpoint_inputs(**sections)]
        assert names == ["config.json", *listed, "tokenizer.model", "special_tokens.json"]
        loaded = load(sections).model.state_dict()
        assert all(torch.equal(loaded[name], whole[name]) for name in whole if "lora" not in name)


def test_a_shard_that_is_missing_is_named(checkpoint):
    shard(checkpoint)
    (checkpoint / "model-00002-of-00002.safetensors").unlink()
    sections = base_sections(checkpoint)
    sections["checkpointer"]["checkpoint_files"] = {
        "filename_format": "model-{}-of-{}.safetensors",
        "max_filename": "00002",
    }
    assert refusal(sections).startswith(f"{checkpoint}/model-00002-of-00002.safetensors: file not found; get it with")


@pytest.mark.parametrize(
    "files",
    [
        {"max_filename": "2"},
        {"filename_format": "m-{}-{}-{}", "max_filename": "2"},
        {"filename_format": "m-{}-{}", "max_filename": "two"},
        "model.safetensors",
        5,
    ],
)
def test_files_that_are_neither_list_nor_pattern_are_refused(checkpoint, files):
    sections = base_sections(checkpoint)
    sections["checkpointer"]["checkpoint_files"] = files
    assert refusal(sections).startswith("checkpointer.checkpoint_files: neither a list of files nor a pattern")


def test_loading_writes_nothing(checkpoint, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    load(base_sections(checkpoint))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_bf16_is_the_models_type(tiny_checkpoint):
    base = load(base_sections(tiny_checkpoint), dtype="bf16")
    assert {weight.dtype for weight in base.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(("wanted", "budget"), [(100, 100), (None, 1024), (5000, 1024)])
def test_prompts_may_be_as_long_as_tokenizer_and_model_both_allow(tiny_checkpoint, wanted, budget):
    sections = base_sections(tiny_checkpoint)
    sections["tokenizer"]["max_seq_len"] = wanted
    assert load(sections).tokenizer.max_seq_len == budget


# What doesn't fit


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"embed_dim": 64}, "does not fit the model ("),
        (
            {"vocab_size": 500},
            "torch.Size([400, 32]) from checkpoint, the shape in current model is torch.Size([500, 32])",
        ),
        ({"num_layers": 3}, "(it lacks layers.2."),
        ({"num_layers": 1}, "(it has layers.1."),
        ({"num_kv_heads": 4}, "does not fit the model ("),
        ({"num_heads": 8, "num_kv_heads": 4}, "(num_attention_heads 4, model.num_heads 8)"),
    ],
)
def test_a_model_of_other_sizes_is_refused(tiny_checkpoint, change, told):
    line = refusal(base_sections(tiny_checkpoint, **change))
    assert line.startswith(f"{tiny_checkpoint}: checkpoint does not fit the model")
    assert told in line
    assert line.endswith("; match the model section to config.json")


@pytest.mark.parametrize("damage", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"\x00" * 64])
def test_weights_that_are_none_are_refused(checkpoint, damage):
    (checkpoint / "model.safetensors").write_bytes(damage)
    line = refusal(base_sections(checkpoint))
    assert line.startswith(f"{checkpoint}: checkpoint can't be read (")
    assert "model.safetensors" in line


def test_weights_of_another_architecture_are_refused(checkpoint):
    sections = base_sections(checkpoint)
    sections["checkpointer"]["model_type"] = "LLAMA3"
    assert "check checkpointer.model_type" in refusal(sections)


def test_a_config_json_without_heads_is_refused(checkpoint):
    described = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    del described["num_attention_heads"]
    (checkpoint / "config.json").write_text(json.dumps(described), encoding="utf-8")
    assert "(no 'num_attention_heads')" in refusal(base_sections(checkpoint))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tiny_checkpoint):
    sections = base_sections(tiny_checkpoint)
    del sections["tokenizer"]["special_tokens_path"]  # then Phi-3's own ids, 32000 and above
    line = refusal(sections)
    assert line.startswith(f"{tiny_checkpoint}/tokenizer.model: the tokenizer writes token 32")
    assert "the model knows 400 tokens" in line


@pytest.mark.parametrize(
    ("section", "change", "told"),
    [
        ("tokenizer", {"path": None}, "tokenizer: torchtune.models.phi3.phi3_mini_tokenizer failed ("),
        ("tokenizer", {"max_seq_len": "long"}, "tokenizer: torchtune.models.phi3.phi3_mini_tokenizer is no usable"),
        ("checkpointer", {"checkpoint_dir": None}, "checkpointer: checkpoint_dir is None; set it to the folder"),
        ("checkpointer", {"model_type": "PHI99"}, "checkpointer: torchtune.training.FullModelHFCheckpointer failed ("),
        ("model", {"lora_rank": 0}, "model: torchtune.models.phi3.lora_phi3 failed ("),
        ("model", {"num_heads": 5}, "model: torchtune.models.phi3.lora_phi3 failed ("),
        ("model", {"lora_attn_modules": []}, "model: torchtune.models.phi3.lora_phi3 failed (Must pass one or more"),
        ("model", {"lora_attn_modules": ["q_prj"]}, "model: the model has no adapter parameters; use a lora_* builder"),
    ],
)
def test_a_value_that_a_component_does_not_take_is_told_by_its_section(tiny_checkpoint, section, change, told):
    sections = base_sections(tiny_checkpoint)
    sections[section].update(change)
    assert refusal(sections).startswith(told)


@pytest.mark.parametrize("device", ["gpu", "mps", "cuda:x", "meta"])
def test_a_device_that_is_unknown_or_untried_is_refused(tiny_checkpoint, device):
    assert refusal(base_sections(tiny_checkpoint), device=device).endswith("; use cpu or cuda")


def test_a_gpu_that_is_not_there_is_refused(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = refusal(base_sections(tiny_checkpoint), device="cuda:0")
    assert line == "device: no CUDA device on this machine; set device=cpu dtype=fp32"


def test_errors_belong_to_the_kinds_that_a_caller_may_tell_apart(checkpoint):
    with pytest.raises(ConfigError):
        load(base_sections(checkpoint), device="gpu")
    with pytest.raises(CheckpointError):
        load(base_sections(checkpoint, num_layers=3))
    assert base_model.TOKENIZER_FILES[0] == "path"
