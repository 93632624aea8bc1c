"""Adapters that the real recipes trained and exported, in PEFT, in transformers, on a hub."""

import hashlib
import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from hub_server import start_hub
from huggingface_hub import ModelCard
from peft import PeftModel
from pipelines import run_recipe, write_yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from yaml import safe_load

from personas_tune.adapters.files import NATIVE_FILE, load_native
from personas_tune.workspace import MANIFEST

TOKENS = torch.randint(3, 390, (2, 60), generator=torch.Generator().manual_seed(0))


def exported(csv_run, root, *overrides):
    outcome = run_recipe("persona_export", csv_run.config, f"output_dir={root}", *overrides)
    assert outcome.status == 0, outcome.out + outcome.err
    return outcome.out


def logits_of(model):
    with torch.no_grad():
        out = model.eval()(TOKENS)
    return getattr(out, "logits", out)


def ours(base, folder):
    """Logits of our bank with an adapter of an experiment."""
    base.bank.add_loaded("it", load_native(folder), where=str(folder))
    with base.bank.use("it"):
        found = logits_of(base.model)
    base.bank.remove("it")
    return found


def in_peft(tiny_checkpoint, folder):
    return logits_of(PeftModel.from_pretrained(plain(tiny_checkpoint), folder))


def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def assert_same(theirs, ours, base):
    assert (ours - base).abs().max() > 1e-3
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)


