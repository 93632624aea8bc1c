from pathlib import Path

import pytest
import torch
from tiny import base_sections

from personas_tune.adapters.base_model import load_base
from personas_tune.adapters.files import (
    NATIVE_FILE,
    load_native,
    lora_shape,
    save_adapter,
    save_native,
)
from personas_tune.errors import CheckpointError, MissingInputError

TARGETS = [
    {"lora_attn_modules": ["q_proj", "k_proj"]},
    {"lora_attn_modules": ["v_proj"]},
    {"lora_attn_modules": ["q_proj", "v_proj", "output_proj"], "apply_lora_to_mlp": True, "apply_lora_to_output": True},
]


@pytest.mark.parametrize("targets", TARGETS, ids=["qk", "v", "all"])
def test_peft_gives_our_logits(tiny_checkpoint: Path, tmp_path: Path, targets) -> None:
    peft = pytest.importorskip("peft", reason="the peft extra is not installed")
    from transformers import Phi3Config, Phi3ForCausalLM

    base = load_base(**base_sections(tiny_checkpoint, **targets), device="cpu", dtype="fp32")
    adapter = base.bank.add_new("a", seed=0)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for weight in adapter.masters.values():
            weight.normal_(std=0.3, generator=generator)
    files = save_adapter(
        tmp_path, adapter.state_dict(), lora_shape(base.model), model_type="PHI3_MINI", base_model=str(tiny_checkpoint)
    )
    assert files == [NATIVE_FILE, "adapter_model.safetensors", "adapter_config.json"]
    tokens = torch.randint(20, 380, (2, 17), generator=generator)
    base.model.eval()
    with torch.no_grad(), base.bank.use("a"):
        ours = base.model(tokens)
    network = Phi3ForCausalLM.from_pretrained(
        tiny_checkpoint, config=Phi3Config.from_pretrained(tiny_checkpoint), dtype=torch.float32
    )
    with torch.no_grad():
        plain = network(tokens).logits
        theirs = peft.PeftModel.from_pretrained(network, tmp_path).eval()(tokens).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    assert (plain - ours).abs().max() > 0.1  # the adapter matters


def test_native_files_load_back_bit_for_bit(load_tiny, tmp_path: Path) -> None:
    weights = load_tiny().bank.add_new("a", seed=0).state_dict()
    save_native(tmp_path / NATIVE_FILE, weights, {"rank": "4"})
    loaded = load_native(tmp_path)
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[key], weight) for key, weight in weights.items())


def test_a_missing_and_a_truncated_adapter_are_one_line_each(load_tiny, tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="tune run persona_lora"):
        load_native(tmp_path)
    save_native(tmp_path / NATIVE_FILE, load_tiny().bank.add_new("a", seed=0).state_dict(), {})
    whole = (tmp_path / NATIVE_FILE).read_bytes()
    (tmp_path / NATIVE_FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="train it again"):
        load_native(tmp_path)


def test_other_models_and_dora_keep_the_native_file_only(tiny_checkpoint: Path, tmp_path: Path) -> None:
    base = load_base(**base_sections(tiny_checkpoint, use_dora=True), device="cpu", dtype="fp32")
    weights = base.bank.add_new("a", seed=0).state_dict()
    files = save_adapter(tmp_path, weights, lora_shape(base.model), model_type="PHI3_MINI", base_model="x")
    assert files == [NATIVE_FILE]
    plain = load_base(**base_sections(tiny_checkpoint), device="cpu", dtype="fp32")
    weights = plain.bank.add_new("a", seed=0).state_dict()
    assert save_adapter(tmp_path, weights, lora_shape(plain.model), model_type="LLAMA3", base_model="x") == [
        NATIVE_FILE
    ]
