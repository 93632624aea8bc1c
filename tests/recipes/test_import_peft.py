"""PEFT adapters come into an experiment through the real recipe: as sets of their own, and as where others begin."""

import json
import shutil
import struct
from pathlib import Path

import peft
import pytest
import torch
import transformers
from pipelines import read, rows, run_recipe, stage_folders
from safetensors.torch import load_file, save_file

from personas_tune.adapters.files import NATIVE_FILE
from personas_tune.adapters.peft_files import PEFT_CONFIG, PEFT_WEIGHTS
from personas_tune.workspace import MANIFEST, sha256_of_file


@pytest.fixture
def root(csv_run, tmp_path):
    """A copy of a finished run, whose trained adapters are there to be imported."""
    return Path(shutil.copytree(csv_run.root, tmp_path / "run"))


def ran(csv_run, root, *overrides, recipe="persona_lora"):
    outcome = run_recipe(recipe, csv_run.config, f"output_dir={root}", *overrides)
    assert outcome.status == 0, outcome.err
    return outcome


def native(root, adapter_set, adapter):
    return load_file(root / "adapters" / adapter_set / adapter / NATIVE_FILE)


def assert_same_weights(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(theirs[name], weight) for name, weight in ours.items())


def test_imported_adapters_are_those_that_were_exported_and_are_measured_alike(csv_run, root):
    again = f"adapter_sets.again={{per: persona, peft: {root}/adapters/persona}}"
    outcome = ran(csv_run, root, again)
    assert "adapters/again: imported" in outcome.out
    folder = root / "adapters" / "again"
    for adapter in ("0", "1"):
        assert_same_weights(native(root, "persona", adapter), native(root, "again", adapter))
        for file in (NATIVE_FILE, PEFT_WEIGHTS, PEFT_CONFIG):
            assert (folder / adapter / file).read_bytes() == (root / "adapters/persona" / adapter / file).read_bytes()
        trained = json.loads((folder / adapter / "training.json").read_text())
        assert trained["imported_from"] == str(root / "adapters" / "persona" / adapter)
    assert read(root, "adapters/again/assignment").equals(read(root, "adapters/persona/assignment"))
    assert not (folder / "losses.parquet").exists()
    inputs = json.loads((folder / MANIFEST).read_text())["inputs"]
    for file in (PEFT_WEIGHTS, PEFT_CONFIG):
        path = root / "adapters" / "persona" / "1" / file
        assert inputs[str(path)] == sha256_of_file(path)
    before = stage_folders(root)
    assert "adapters/again is up to date" in ran(csv_run, root, again).out
    assert stage_folders(root) == before
    agents = ("~agents.single", "~agents.base", "~agents.persona_generate", "agents.again={adapters: again}")
    mended = "agents.mended={adapters: again, calibrate: true}"
    outcome = ran(csv_run, root, again, *agents, mended, recipe="persona_eval")
    assert "warning" not in outcome.out  # nothing here trained it on the rows that it is calibrated on
    assert rows(root, "eval/predictions_again") == rows(root, "eval/predictions_persona")


def test_changed_files_are_imported_again(csv_run, root, tmp_path):
    elsewhere = Path(shutil.copytree(root / "adapters" / "single" / "all", tmp_path / "elsewhere"))
    again = f"adapter_sets.again={{per: all, peft: {elsewhere}}}"
    ran(csv_run, root, again)
    weights = load_file(elsewhere / PEFT_WEIGHTS)
    save_file({name: 2 * weight for name, weight in weights.items()}, elsewhere / PEFT_WEIGHTS)
    assert "imported" in ran(csv_run, root, again).out
    assert_same_weights(
        {name: 2 * weight for name, weight in native(root, "single", "all").items()}, native(root, "again", "all")
    )


@pytest.fixture(scope="module")
def of_peft(tiny_checkpoint, tmp_path_factory):
    """An adapter that PEFT made for the base, on all of q, k and v at rank 3."""
    folder = tmp_path_factory.mktemp("of_peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=6, target_modules=["qkv_proj"])
    adapted = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.2)
    adapted.save_pretrained(folder)
    return folder


ALL_OF_QKV = "model.lora_attn_modules=[q_proj, k_proj, v_proj]"


def test_an_adapter_trained_elsewhere_is_where_sets_begin(csv_run, root, of_peft):
    sets = (
        f"adapter_sets.theirs={{per: all, peft: {of_peft}}}",
        "adapter_sets.onward={per: persona, start_from: theirs}",
        "max_steps_per_epoch=1",
        "optimizer.lr=1e-9",
        ALL_OF_QKV,
    )
    ran(csv_run, root, *sets)
    theirs = native(root, "theirs", "all")
    name = "layers.0.attn.v_proj.lora_b.weight"
    assert theirs[name].abs().max() > 0.1
    assert not theirs[name][:, 3:].any()
    for adapter in ("0", "1"):
        torch.testing.assert_close(native(root, "onward", adapter)[name], theirs[name], rtol=0, atol=1e-6)