def hashes(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def run(csv_run, tmp_path_factory):
    """A finished run that was exported with the defaults, and what that printed."""
    root = Path(shutil.copytree(csv_run.root, tmp_path_factory.mktemp("exported") / "run"))
    return root, exported(csv_run, root)


@pytest.fixture
def copy(csv_run, tmp_path):
    """A finished run that isn't exported yet."""
    return Path(shutil.copytree(csv_run.root, tmp_path / "run"))


@pytest.fixture(scope="module")
def dora(csv_run, tmp_path_factory):
    """A finished run with DoRA adapters on q and k, and its config."""
    root = Path(shutil.copytree(csv_run.root, tmp_path_factory.mktemp("dora") / "run"))
    experiment = safe_load(csv_run.config.read_text())
    experiment["model"]["use_dora"] = True
    experiment["output_dir"] = str(root)
    path = write_yaml(root.parent / "dora.yaml", experiment)
    outcome = run_recipe("persona_lora", path, "~adapter_sets.single", "~agents.single")
    assert outcome.status == 0, outcome.err
    return path, root


@pytest.mark.parametrize("name", ["persona/0", "persona/1", "single/all"])
def test_peft_computes_our_logits_with_the_exported_folder(name, run, tiny_checkpoint, load_tiny):
    root, _ = run
    assert_same(
        in_peft(tiny_checkpoint, root / "export" / name),
        ours(load_tiny(), root / "adapters" / name),
        logits_of(plain(tiny_checkpoint)),
    )


def test_the_command_serves_every_adapter(run, tiny_checkpoint):
    root, out = run
    record = json.loads((root / "export" / "serving.json").read_text())
    assert record["base"] == str(tiny_checkpoint)
    assert record["max_lora_rank"] == 8
    assert list(record["adapters"]) == ["persona-0", "persona-1", "single-all"]
    words = shlex.split(record["command"])
    assert words[:3] == ["vllm", "serve", str(tiny_checkpoint)]
    modules = dict(word.split("=", 1) for word in words[words.index("--lora-modules") + 1 :])
    assert modules == {name: entry["path"] for name, entry in record["adapters"].items()}
    for path in modules.values():
        config = json.loads((Path(path) / "adapter_config.json").read_text())
        assert config["r"] <= record["max_lora_rank"]
        assert config["base_model_name_or_path"] == tiny_checkpoint.name
    card = (root / "export" / "persona" / "0" / "README.md").read_text()
    assert "vllm serve BASE --enable-lora --max-lora-rank 8 --max-loras 1 --lora-modules persona-0=PATH\n" in card
    assert f"serve with: {record['command']}\n" in out


def test_cards_tell_what_the_experiment_knows_and_no_path(run, tiny_checkpoint):
    root, _ = run
    metrics = json.loads((root / "eval" / "metrics.json").read_text())
    agent = next(row for row in metrics["agents"] if row["name"] == "persona")
    clustering = json.loads((root / "personas" / "clustering.json").read_text())
    manifest = json.loads((root / "adapters" / "persona" / MANIFEST).read_text())
    card = ModelCard.load(root / "export" / "persona" / "1" / "README.md")
    found = {
        (result.dataset_config, result.metric_type, result.metric_name): result.metric_value
        for result in card.data.eval_results
    }
    assert found["all personas", "rmse", "RMSE of agent persona (expected)"] == round(agent["rmse"], 4)
    assert found["persona 1", "mae", "MAE of agent persona (expected)"] == round(agent["per_persona"]["1"]["mae"], 4)
    assert ("persona 1", "urr", "share of answers without a rating of agent persona_generate (generate)") in found
    assert f"{clustering['sizes'][1]} users" in card.text
    for entry in clustering["words"]["1"][:10]:
        assert f"`{entry['word']}`" in card.text
    assert hash_of_prompts(manifest["inputs"]) in card.text
    assert {result.dataset_type for result in card.data.eval_results} == {"csv"}
    assert "| LoRA rank | 4 |\n| LoRA alpha | 8 |\n| LoRA dropout | 0.1 |\n" in card.text
    everybody = ModelCard.load(root / "export" / "single" / "all" / "README.md")
    assert "## Persona" not in everybody.text
    texts = [path.read_text(errors="ignore") for name in ("persona", "single") for path in cards_of(root, name)]
    assert len(texts) == 6
    assert not [text for text in texts if str(root) in text or str(tiny_checkpoint.parent) in text]


def hash_of_prompts(inputs):
    of_prompts = ("items.parquet", "users.parquet", "profiles.parquet", "memories.parquet", "prompt.json")
    hashes = sorted(sha for path, sha in inputs.items() if path.endswith((*of_prompts, "samples/train.parquet")))
    assert len(hashes) == 6
    return hashlib.sha256("".join(f"{sha}\n" for sha in hashes).encode()).hexdigest()


def cards_of(root, name):
    folder = root / "export" / name
    return [*folder.glob("*/README.md"), *folder.glob("*/adapter_config.json")]


def test_a_second_run_is_up_to_date_and_a_forced_one_gives_the_same_bytes(csv_run, run):
    root, _ = run
    before = hashes(root / "export")
    out = exported(csv_run, root)
    assert "persona is up to date in" in out
    assert "single is up to date in" in out
    assert "serve with: vllm serve" in out
    assert hashes(root / "export") == before
    for manifest in (root / "export").rglob(MANIFEST):
        manifest.unlink()
    exported(csv_run, root)
    assert hashes(root / "export") == before


def test_new_figures_are_told_and_those_of_other_adapters_are_not(csv_run, copy):
    exported(csv_run, copy, "export.sets=[persona]", "export.adapters=[0]")
    card = copy / "export" / "persona" / "0" / "README.md"
    assert not (copy / "export" / "persona" / "1").exists()
    assert "no agent with this adapter" not in card.read_text()
    manifest = copy / "adapters" / "persona" / MANIFEST
    manifest.write_text(manifest.read_text() + " ")  # as if it were trained again
    out = exported(csv_run, copy, "export.sets=[persona]", "export.adapters=[0]")
    assert "up to date" not in out
    assert "no agent with this adapter has been measured since it was trained" in card.read_text()


def test_words_of_personas_that_were_grouped_anew_are_not_told(csv_run, copy):
    (copy / "personas" / "personas.parquet").write_bytes((copy / "data" / "users.parquet").read_bytes())
    exported(csv_run, copy, "export.sets=[persona]")
    assert "## Persona" not in (copy / "export" / "persona" / "0" / "README.md").read_text()


def test_merged_checkpoints_compute_our_logits_and_leave_the_base_alone(csv_run, copy, tiny_checkpoint, load_tiny):
    before = hashes(tiny_checkpoint)
    merged = ("export.format=merged", "export.sets=[persona]", "export.dtype=fp32")  # the base's own bf16 would round
    out = exported(csv_run, copy, *merged)
    folder = copy / "export" / "merged" / "persona"
    base = load_tiny()
    for adapter in ("0", "1"):
        assert_same(
            logits_of(plain(folder / adapter)),
            ours(base, copy / "adapters" / "persona" / adapter),
            logits_of(plain(tiny_checkpoint)),
        )
        assert (folder / adapter / "tokenizer.model").read_bytes() == (tiny_checkpoint / "tokenizer.model").read_bytes()
        assert ModelCard.load(folder / adapter / "README.md").data.library_name == "transformers"
    assert hashes(tiny_checkpoint) == before
    assert not (copy / "export" / "persona").exists()
    record = json.loads((copy / "export" / "serving.json").read_text())
    assert record["command"] is None
    assert f"serve with: vllm serve {folder / '0'} --served-model-name persona-0\n" in out
    assert "persona is up to date" in exported(csv_run, copy, *merged)


def test_dora_is_merged_by_itself_and_a_dora_adapter_if_asked(dora, tiny_checkpoint, load_tiny):
    path, root = dora
    only = ("~adapter_sets.single", "~agents.single")
    outcome = run_recipe("persona_export", path, *only, "export.dtype=fp32")
    assert outcome.status == 0, outcome.err
    assert "persona is merged, since vLLM takes no DoRA adapters" in outcome.out
    expected = ours(load_tiny(use_dora=True), root / "adapters" / "persona" / "0")
    base = logits_of(plain(tiny_checkpoint))
    assert_same(logits_of(plain(root / "export" / "merged" / "persona" / "0")), expected, base)
    outcome = run_recipe("persona_export", path, *only, "export.format=peft")
    assert outcome.status == 0, outcome.err
    assert "vLLM takes no DoRA adapters; serve it merged" in outcome.out
    assert_same(in_peft(tiny_checkpoint, root / "export" / "persona" / "0"), expected, base)
    assert "vLLM doesn't serve it in this form" in (root / "export" / "persona" / "0" / "README.md").read_text()


def test_a_lower_rank_is_cut_and_what_it_cost_is_told_everywhere(csv_run, copy, run):
    out = exported(csv_run, copy, "export.sets=[persona]", "export.max_rank=2")
    whole, cut = (folder / "export" / "persona" / "0" for folder in (run[0], copy))
    config = json.loads((cut / "adapter_config.json").read_text())
    assert config["r"] == 2
    old, new = (load_file(folder / "adapter_model.safetensors") for folder in (whole, cut))
    errors = []
    for name in (name.removesuffix("A.weight") for name in old if name.endswith("lora_A.weight")):
        full, less = (each[f"{name}B.weight"] @ each[f"{name}A.weight"] for each in (old, new))
        errors.append(((full - less).norm() / full.norm()).item())
    entry = json.loads((copy / "export" / "serving.json").read_text())["adapters"]["persona-0"]
    assert entry["rank"] == 2
    assert entry["truncation_error"]["max"] == pytest.approx(max(errors), rel=1e-3)
    told = f"by {max(errors):.2%} in the worst module"
    assert told in out
    assert "Its rank was cut from 8 to 2, which is lossy: B A is off by" in (cut / "README.md").read_text()
    assert told in (cut / "README.md").read_text()


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_dtype_is_that_of_the_file(dtype, torch_dtype, csv_run, copy, run):
    exported(csv_run, copy, "export.sets=[single]", f"export.dtype={dtype}")
    old, new = (
        load_file(folder / "export" / "single" / "all" / "adapter_model.safetensors") for folder in (run[0], copy)
    )
    assert {name: weight.to(torch_dtype).tolist() for name, weight in old.items()} == {
        name: weight.tolist() for name, weight in new.items()
    }
    assert {weight.dtype for weight in new.values()} == {torch_dtype}
    with safe_open(copy / "export" / "single" / "all" / "adapter_model.safetensors", framework="pt") as stream:
        about = json.loads(stream.metadata()["about"])
        assert stream.metadata()["format"] == "pt"
    assert (about["set"], about["adapter"]) == ("single", "all")


def test_each_base_has_a_serving_file_of_its_own(csv_run, copy, tmp_path, tiny_checkpoint):
    experiment = safe_load(csv_run.config.read_text())
    other = shutil.copytree(tiny_checkpoint, tmp_path / "twin")
    sections = json.loads(json.dumps({key: experiment[key] for key in ("model", "tokenizer", "checkpointer")}))
    sections["checkpointer"]["checkpoint_dir"] = str(other)
    experiment["bases"] = {"twin": sections}
    experiment["adapter_sets"]["single"]["base"] = "twin"
    experiment["output_dir"] = str(copy)
    path = write_yaml(tmp_path / "two.yaml", experiment)
    outcome = run_recipe("persona_export", path)
    assert outcome.status == 0, outcome.err
    records = {name: json.loads((copy / "export" / name).read_text()) for name in ("serving.json", "serving_twin.json")}
    assert list(records["serving.json"]["adapters"]) == ["persona-0", "persona-1"]
    assert list(records["serving_twin.json"]["adapters"]) == ["single-all"]
    assert records["serving_twin.json"]["base"] == str(other)
    refused = run_recipe("persona_export", path, "export.base_name=me/base")
    assert refused.status == 2
    assert refused.err == "error: export.base_name: one name for several bases; set export.sets too\n"
    exported_one = run_recipe("persona_export", path, "export.base_name=me/base", "export.sets=[persona]")
    assert "vllm serve me/base --enable-lora" in exported_one.out


def test_adapters_are_pushed_with_their_cards_when_asked(csv_run, copy, monkeypatch):
    with start_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", hub.token)
        exported(csv_run, copy, "export.sets=[persona]")
        assert hub.requests == []
        out = exported(csv_run, copy, "export.sets=[persona]", "export.push_to=me/agents")
        assert "persona is up to date" in out
        assert hub.repositories == {"me/agents-persona-0": True, "me/agents-persona-1": True}
        folder = copy / "export" / "persona" / "1"
        assert hub.files["me/agents-persona-1"] == {path.name: path.read_bytes() for path in folder.iterdir()}
        assert "README.md" in hub.files["me/agents-persona-1"]
        assert f"persona-0 pushed to {hub.url}/me/agents-persona-0\n" in out
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        refused = run_recipe(
            "persona_export", csv_run.config, f"output_dir={copy}", "export.sets=[persona]", "export.push_to=me/agents"
        )
        assert refused.status == 2
        assert refused.err.startswith("error: export.push_to me/agents-persona-0: can't be pushed (")
        assert refused.err.count("\n") == 1
        assert "hf_wrong" not in refused.err


def test_what_is_imported_again_is_exported_as_it_was_and_not_claimed(csv_run, copy, run):
    set_up = f"adapter_sets.back={{per: persona, peft: {run[0] / 'export' / 'persona'}}}"
    trained = run_recipe("persona_lora", csv_run.config, f"output_dir={copy}", set_up)
    assert trained.status == 0, trained.err
    exported(csv_run, copy, set_up, "export.sets=[back]")
    folders = (run[0] / "export" / "persona", copy / "export" / "back")
    old, new = (load_file(folder / "1" / "adapter_model.safetensors") for folder in folders)
    assert {name: weight.tolist() for name, weight in old.items()} == {
        name: weight.tolist() for name, weight in new.items()
    }
    card = (copy / "export" / "back" / "1" / "README.md").read_text()
    assert "trained by" not in card
    assert "LoRA dropout" not in card
    assert "license_name: unstated" in card
    assert str(run[0]) not in card
    assert "## Persona" in card


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["export.sets=[persna]"], "export.sets: no adapter set 'persna'; did you mean persona?"),
        (["export.sets=[]"], "export.sets: no adapter set to export; name some of adapter_sets"),
        (["export.adapters=[al]"], "export.adapters: no adapter 'al'; did you mean all?"),
        (["export.adapters=[7]"], "export.adapters: no adapter '7'; there are 0, 1, all"),
        (["export.adapters=[]"], "export.adapters: no adapter to export; name some, or leave it null"),
        (["export.base_name=/home/me/base"], "export.base_name: '/home/me/base' names no model; write owner/name"),
        (["adapter_sets.merged={}"], "adapter_sets: 'merged' names the folder of merged checkpoints; rename the set"),
        (["checkpointer.checkpoint_dir=/nowhere"], "/nowhere: checkpoint folder not found; get it with `tune download"),
        (["export.push_to=me"], "export.push_to: 'me' names no repositories of the Hub; write owner/prefix"),
        (["export.push_to=me/a"], "export.push_to: HF_TOKEN is not set; export HF_TOKEN=..."),
        (["export.format=onnx"], "export.format is 'onnx'"),
        (["export={format: merged, max_rank: 8}"], "a merged checkpoint has no rank to cut"),
        (["export.licence=mit"], "unknown key export.licence; did you mean export.license?"),
        (["checkpointer.model_type=MODERNBERT"], "no PEFT form is known for 'MODERNBERT'"),
        (["adapter_sets.late={}"], "adapters/late/assignment.parquet: file not found; run `tune run persona_lora"),
    ],
)
def test_what_makes_no_sense_is_told_in_a_line(overrides, said, csv_run, copy, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    outcome = run_recipe("persona_export", csv_run.config, f"output_dir={copy}", *overrides)
    assert outcome.status == 2
    assert said in outcome.err
    assert outcome.err.count("\n") == 1
    assert not (copy / "export").exists()


def test_another_base_is_refused_before_anything_is_written(csv_run, copy, tmp_path, tiny_checkpoint):
    other = Path(shutil.copytree(tiny_checkpoint, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rope_theta": 5e5}))
    outcome = run_recipe("persona_export", csv_run.config, f"output_dir={copy}", f"checkpointer.checkpoint_dir={other}")
    assert outcome.status == 2
    assert "trained on another base: its config.json was not this one" in outcome.err
    assert not (copy / "export").exists()


def test_other_weights_of_the_same_shape_are_refused_whatever_their_file_is_called(
    csv_run, copy, tmp_path, tiny_checkpoint
):
    twin = Path(shutil.copytree(tiny_checkpoint, tmp_path / "twin"))
    weights = load_file(twin / "model.safetensors")
    (twin / "model.safetensors").unlink()
    save_file({name: weight + 0.01 for name, weight in weights.items()}, twin / "weights.safetensors", {"format": "pt"})
    outcome = run_recipe(
        "persona_export", csv_run.config, f"output_dir={copy}", f"checkpointer.checkpoint_dir={twin}",
        "checkpointer.checkpoint_files=[weights.safetensors]", "export.format=merged",
    )  # fmt: skip
    assert outcome.status == 2
    assert "trained on another base: its weights.safetensors was not this one" in outcome.err
    assert not (copy / "export").exists()


def test_what_earlier_runs_exported_stays_in_the_serving_file(csv_run, copy):
    exported(csv_run, copy, "export.sets=[persona]", "export.adapters=[0]")
    out = exported(csv_run, copy, "export.sets=[single]")
    record = json.loads((copy / "export" / "serving.json").read_text())
    assert list(record["adapters"]) == ["persona-0", "single-all"]
    assert f"serve with: {record['command']}\n" in out
    shutil.rmtree(copy / "export" / "persona")
    exported(csv_run, copy, "export.sets=[single]")
    assert list(json.loads((copy / "export" / "serving.json").read_text())["adapters"]) == ["single-all"]


def test_cards_tell_of_the_training_whatever_the_config_says_now(csv_run, copy):
    now = ("data.format=movielens", "model.lora_rank=2", "model.lora_alpha=1", "export.words=false")
    exported(csv_run, copy, "export.sets=[persona]", *now)
    card = ModelCard.load(copy / "export" / "persona" / "0" / "README.md")
    assert {result.dataset_type for result in card.data.eval_results} == {"csv"}
    assert "| LoRA rank | 4 |\n| LoRA alpha | 8 |\n" in card.text
    assert "users, grouped by the likeness" in card.text
    assert "Words that set" not in card.text


def test_a_4_bit_base_is_told_by_what_training_noted(csv_run, copy):
    file = copy / "adapters" / "persona" / MANIFEST
    manifest = json.loads(file.read_text())
    manifest["settings"]["model"]["quantize_base"] = True
    file.write_text(json.dumps(manifest))
    exported(csv_run, copy, "export.sets=[persona]")
    assert "4 bits (NF4, QLoRA)" in (copy / "export" / "persona" / "0" / "README.md").read_text()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("adapters/persona/manifest.json", "{}"),
        ("adapters/persona/0/training.json", "{}"),
        ("personas/clustering.json", "[]"),
        ("eval/metrics.json", '{"agents": [{}]}'),
        ("eval/manifest.json", "[]"),
        ("samples/manifest.json", "{}"),
        ("data/manifest.json", "{}"),
    ],
)
def test_a_damaged_file_is_named(name, content, csv_run, copy):
    (copy / name).write_text(content)
    outcome = run_recipe("persona_export", csv_run.config, f"output_dir={copy}", "export.sets=[persona]")
    assert outcome.status == 2
    assert outcome.err.startswith(f"error: {copy / name}: it doesn't say what it should (")
    assert outcome.err.count("\n") == 1


def test_a_folder_in_the_place_of_a_file_is_told_in_a_line(csv_run, copy):
    (copy / "export" / "serving.json").mkdir(parents=True)
    outcome = run_recipe("persona_export", csv_run.config, f"output_dir={copy}", "export.sets=[persona]")
    assert outcome.status == 2
    assert outcome.err == (
        f"error: {copy / 'export' / 'serving.json'}: a folder is where a file is to be; move it away\n"
    )


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_an_adapter_with_broken_weights_is_refused(weight, csv_run, copy):
    file = copy / "adapters" / "persona" / "1" / NATIVE_FILE
    with safe_open(file, framework="pt") as stream:
        metadata = stream.metadata()
    weights = load_file(file)
    next(iter(weights.values()))[0, 0] = weight
    save_file(weights, file, metadata=metadata)
    outcome = run_recipe("persona_export", csv_run.config, f"output_dir={copy}", "export.sets=[persona]")
    assert outcome.status == 2
    assert "is not finite; train the adapter again" in outcome.err
    assert not (copy / "export" / "persona").exists()
