"""Exported adapters give in PEFT, on transformers' model of the same checkpoint, the logits that they give here."""

import json
from pathlib import Path

import peft
import pytest
import torch
from families import FAMILIES, TARGETS, write_checkpoint
from peft_cases import build, hf_logits, hf_model, taken_out_after

from personas_tune.adapters.layouts import read_layout
from personas_tune.adapters.peft_files import PEFT_CONFIG, read_peft, save_peft
from personas_tune.adapters.peft_form import PeftAdapter, to_peft, why_no_peft_form
from personas_tune.adapters.peft_import import from_peft
from personas_tune.errors import AdapterError

CASES = [
    (name, targets)
    for name, family in FAMILIES.items()
    for targets in TARGETS
    if not (family.is_tied and targets == "all_and_output")
]
BIASED = ("qwen2", "qwen2_untied")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Writes a family's checkpoint, once."""
    written: dict[str, Path] = {}

    def write(name):
        if name not in written:
            written[name] = write_checkpoint(name, tmp_path_factory.mktemp(name) / name)
        return written[name]

    return write


def exported(case, folder, **more):
    options = {"alpha": case.shape.alpha, "dropout": 0.0, "base_model": str(case.checkpoint), **more}
    adapter = to_peft(case.weights, case.layout, base_weight=case.base_weight, **options)
    save_peft(folder, adapter, {})
    return adapter


def in_peft(case, folder):
    with taken_out_after(peft.PeftModel.from_pretrained(hf_model(case.checkpoint), folder)) as adapted:
        return hf_logits(adapted.eval())


def assert_same_logits(case, folder):
    ours, theirs = case.logits(case.weights), in_peft(case, folder)
    assert (ours - theirs).abs().max() < 1e-5
    assert (ours - case.logits(case.fresh)).abs().max() > 1  # the adapter matters


def back_again(case, folder):
    lora = {"fresh": case.fresh, "alpha": case.shape.alpha, "where": str(folder)}
    return from_peft(read_peft(folder), case.layout, base_weight=case.base_weight, **lora)


@pytest.mark.parametrize(("name", "targets"), CASES)
def test_lora_gives_the_same_logits_and_comes_back_bit_for_bit(name, targets, checkpoint, tmp_path):
    case = build(name, checkpoint(name), targets)
    exported(case, tmp_path)
    assert_same_logits(case, tmp_path)
    back = back_again(case, tmp_path)
    assert back.keys() == case.weights.keys()
    assert all(torch.equal(back[key], weight) for key, weight in case.weights.items())


@pytest.mark.parametrize(("name", "targets"), [case for case in CASES if case[0] not in BIASED])
def test_dora_gives_the_same_logits_and_comes_back_bit_for_bit(name, targets, checkpoint, tmp_path):
    case = build(name, checkpoint(name), targets, use_dora=True)
    assert exported(case, tmp_path).config["use_dora"]
    assert_same_logits(case, tmp_path)
    back = back_again(case, tmp_path)
    assert all(torch.equal(back[key], weight) for key, weight in case.weights.items())


def test_dora_on_modules_with_biases_can_only_be_merged(checkpoint, tmp_path):
    case = build("qwen2", checkpoint("qwen2"), use_dora=True)
    with pytest.raises(AdapterError, match="scales the biases"):
        exported(case, tmp_path)
    assert exported(case, tmp_path, to_merge=True).config["use_dora"]
    assert (case.logits(case.weights) - in_peft(case, tmp_path)).abs().max() > 0.01  # PEFT's DoRA is another
    with pytest.raises(AdapterError, match="biases"):
        back_again(case, tmp_path)


def test_dora_on_a_part_of_a_fused_projection_needs_the_base(checkpoint):
    case = build("phi3", checkpoint("phi3"), "q_k", use_dora=True)
    assert "needs the base's weights" in why_no_peft_form(case.weights, case.layout)
    assert why_no_peft_form(case.weights, case.layout, case.base_weight) == ""
    whole = build("llama3", checkpoint("llama3"), "q_k", use_dora=True)
    assert why_no_peft_form(whole.weights, whole.layout) == ""


def test_phi_4_has_the_form_of_phi_3(checkpoint):
    assert read_layout("PHI4", checkpoint("phi3")) == read_layout("PHI3_MINI", checkpoint("phi3"))


def test_a_sharded_base_and_one_file_give_the_same_adapter(tmp_path):
    one = build("llama3", write_checkpoint("llama3", tmp_path / "one"), "all")
    several = build("llama3", write_checkpoint("llama3", tmp_path / "several", shard_size="20KB"), "all")
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 2
    exported(one, tmp_path / "a")
    exported(several, tmp_path / "b")
    a, b = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab")
    assert a == b
    assert_same_logits(several, tmp_path / "b")


def test_a_bf16_file_loads_in_peft(checkpoint, tmp_path):
    case = build("phi3", checkpoint("phi3"), "attention")
    case.weights = {key: weight.bfloat16().float() for key, weight in case.weights.items()}
    adapter = exported(case, tmp_path / "fp32")
    halves = {key: weight.bfloat16() for key, weight in adapter.weights.items()}
    save_peft(tmp_path / "bf16", PeftAdapter(halves, adapter.config), {})
    assert_same_logits(case, tmp_path / "bf16")
    back = back_again(case, tmp_path / "bf16")
    assert all(torch.equal(back[key], weight) for key, weight in case.weights.items())


def test_the_config_has_all_keys_that_peft_writes(checkpoint, tmp_path):
    case = build("phi3", checkpoint("phi3"), "all")
    exported(case, tmp_path)
    written = json.loads((tmp_path / PEFT_CONFIG).read_text())
    assert written.keys() == peft.LoraConfig(task_type="CAUSAL_LM").to_dict().keys()
    assert (written["r"], written["rank_pattern"]) == (12, {"gate_up_proj": 8, "o_proj": 4, "down_proj": 4})
    assert (written["lora_alpha"], written["alpha_pattern"]) == (
        48,
        {"gate_up_proj": 32, "o_proj": 16, "down_proj": 16},
    )


def test_equal_adapters_give_equal_bytes_whatever_is_said_of_them(checkpoint, tmp_path):
    case = build("phi3", checkpoint("phi3"))
    adapter = to_peft(case.weights, case.layout, alpha=16, dropout=0.0, base_model="x")
    about = {"base_weights": ["a"], "note": "Aké"}
    files = set()
    for number in range(8):
        save_peft(tmp_path / str(number), adapter, about)
        files.add((tmp_path / str(number) / "adapter_model.safetensors").read_bytes())
    assert len(files) == 1
    assert read_peft(tmp_path / "0").about == about
