from pathlib import Path

import pytest
import torch
from tiny import base_sections

from personas_tune.adapters.base_model import load_base
from personas_tune.adapters.files import (
    NATIVE_FILE,
    load_about,
    load_native,
    lora_shape,
    record_base,
    save_adapter,
    save_in_set,
    save_native,
)
from personas_tune.adapters.peft_files import PEFT_CONFIG, PEFT_WEIGHTS, read_peft
from personas_tune.adapters.selection import read_assignment, write_assignment
from personas_tune.errors import CheckpointError, MissingInputError
from personas_tune.workspace import open_stage, read_json, sha256_of_file


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


def test_the_native_file_says_what_it_was_trained_with(tiny_checkpoint: Path, tmp_path: Path) -> None:
    base = load_base(**base_sections(tiny_checkpoint, lora_dropout=0.25), device="cpu", dtype="fp32")
    weights = base.bank.add_new("a", seed=0).state_dict()
    record = record_base("PHI3_MINI", tiny_checkpoint, [tiny_checkpoint / "model.safetensors"])
    assert save_adapter(tmp_path, weights, lora_shape(base.model), record) == [NATIVE_FILE, PEFT_WEIGHTS, PEFT_CONFIG]
    sha256 = sha256_of_file(tiny_checkpoint / "model.safetensors")
    assert load_about(tmp_path) == {"rank": 4, "alpha": 8, "dropout": 0.25, "base_weights": [sha256]}
    config = read_peft(tmp_path).config
    assert (config["lora_dropout"], config["base_model_name_or_path"]) == (0.25, str(tiny_checkpoint))


def test_a_set_holds_each_adapter_with_its_record_and_who_it_is_for(load_tiny, tiny_checkpoint, tmp_path: Path) -> None:
    base = load_tiny()
    weights = base.bank.add_new("a", seed=0).state_dict()
    of_base = {"shape": lora_shape(base.model), "base": record_base("PHI3_MINI", tiny_checkpoint, [])}
    with open_stage(tmp_path / "set", {}, [], seed=0) as stage:
        save_in_set(stage, "0", weights, **of_base, rows=3, steps=2, validation_losses=[0.5])
        save_in_set(stage, "1", weights, **of_base, imported_from="there")
        write_assignment(stage, {"ann": "0", "bob": "1"})
    assert read_json(tmp_path / "set" / "0" / "training.json") == {"rows": 3, "steps": 2, "validation_losses": [0.5]}
    assert read_json(tmp_path / "set" / "1" / "training.json")["imported_from"] == "there"
    assert {path.name for path in (tmp_path / "set" / "1").iterdir()} == {
        NATIVE_FILE, PEFT_CONFIG, PEFT_WEIGHTS, "training.json",
    }  # fmt: skip
    assert read_assignment(tmp_path / "set", "x") == {"ann": "x/0", "bob": "x/1"}


def test_an_older_native_file_says_less(tmp_path: Path) -> None:
    save_native(tmp_path / NATIVE_FILE, {"a": torch.ones(1)}, {"rank": 4, "alpha": 8})
    assert load_about(tmp_path) == {"rank": 4, "alpha": 8}
    with pytest.raises(MissingInputError, match="tune run persona_lora"):
        load_about(tmp_path / "gone")


def test_an_adapter_without_an_exact_form_keeps_the_native_file_only(tiny_checkpoint: Path, tmp_path: Path) -> None:
    record = record_base("PHI3_MINI", tiny_checkpoint, [])
    dora = load_base(**base_sections(tiny_checkpoint, use_dora=True), device="cpu", dtype="fp32")
    weights = dora.bank.add_new("a", seed=0).state_dict()
    assert save_adapter(tmp_path, weights, lora_shape(dora.model), record) == [NATIVE_FILE]
    plain = load_base(**base_sections(tiny_checkpoint), device="cpu", dtype="fp32")
    weights = plain.bank.add_new("a", seed=0).state_dict()
    unknown = record_base("T5_ENCODER", tiny_checkpoint, [])
    assert unknown.layout is None
    assert save_adapter(tmp_path, weights, lora_shape(plain.model), unknown) == [NATIVE_FILE]
    of_others = {name.replace("layers", "decoder.layers"): weight for name, weight in weights.items()}
    assert save_adapter(tmp_path, of_others, lora_shape(plain.model), record) == [NATIVE_FILE]


def test_dora_on_whole_projections_has_a_peft_form(tiny_checkpoint: Path, tmp_path: Path) -> None:
    targets = {"lora_attn_modules": ["q_proj", "k_proj", "v_proj"], "use_dora": True}
    base = load_base(**base_sections(tiny_checkpoint, **targets), device="cpu", dtype="fp32")
    weights = base.bank.add_new("a", seed=0).state_dict()
    record = record_base("PHI3_MINI", tiny_checkpoint, [])
    assert PEFT_WEIGHTS in save_adapter(tmp_path, weights, lora_shape(base.model), record)