def test_each_persona_goes_on_from_its_own_imported_adapter(csv_run, root):
    sets = (
        f"adapter_sets.before={{per: persona, peft: {root}/adapters/persona}}",
        "adapter_sets.after={per: persona, start_from: before}",
        "max_steps_per_epoch=1",
        "optimizer.lr=1e-9",
    )
    ran(
        csv_run,
        root,
        *sets,
        "~adapter_sets.single",
        "~adapter_sets.persona",
        "~agents.single",
        "~agents.persona",
        "~agents.persona_generate",
    )
    for adapter in ("0", "1"):
        before, after = native(root, "before", adapter), native(root, "after", adapter)
        assert max(float((after[name] - before[name]).abs().max()) for name in before) < 1e-6
    inputs = json.loads((root / "adapters" / "after" / MANIFEST).read_text())["inputs"]
    assert {path for path in inputs if "before" in path} == {
        str(root / "adapters" / "before" / adapter / NATIVE_FILE) for adapter in ("0", "1")
    }


REFUSED = {
    "no folder": (
        ["adapter_sets.x={per: all, peft: gone}"],
        ["gone): PEFT folder not found; set it to a folder with adapter_config.json"],
    ),
    "one adapter for all personas": (
        ["adapter_sets.x={per: persona, peft: ROOT/adapters/single/all}"],
        ["all): PEFT folder not found; with per: persona it holds a PEFT folder per persona"],
    ),
    "no folder at all": (
        ["adapter_sets.x={per: persona, peft: gone}"],
        ["gone): PEFT folder not found; it should hold a PEFT folder for each of the personas 0, 1"],
    ),
    "no adapter in it": (
        ["adapter_sets.x={per: all, peft: ROOT/adapters/persona}"],
        ["adapters/persona/adapter_config.json: file not found; "],
    ),
    "rank": (
        ["adapter_sets.x={per: all, peft: OF_PEFT}", ALL_OF_QKV, "model.lora_rank=2"],
        ["layers.0.attn.q_proj has rank 3, the model's adapters have 2; set model.lora_rank=3"],
    ),
    "targets": (
        ["adapter_sets.x={per: all, peft: OF_PEFT}"],
        ["it adapts v_proj, the model does not; add v_proj to model.lora_attn_modules"],
    ),
    "two sets": (
        ["adapter_sets.x={per: all, peft: OF_PEFT}", "adapter_sets.y={per: all, peft: gone}"],
        ["add v_proj to model.lora_attn_modules", "gone): PEFT folder not found"],
    ),
    "with rows": (
        ["adapter_sets.x={per: all, peft: OF_PEFT, rows: 3}"],
        ["with peft nothing is trained, so rows has no effect; leave one of them out"],
    ),
    "with a share": (
        ["adapter_sets.x={per: persona, peft: OF_PEFT, share: 0.5}"],
        ["with peft nothing is trained, so share has no effect; leave one of them out"],
    ),
    "start from trained personas": (
        ["adapter_sets.x={per: persona, start_from: persona}"],
        ["no set 'persona' of one adapter or of imported ones on that base above it; such are: single"],
    ),
    "all from imported personas": (
        ["adapter_sets.p={per: persona, peft: OF_PEFT}", "adapter_sets.x={per: all, start_from: p}"],
        ["no set 'p' of one adapter on that base above it; such are: single"],
    ),
    "an over-long path": (
        [f"adapter_sets.x={{per: all, peft: {'a' * 300}}}"],
        ["aaa: PEFT folder can't be read (File name too long); check the path"],
    ),
    "personas of another rank": (
        ["adapter_sets.x={per: persona, peft: ROOT/adapters/persona}", "model.lora_rank=2"],
        ["adapters/persona/0: layers.0.attn.", "adapters/persona/1: layers.0.attn."],
    ),
    "a home that there is not": (
        ["adapter_sets.x={per: persona, peft: ~nobody_here/x}", "adapter_sets.y={per: all, peft: gone}"],
        ["~nobody_here/x: no such user's home", "gone): PEFT folder not found"],
    ),
}


