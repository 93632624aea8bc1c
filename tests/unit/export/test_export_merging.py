"""Merged checkpoints: what transformers computes with them, and what of the base they keep."""

import hashlib
import json

import pytest
import torch
from adapted import Adapted, adapt, assert_same_logits, logits_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from personas_tune.adapters.base_weights import weight_files, weight_reader
from personas_tune.errors import CheckpointError
from personas_tune.export.forms import convert
from personas_tune.export.merging import INDEX, merge_checkpoint


def merge(adapted: Adapted, folder, dtype=None, files=None):
    files = files or adapted.base_files
    folder.mkdir(parents=True)
    converted = convert(
        adapted.adapter, adapted.layout, base_name="base", base_weight=weight_reader(files), to_merge=True
    )
    return merge_checkpoint(folder, files, converted.peft, dtype=dtype, is_tied=adapted.layout.tied)


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def from_pretrained(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


@pytest.mark.parametrize(
    ("name", "targets", "shard_size", "model"),
    [
        ("phi3", "q_k", "20KB", {}),
        ("phi3", "all_and_output", "5GB", {}),
        ("phi3", "q_k", "20KB", {"use_dora": True}),
        ("phi3", "all", "5GB", {"use_dora": True}),
        ("llama3", "all_and_output", "20KB", {}),
        ("llama3_2", "all", "20KB", {}),
        ("llama3_2", "all", "5GB", {"use_dora": True}),
        ("qwen2", "all", "5GB", {}),
        ("qwen2", "q_k", "20KB", {"use_dora": True}),
        ("mistral", "attention", "5GB", {}),
        ("gemma", "all", "20KB", {}),
        ("gemma", "q_k", "5GB", {"use_dora": True}),
    ],
)
def test_transformers_computes_our_logits_with_the_merged_checkpoint(name, targets, shard_size, model, tmp_path):
    adapted = adapt(name, tmp_path, targets, shard_size=shard_size, **model)
    before = hashes(adapted.base)
    merge(adapted, tmp_path / "merged")
    ours = adapted.logits()
    theirs = logits_of(from_pretrained(tmp_path / "merged", dtype=torch.float32))
    base = logits_of(from_pretrained(adapted.base, dtype=torch.float32))
    assert (ours - base).abs().max() > 0.5
    assert_same_logits(theirs, ours)
    assert hashes(adapted.base) == before
    assert len(adapted.base_files) > 1 if shard_size == "20KB" else len(adapted.base_files) == 1


@pytest.mark.parametrize("name", ["llama3_2", "phi3"])
def test_shards_index_and_files_are_the_bases(name, tmp_path):
    adapted = adapt(name, tmp_path, shard_size="20KB")
    (adapted.base / "tokenizer.model").write_bytes(b"pieces")
    (adapted.base / "LICENSE").write_text("terms")
    (adapted.base / "README.md").write_text("the base's own card")
    (adapted.base / ".cache").write_text("hidden")
    (adapted.base / "adapter_config.json").write_text("{}")  # would be loaded in the place of the model
    (adapted.base / "notes.txt").write_text("my own")
    (adapted.base / "additional_chat_templates").mkdir()
    (adapted.base / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    (adapted.base / "original").mkdir()
    (adapted.base / "original" / "consolidated.00.pth").write_bytes(b"no")
    written = merge(adapted, tmp_path / "merged")
    merged = tmp_path / "merged"
    assert sorted(written) == sorted(str(path.relative_to(merged)) for path in merged.rglob("*") if path.is_file())
    left_out = {"README.md", ".cache", "original", "adapter_config.json", "notes.txt"}
    assert {path.name for path in merged.iterdir()} == {path.name for path in adapted.base.iterdir()} - left_out
    assert json.loads((merged / INDEX).read_text()) == json.loads((adapted.base / INDEX).read_text())
    assert (merged / "config.json").read_bytes() == (adapted.base / "config.json").read_bytes()
    places = json.loads((merged / INDEX).read_text())["weight_map"]
    assert ("lm_head.weight" in places) == (name == "phi3")
    for path in adapted.base_files:
        with safe_open(merged / path.name, framework="pt") as stream:
            assert stream.metadata() == {"format": "pt"}
        old, new = load_file(path), load_file(merged / path.name)
        assert old.keys() == new.keys()
        changed = {name for name in old if not torch.equal(old[name], new[name])}
        assert all("self_attn.q" in name or "self_attn.k" in name for name in changed)
    assert from_pretrained(merged).config.tie_word_embeddings == (name == "llama3_2")


def test_merging_again_gives_the_same_bytes(tmp_path):
    adapted = adapt("phi3", tmp_path, shard_size="20KB")
    merge(adapted, tmp_path / "one")
    merge(adapted, tmp_path / "two")
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")


def test_a_bin_checkpoint_is_merged_into_safetensors_and_stays_tied(tmp_path):
    adapted = adapt("llama3_2", tmp_path, "all")
    weights = load_file(adapted.base / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]  # as old checkpoints have it
    torch.save(weights, adapted.base / "pytorch_model.bin")
    (adapted.base / "model.safetensors").unlink()
    written = merge(adapted, tmp_path / "merged")
    assert "model.safetensors" in written
    assert "lm_head.weight" not in load_file(tmp_path / "merged" / "model.safetensors")
    theirs = logits_of(from_pretrained(tmp_path / "merged", dtype=torch.float32))
    assert_same_logits(theirs, adapted.logits())


def test_a_chosen_dtype_is_every_weights_and_the_configs(tmp_path):
    adapted = adapt("qwen2", tmp_path, "all")
    merge(adapted, tmp_path / "fp32")
    merge(adapted, tmp_path / "bf16", torch.bfloat16)
    full, half = (load_file(tmp_path / name / "model.safetensors") for name in ("fp32", "bf16"))
    assert all(torch.equal(half[name], full[name].bfloat16()) for name in full)  # rounded once, from fp32
    model = from_pretrained(tmp_path / "bf16")
    assert model.dtype == torch.bfloat16
    assert (logits_of(model).float() - adapted.logits()).abs().max() < 1


def test_a_bf16_base_is_added_to_in_fp32_and_stays_bf16(tmp_path):
    adapted = adapt("llama3", tmp_path)
    model = from_pretrained(adapted.base, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    files = [tmp_path / "half" / "model.safetensors"]
    merge(adapted, tmp_path / "merged", files=files)
    old, new = load_file(files[0]), load_file(tmp_path / "merged" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    weights = convert(adapted.adapter, adapted.layout, base_name="b").peft.weights
    a, b = (weights[f"base_model.model.{name.removesuffix('weight')}lora_{x}.weight"] for x in "AB")
    assert torch.equal(new[name], (old[name].float() + 4.0 * (b @ a)).bfloat16())
    assert {weight.dtype for weight in new.values()} == {torch.bfloat16}


def test_a_value_that_a_dtype_cannot_hold_is_refused(tmp_path):
    adapted = adapt("llama3", tmp_path)
    file = adapted.base / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][0] = 1e6
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: values that float16 can't hold; set export"):
        merge(adapted, tmp_path / "merged", torch.float16)


def test_another_base_is_refused(tmp_path):
    adapted = adapt("llama3", tmp_path)
    other = adapt("phi3", tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"the base has no weight model\.layers\.0\.self_attn\.._proj\.weight"):
        merge(adapted, tmp_path / "merged", files=other.base_files)
    narrow = adapt("mistral", tmp_path / "narrow")
    weights = load_file(narrow.base / "model.safetensors")
    key = "model.layers.0.self_attn.q_proj.weight"
    save_file({**weights, key: weights[key][:, :-1].contiguous()}, narrow.base / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"q_proj\.weight: the base's weight is 32 x 31, the adapter's 32 x 32; export"
    ):
        merge(narrow, tmp_path / "too")


@pytest.mark.parametrize(("name", "content"), [("a.safetensors", b"x" * 64), ("a.bin", b"\x80\x04no tensors.")])
def test_damaged_base_files_are_told_in_a_line(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"weights can't be read \(.+\); download or make the base again"):
        weight_reader([tmp_path / name])("model.norm.weight")


def test_a_bin_file_that_runs_code_runs_none(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "made"), "w"))

    torch.save({"weight": Evil()}, tmp_path / "a.bin")
    with pytest.raises(CheckpointError, match="weights can't be read"):
        weight_reader([tmp_path / "a.bin"])("weight")
    assert not (tmp_path / "made").exists()


def test_checkpoints_of_other_formats_have_no_weights_to_merge(tmp_path):
    with pytest.raises(CheckpointError, match="no weights in Hugging Face's form"):
        weight_files([tmp_path / "consolidated.00.pth"])
