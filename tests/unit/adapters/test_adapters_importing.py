"""PEFT folders come into a bank, or leave it as it was."""

import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import base_sections

from personas_tune.adapters.base_model import load_base
from personas_tune.adapters.files import lora_shape, record_base, save_adapter
from personas_tune.adapters.importing import check_imports, import_peft
from personas_tune.adapters.peft_files import PEFT_WEIGHTS
from personas_tune.errors import AdapterError, CheckpointError


def load(checkpoint, **model):
    return load_base(**base_sections(checkpoint, **model), device="cpu", dtype="fp32")


def problems(folder, sections):
    """Why a folder can't be imported, as the config's check tells it."""
    return [str(error) for error in check_imports(str(folder), ["all"], "all", **sections, where="peft")]


def random_masters(base, name):
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for weight in base.bank.add_new(name, seed=0).masters.values():
            weight.normal_(std=0.3, generator=generator)
    return base.bank[name].state_dict()


@pytest.fixture
def exported(tiny_checkpoint, tmp_path):
    """A trained adapter's folder, and its weights."""
    base = load(tiny_checkpoint)
    weights = random_masters(base, "a")
    record = record_base(base.model_type, tiny_checkpoint, [tiny_checkpoint / "model.safetensors"])
    save_adapter(tmp_path / "a", weights, lora_shape(base.model), record)
    return tmp_path / "a", weights


def test_an_imported_adapter_is_one_of_the_bank(exported, tiny_checkpoint):
    folder, weights = exported
    base = load(tiny_checkpoint)
    adapter = import_peft(base, "mine", folder)
    assert base.bank.names == ["mine"]
    assert all(torch.equal(adapter.state_dict()[name], weight) for name, weight in weights.items())


def test_a_larger_model_has_room_for_it_and_says_the_same(exported, tiny_checkpoint):
    folder, weights = exported
    small, large = load(tiny_checkpoint), load(tiny_checkpoint, lora_rank=6, lora_alpha=5, apply_lora_to_mlp=True)
    small.bank.add_loaded("a", weights, where="x")
    import_peft(large, "a", folder)
    tokens = torch.randint(20, 380, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), small.bank.use("a"), large.bank.use("a"):
        torch.testing.assert_close(large.model.eval()(tokens), small.model.eval()(tokens), rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_leaves_the_bank_as_it_was(exported, tiny_checkpoint):
    folder, _ = exported
    base = load(tiny_checkpoint, lora_attn_modules=["v_proj"])
    with pytest.raises(AdapterError, match=r"add k_proj, q_proj to model.lora_attn_modules"):
        import_peft(base, "mine", folder)
    assert base.bank.names == []


def test_an_import_is_checked_without_the_bases_weights(exported, tiny_checkpoint):
    folder, _ = exported
    sections = base_sections(tiny_checkpoint)
    assert problems(folder, sections) == []
    (problem,) = problems(folder, {**sections, "model": {**sections["model"], "lora_rank": 3}})
    assert "set model.lora_rank=4" in problem


def test_what_is_wrong_with_the_base_is_told_once_for_all_folders(exported, tiny_checkpoint, tmp_path):
    folder, _ = exported
    for name in ("0", "1"):
        shutil.copytree(folder, tmp_path / "set" / name)
    sections = base_sections(tiny_checkpoint, embed_dim=64)
    (problem,) = check_imports(str(tmp_path / "set"), ["1", "0", "1"], "persona", **sections, where="peft")
    assert "which no module of the base has" in str(problem)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_a_line(exported, tiny_checkpoint):
    folder, _ = exported
    folder.chmod(0)
    try:
        (problem,) = problems(folder, base_sections(tiny_checkpoint))
        with pytest.raises(CheckpointError, match=r"can't be read \(Permission denied\)"):
            import_peft(load(tiny_checkpoint), "a", folder)
    finally:
        folder.chmod(0o755)
    assert "can't be read (Permission denied)" in problem


def test_our_own_export_is_refused_on_another_base_of_the_same_shape(exported, tiny_checkpoint, tmp_path):
    folder, _ = exported
    other = shutil.copytree(tiny_checkpoint, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file({name: weight + 1 for name, weight in weights.items()}, other / "model.safetensors")
    with pytest.raises(AdapterError, match="a base with other weight files than those in"):
        import_peft(load(other), "a", folder)
    save_file(load_file(folder / PEFT_WEIGHTS), folder / PEFT_WEIGHTS)  # as PEFT saves it: it says nothing of bytes
    import_peft(load(other), "a", folder)


@pytest.mark.parametrize("about", ['{"base_weights": [[1]]}', '{"base_weights": ["../x"]}'])
def test_nonsense_about_the_base_is_another_base(about, exported, tiny_checkpoint):
    folder, _ = exported
    save_file(load_file(folder / PEFT_WEIGHTS), folder / PEFT_WEIGHTS, metadata={"about": about})
    with pytest.raises(AdapterError, match="other weight files"):
        import_peft(load(tiny_checkpoint), "a", folder)


def test_a_base_without_a_known_form_is_refused(exported, tiny_checkpoint):
    sections = base_sections(tiny_checkpoint)
    sections["checkpointer"] = {**sections["checkpointer"], "model_type": "GEMMA2"}
    (problem,) = problems(exported[0], sections)
    assert "no PEFT form is known for 'GEMMA2'" in problem


def test_a_model_of_other_sizes_than_the_base_is_refused(exported, tiny_checkpoint):
    sections = base_sections(tiny_checkpoint, embed_dim=64)
    (problem,) = problems(exported[0], sections)
    assert "has 64 inputs and 64 outputs, which no module of the base has" in problem


@pytest.mark.parametrize("config", ["{}", "[]", '{"num_attention_heads": "4"}', '{"hidden_size": -1}'])
def test_a_base_whose_config_says_no_sizes_is_refused(config, exported, tiny_checkpoint, tmp_path):
    base = shutil.copytree(tiny_checkpoint, tmp_path / "base")
    (base / "config.json").write_text(config)
    (problem,) = problems(exported[0], base_sections(base))
    assert "the model's sizes can't be read" in problem