@pytest.mark.parametrize(("overrides", "lines"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_imported_is_a_line_and_nothing_is_written(overrides, lines, csv_run, root, of_peft):
    before = stage_folders(root)
    named = [word.replace("ROOT", str(root)).replace("OF_PEFT", str(of_peft)) for word in overrides]
    outcome = run_recipe("persona_lora", csv_run.config, f"output_dir={root}", "seed=9", *named)
    assert outcome.status == 2
    told = outcome.err.strip().splitlines()
    assert len(told) == len(lines), outcome.err
    assert all(line in found for line, found in zip(lines, told, strict=True)), outcome.err
    assert stage_folders(root) == before
    assert not (root / "adapters" / "x").exists()


def test_all_folders_that_are_broken_are_told_at_once(csv_run, root, of_peft, tmp_path):
    theirs = tmp_path / "theirs"
    for persona, spoil in {"0": "truncated", "1": "no config"}.items():
        shutil.copytree(of_peft, theirs / persona)
        HOSTILE[spoil][0](theirs / persona)
    sets = ("adapter_sets.y={per: all, peft: gone}", f"adapter_sets.x={{per: persona, peft: {theirs}}}")
    outcome = run_recipe("persona_lora", csv_run.config, f"output_dir={root}", *sets, ALL_OF_QKV)
    gone, first, second = outcome.err.strip().splitlines()
    assert "gone): PEFT folder not found" in gone
    assert f"{theirs}/0/{PEFT_WEIGHTS}: {HOSTILE['truncated'][1]}" in first
    assert f"{theirs}/1/{PEFT_CONFIG}: {HOSTILE['no config'][1]}" in second


def test_an_adapter_that_names_another_base_is_used_with_a_line(csv_run, root, of_peft, tmp_path, tiny_checkpoint):
    theirs = tmp_path / "theirs"
    for persona in ("0", "1"):
        shutil.copytree(of_peft, theirs / persona)
        name_base(theirs / persona, "some\nwhere/else")
    outcome = ran(csv_run, root, f"adapter_sets.x={{per: persona, peft: {theirs}}}", ALL_OF_QKV)
    said = [line for line in outcome.out.splitlines() if "adapters/x: " in line]
    assert said[0] == f"persona_lora: adapters/x: trained on some where/else, used on {tiny_checkpoint}"
    assert len(said) == 2
    for persona in ("0", "1"):
        trained = json.loads((root / "adapters" / "x" / persona / "training.json").read_text())
        assert trained["trained_on"] == "some where/else"


@pytest.mark.parametrize("name", [None, "", "somewhere/{}", "{}"])
def test_an_adapter_that_names_this_base_or_none_is_used_without_a_line(
    name, csv_run, root, of_peft, tmp_path, tiny_checkpoint
):
    folder = Path(shutil.copytree(of_peft, tmp_path / "theirs"))
    name_base(folder, name.format(tiny_checkpoint.name.upper()) if isinstance(name, str) else name)
    outcome = ran(csv_run, root, f"adapter_sets.x={{per: all, peft: {folder}}}", ALL_OF_QKV)
    assert "used on" not in outcome.out


def name_base(folder, name):
    config = json.loads((folder / PEFT_CONFIG).read_text())
    (folder / PEFT_CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": name}))


HOSTILE = {
    "a pickle": (lambda f: torch.save({"a": torch.ones(1)}, f / PEFT_WEIGHTS), "(a pickle, which isn't read)"),
    "truncated": (lambda f: (f / PEFT_WEIGHTS).write_bytes((f / PEFT_WEIGHTS).read_bytes()[:-9]), "not a sound safet"),
    "nan": (lambda f: save_file(_nan(load_file(f / PEFT_WEIGHTS)), f / PEFT_WEIGHTS), "is not finite"),
    "over-long header": (lambda f: (f / PEFT_WEIGHTS).write_bytes(b"\xff" * 8 + b"{}"), "not a sound safetensors file"),
    "another base": (
        lambda f: save_file({n: w[:, :16].clone() for n, w in load_file(f / PEFT_WEIGHTS).items()}, f / PEFT_WEIGHTS),
        "import it with the base that it was trained on",
    ),
    "4 bits": (lambda f: _in_4_bits(f / PEFT_WEIGHTS), "is of type F4; save the adapter as matrices of type"),
    "another rank": (
        lambda f: (f / PEFT_CONFIG).write_text((f / PEFT_CONFIG).read_text().replace('"r": 3', '"r": 5')),
        "has rank 3, adapter_config.json says 5",
    ),
    "no config": (lambda f: (f / PEFT_CONFIG).write_text("null"), "not a PEFT config"),
}  # fmt: skip


def _in_4_bits(file):
    """Give the first weight a type that torch's numbers haven't, of the same bytes."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    first = next(weight for name, weight in header.items() if name != "__metadata__")
    first.update(dtype="F4", shape=[first["shape"][0], 8 * first["shape"][1]])
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def _nan(weights):
    return {name: weight * float("nan") for name, weight in weights.items()}


@pytest.mark.parametrize(("damage", "line"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_folders_are_a_line(damage, line, csv_run, root, of_peft, tmp_path):
    folder = Path(shutil.copytree(of_peft, tmp_path / "damaged"))
    damage(folder)
    outcome = run_recipe(
        "persona_lora", csv_run.config, f"output_dir={root}", f"adapter_sets.x={{per: all, peft: {folder}}}", ALL_OF_QKV
    )
    assert outcome.status == 2
    (told,) = outcome.err.strip().splitlines()
    assert line in told
    assert str(folder) in told
    assert not (root / "adapters" / "x").exists()


def test_dora_on_a_part_of_a_fused_projection_comes_back_from_its_export(csv_run, root):
    dora = ("model.use_dora=true", "max_steps_per_epoch=1")
    ran(csv_run, root, *dora)
    assert not (root / "adapters" / "persona" / "0" / PEFT_WEIGHTS).exists()
    ran(csv_run, root, *dora, "export.sets=[persona]", "export.format=peft", recipe="persona_export")
    ran(csv_run, root, *dora, f"adapter_sets.again={{per: persona, peft: {root}/export/persona}}")
    for adapter in ("0", "1"):
        assert_same_weights(native(root, "persona", adapter), native(root, "again", adapter))
