"""What the doctor says of experiments: every bundled config, whole and damaged tiny bases, memory, stages."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from tiny import base_sections, write_experiment

from personas_tune import cli
from personas_tune.config import bundled_configs
from personas_tune.doctor import estimates, machine, stages
from personas_tune.workspace import open_stage


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run `personas-tune doctor` in an empty folder; give status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "LEAST_DISK_GB", 0)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def run_main(*arguments):
        with pytest.raises(SystemExit) as stop:
            cli.main(["doctor", *arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return stop.value.code or 0, captured.out, captured.err

    return run_main


@pytest.fixture
def experiment_of(run):
    """Write a config of a tiny base to c.yaml."""

    def write(checkpoint, model=(), **changes):
        experiment = {
            "output_dir": "run",
            "data": {"format": "world"},
            "adapter_sets": {"persona": {"per": "persona"}, "single": {"per": "all"}},
            "agents": {"base": {}, "persona": {"adapters": "persona"}},
            **base_sections(checkpoint, **dict(model)),
            **changes,
        }
        Path("c.yaml").write_text(yaml.safe_dump(experiment), encoding="utf-8")
        return experiment

    return write


def section_of(out, title):
    lines = out.splitlines()
    start = lines.index(title) + 1
    below = [line.startswith("  ") for line in lines[start:]]
    return [line.strip() for line in lines[start : start + [*below, False].index(False)]]


def missing_in(out):
    return [line.strip() for line in out.splitlines() if line.startswith("  missing")]


# Every config that is shipped


@pytest.mark.parametrize("name", bundled_configs())
def test_every_bundled_config_is_examined(name, run, monkeypatch):
    # The passes of large bases take seconds; one such config is run whole below.
    monkeypatch.setattr(estimates, "training_passes", lambda *_, **__: 10**9)
    monkeypatch.setattr(estimates, "evaluation_passes", lambda *_, **__: 10**9)
    text = Path(cli._bundled_file(name)).read_text(encoding="utf-8")
    device = yaml.safe_load(text).get("device", "cpu")
    large_gpu = () if device == "cpu" else ("--gpu-memory", "1000")
    status, out, err = run("--config", name, *large_gpu)
    assert {"packages", "machine", "inputs", "stages"} <= {line for line in out.splitlines() if line[0] != " "} | {
        "inputs"  # a world that asks nobody needs none
    }
    n_missing = len(missing_in(out))
    assert status == (2 if n_missing else 0)
    if n_missing:
        assert err == f"error: doctor: {n_missing} of {out.count(chr(10) + '  ')} checks found something missing\n"
    assert device != "cpu" or "CUDA" not in out


def test_quickstart_lacks_nothing(run):
    status, out, err = run("--config", "quickstart.yaml")
    assert (status, err) == (0, "")
    (base,) = [section_of(out, "base")]
    assert [line.split()[0] for line in base] == ["ok"] * len(base)
    told = "\n".join(base)
    assert "names and shapes of all weights fit the model section" in told
    assert "labels in 2 tokens, the end of the turn included: 1=" in told
    assert "training fits main memory" in told
    assert "no GPU is needed" in out
    assert "note     persona_raft: waits for data/, memory/, personas/; run persona_prepare first" in out


def test_the_papers_config_is_told_what_it_lacks_and_where_it_fits(run):
    status, out, err = run("--config", "phi3_persona.yaml", "enable_activation_checkpointing=false")
    missing = missing_in(out)
    assert status == 2
    assert any("data.path data/ml-1m" in line for line in missing)
    download = "tune download microsoft/Phi-3-mini-4k-instruct --output-dir checkpoints/Phi-3-mini-4k-instruct"
    assert sum(download in line for line in missing) == 1
    assert any("export OPENAI_API_KEY" in line for line in missing)
    assert err.startswith(f"error: doctor: {len(missing)} of ")
    base = section_of(out, "base")
    (at_16,) = [line for line in base if "training does not fit a GPU of 16 GB" in line]
    assert at_16.startswith("note")  # no such GPU is here to be missed
    assert "training fits a GPU of 24 GB and larger ones" in "\n".join(base)
    suggested = at_16.partition("; set ")[2].partition(": ")[0].split()
    _, out, _ = run("--config", "phi3_persona.yaml", "enable_activation_checkpointing=false", *suggested)
    assert "training fits a GPU of 16 GB and larger ones" in out


# Memory


def test_what_is_suggested_fits_when_it_is_set(run):
    large = ("--config", "quickstart.yaml", "device=cuda", "batch_size=8", "gradient_accumulation_steps=2")
    _, out, _ = run(*large, "--gpu-memory", "1.03")
    for stage in ("training", "evaluation"):
        (line,) = [line for line in section_of(out, "base") if f"{stage} does not fit a GPU of 1.03 GB" in line]
        assert line.startswith("missing")
        suggested = line.partition("; set ")[2].partition(": ")[0].split()
        _, mended, _ = run(*large, *suggested, "--gpu-memory", "1.03")
        assert f"{stage} fits a GPU of 1.03 GB" in mended
    assert "training: " in out
    assert "gradient_accumulation_steps=16" in out  # as many rows a step as before


def test_where_nothing_helps_a_smaller_base_is_advised(run, experiment_of, tiny_checkpoint):
    experiment_of(tiny_checkpoint, device="cuda")
    _, out, _ = run("--config", "c.yaml", "--gpu-memory", "0.5")
    assert "training does not fit a GPU of 0.5 GB; take a smaller base" in out
    assert run("--config", "c.yaml", "--gpu-memory", "-1")[2].startswith("error: --gpu-memory: -1 GB; ")


def test_rows_of_samples_that_are_there_say_how_long_rows_are(run, experiment_of, tiny_checkpoint):
    experiment_of(tiny_checkpoint)
    write_experiment(Path("run"))
    _, out, _ = run("--config", "c.yaml")
    assert "(the longest of 32)" in out
    shutil.rmtree("run")
    assert "rows of 1024 tokens (assumed, no samples yet)" in run("--config", "c.yaml")[1]
    assert "rows of 300 tokens (tokenizer.max_seq_len)" in run("--config", "c.yaml", "tokenizer.max_seq_len=300")[1]


def test_waiting_adapters_in_cpu_memory_take_no_room(run, experiment_of, tiny_checkpoint):
    experiment_of(tiny_checkpoint, model={"lora_rank": 256})
    usual, offloaded = (
        next(line for line in section_of(run("--config", "c.yaml", *extra)[1], "base") if "training: " in line)
        for extra in ([], ["training.offload_waiting=true"])
    )
    sizes = [float(line.partition("adapters ")[2].split()[0]) for line in (usual, offloaded)]
    assert sizes[0] == pytest.approx(4 * sizes[1], rel=0.2)  # printed with a digit after the point


def test_a_base_is_spread_only_where_what_is_gathered_has_room_too(run, experiment_of, tiny_checkpoint):
    from personas_tune import config
    from personas_tune.adapters.base_model import size_of_weights
    from personas_tune.doctor import changes
    from personas_tune.doctor.knobs import knobs_of
    from personas_tune.training.memory_estimate import Memory

    experiment_of(tiny_checkpoint, model={"num_layers": 30})
    knobs, _ = knobs_of(config.load_experiment("c.yaml"), None, None, ["1", "2"])
    network = changes.build_network(knobs.sections, knobs.dtype, recompute=False)
    base, gathered = size_of_weights(network), changes.gathered_bytes(network)
    assert gathered < base / 2
    memory = Memory(base=base, adapters=0, optimizer=0, working=0, passes=100)
    assert changes.gpus_to_spread_over(memory, knobs, base / 2 + gathered + 100) == 2
    assert changes.gpus_to_spread_over(memory, knobs, base / 2 + gathered + 99) == 4
    assert changes.gpus_to_spread_over(memory, knobs, gathered) is None
    quantised = replace(knobs, sections={**knobs.sections, "model": {**knobs.sections["model"], "quantize_base": True}})
    assert changes.gpus_to_spread_over(memory, quantised, 10**12) is None


# Checkpoint and tokenizer


@pytest.fixture
def copied(tiny_checkpoint, run):
    return Path(shutil.copytree(tiny_checkpoint, "base"))


def test_an_experiment_that_has_all_it_needs_is_told_so(run, experiment_of, tiny_checkpoint):
    Path("log.csv").write_text("user,item,rating\n", encoding="utf-8")
    experiment_of(tiny_checkpoint, data={"format": "csv", "path": "log.csv"})
    status, out, err = run("--config", "c.yaml")
    assert (status, err) == (0, "")
    assert "  ok       data.path log.csv\n" in out


def test_no_base_is_asked_for_where_none_is_used(run):
    Path("c.yaml").write_text("output_dir: run\ndata: {format: world}\n", encoding="utf-8")
    status, out, _ = run("--config", "c.yaml")
    assert status == 0
    assert "base\n" not in out
    assert "persona_lora" not in out
    assert "persona_base: waits for" in out


def test_mistakes_of_a_config_are_told_as_recipes_tell_them(run):
    Path("c.yaml").write_text("output_dir: run\nsed: 1\n", encoding="utf-8")
    assert run("--config", "c.yaml")[::2] == (2, "error: c.yaml: unknown key sed; did you mean seed?\n")


DAMAGE = {
    "config.json is a list": (lambda base: (base / "config.json").write_text("[]"), "a JSON list, not an object"),
    "config.json is deep": (lambda base: (base / "config.json").write_text("[" * 100_000), r"no JSON \("),
    "config.json is gone": (lambda base: (base / "config.json").unlink(), "file not found"),
    "config.json of another": (
        lambda base: change_config(base, architectures=["LlamaForCausalLM"]), "set checkpointer.model_type=LLAMA3",
    ),
    "other heads": (
        lambda base: change_config(base, num_attention_heads=8), "names or shapes|num_attention_heads 8, the model",
    ),
    "other positions": (lambda base: change_config(base, rope_theta=5e5), "rope_theta 500000, the model section"),
    "sizes are text": (lambda base: change_config(base, hidden_size="many"), "don't have the names or shapes"),
    "weights are cut off": (lambda base: cut_off(base / "model.safetensors"), "no whole safetensors file"),
    "weights are a pickle": (
        lambda base: (base / "model.safetensors").write_bytes(b"\x80\x04\x95" * 9), "no whole safetensors file",
    ),
    "the tokenizer is cut off": (lambda base: cut_off(base / "tokenizer.model"), "can't be used|failed"),
    "the tokenizer is a text": (lambda base: (base / "tokenizer.model").write_text("a"), "can't be used|failed"),
    "special tokens are a list": (
        lambda base: (base / "special_tokens.json").write_text("[]"), "can't be used|failed|usable",
    ),
}  # fmt: skip


def change_config(base, **changes):
    described = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**described, **changes}))


def cut_off(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_of_a_base_is_a_line(damage, run, experiment_of, copied):
    import re

    do, told = DAMAGE[damage]
    do(copied)
    experiment_of(copied)
    status, out, err = run("--config", "c.yaml")
    assert status == 2
    assert len(err.splitlines()) == 1
    assert any(re.search(told, line) for line in missing_in(out))


def test_a_model_section_that_does_not_fit_is_missing(run, experiment_of, tiny_checkpoint):
    experiment_of(tiny_checkpoint, model={"embed_dim": 64})
    assert (
        "weights don't fit the model section (tok_embeddings.weight: checkpoint (400, 32), model (400, 64)"
        in (run("--config", "c.yaml")[1])
    )
    experiment_of(tiny_checkpoint, model={"vocab_size": 100})
    assert "the tokenizer writes token" in run("--config", "c.yaml")[1]
    experiment_of(tiny_checkpoint, model={"lora_rnk": 3})
    assert any("lora_rnk" in line for line in missing_in(run("--config", "c.yaml")[1]))


def test_a_pickle_is_not_opened(run, experiment_of, copied):
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    experiment_of(copied)
    _, out, _ = run("--config", "c.yaml", "checkpointer.checkpoint_files=[pytorch_model.bin]")
    assert "note     pytorch_model.bin is a pickle, which isn't opened here" in out


def test_labels_of_half_stars_are_told_in_tokens(run, experiment_of, tiny_checkpoint):
    scale = {"min": 0.5, "max": 5, "step": 0.5}
    experiment_of(tiny_checkpoint, data={"format": "world", "rating_scale": scale})
    (line,) = [line for line in section_of(run("--config", "c.yaml")[1], "base") if "labels in" in line]
    assert line.startswith("ok")
    assert " 4.5=" in line


def test_a_budget_beyond_the_models_context_is_a_note(run, experiment_of, tiny_checkpoint):
    experiment_of(tiny_checkpoint)
    out = run("--config", "c.yaml", "tokenizer.max_seq_len=5000")[1]
    assert "note     rows of up to 1024 tokens, and the model takes 1024: tokenizer.max_seq_len 5000 is more" in out


def test_secrets_are_not_printed(run, experiment_of, tiny_checkpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret-key")
    monkeypatch.setenv("SERVER", "http://me:hidden-password@localhost:1/v1")
    distill = {"distiller": "openai", "base_url": "${oc.env:SERVER}"}
    experiment_of(tiny_checkpoint, distill=distill)
    status, out, err = run("--config", "c.yaml")
    assert status == 0
    assert "distill.distiller: gpt-4o at http://localhost:1/v1" in out
    assert not {"sk-very-secret-key", "hidden-password"} & set((out + err).replace("@", " ").replace(":", " ").split())


# Stages


def test_a_stage_is_finished_until_what_it_was_made_of_changes(run, experiment_of, tiny_checkpoint):
    experiment = experiment_of(tiny_checkpoint)
    Path("log.txt").write_text("a", encoding="utf-8")
    with open_stage(Path("run/data").absolute(), {"data": {"format": "world"}}, [Path("log.txt")], seed=42) as stage:
        stage.write_text("interactions.parquet", "")

    def told():
        return section_of(run("--config", "c.yaml")[1], "stages")

    assert told()[:3] == [
        "ok       persona_prepare: finished (data/)",
        "note     persona_distill: can run now (CPU)",
        "note     persona_cluster: waits for memory/; run persona_distill first",
    ]
    Path("log.txt").write_text("b", encoding="utf-8")
    assert told()[0] == "note     persona_prepare: finished, and runs again, since log.txt has changed"
    Path("c.yaml").write_text(yaml.safe_dump({**experiment, "data": {"format": "csv", "path": "log.txt"}}))
    assert told()[0] == "note     persona_prepare: finished, and runs again, since data.format has changed"
    Path("run/data/interactions.parquet").unlink()
    assert told()[0] == "note     persona_prepare: can run now (CPU)"


@pytest.mark.parametrize("manifest", ["", "[]", "3", '{"outputs": 3}', '{"outputs": {}, "settings": 1, "inputs": 2}',
                                      '{"outputs": {}, "inputs": {"c.yaml": 5}}', "[" * 100_000])  # fmt: skip
def test_a_damaged_manifest_is_no_traceback(manifest, run, experiment_of, tiny_checkpoint):
    experiment_of(tiny_checkpoint)
    Path("run/data").mkdir(parents=True)
    Path("run/data/manifest.json").write_text(manifest, encoding="utf-8")
    run("--config", "c.yaml")


def test_the_recipes_that_ask_a_server_say_so_and_no_others():
    settings = {"distill": {"distiller": "openai", "model": "m"}, "personas": {"embedder": "lsa"},
                "retrieval": {"embedder": "openai"}, "embedding": {"model": "e"}, "device": "cuda"}  # fmt: skip
    told = {name: stages.needs_of(recipe, settings) for name, recipe in stages.RECIPES.items()}
    assert told["persona_distill"] == "CPU, asks m"
    assert told["persona_cluster"] == "CPU"
    assert told["persona_raft"] == "CPU, asks e"
    assert told["persona_lora"] == "device cuda"


def finish(folder, settings=None, outputs=()):
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {"settings": settings or {}, "outputs": dict.fromkeys(outputs, "")}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def test_an_export_is_finished_when_every_set_that_is_asked_for_is(run, experiment_of, tiny_checkpoint):
    finish(Path("run/adapters/persona")), finish(Path("run/adapters/single")), finish(Path("run/export/single"))
    experiment = experiment_of(tiny_checkpoint)

    def told(**export):
        Path("c.yaml").write_text(yaml.safe_dump({**experiment, "agents": {}, "export": export}), encoding="utf-8")
        return next(line for line in section_of(run("--config", "c.yaml")[1], "stages") if "persona_export" in line)

    assert told().startswith("note     persona_export: can run now")
    assert told(sets=["single"]) == "ok       persona_export: finished (export/)"
    assert told(adapters=["all"]) == "ok       persona_export: finished (export/)"
    assert told(sets=["single"], format="merged").startswith("note     persona_export: can run now")
    finish(Path("run/export/persona"))
    assert told() == "ok       persona_export: finished (export/)"


def test_an_imported_set_is_finished_wherever_its_folder_lies(run, experiment_of, tiny_checkpoint):
    adapter_set = {"per": "all", "memories": "both", "peft": True}
    finish(Path("run/adapters/x"), {"adapter_set": adapter_set})
    experiment = experiment_of(tiny_checkpoint, adapter_sets={"x": {"per": "all", "peft": "there"}}, agents={})

    def told():
        return next(line for line in section_of(run("--config", "c.yaml")[1], "stages") if "persona_lora" in line)

    assert told() == "ok       persona_lora: finished (adapters/)"
    Path("c.yaml").write_text(yaml.safe_dump({**experiment, "adapter_sets": {"x": {"per": "all"}}}), encoding="utf-8")
    assert told().endswith("since adapter_set.peft has changed")


# Imported sets


def test_an_imported_set_is_held_against_its_base_and_not_trained(run, experiment_of, tiny_checkpoint):
    sets = {"x": {"per": "all", "peft": "lost"}}
    experiment_of(tiny_checkpoint, adapter_sets=sets, agents={"x": {"adapters": "x"}})
    status, out, _ = run("--config", "c.yaml")
    assert status == 2
    assert "  missing  adapter_sets.x.peft lost; set adapter_sets.x.peft to a folder\n" in out
    assert not any("training" in line for line in section_of(out, "base"))
    assert any("evaluation fits" in line for line in section_of(out, "base"))
    Path("lost").mkdir()
    told = section_of(run("--config", "c.yaml")[1], "base")
    assert any(line.startswith("missing") and "adapter_config.json" in line for line in told)


def test_a_peft_folder_that_fits_is_told(run, experiment_of, tiny_checkpoint):
    import torch
    from torchtune.modules.peft import get_adapter_params

    from personas_tune import config
    from personas_tune.adapters.base_model import build_on_meta
    from personas_tune.adapters.layouts import read_layout
    from personas_tune.adapters.peft_files import save_peft
    from personas_tune.adapters.peft_form import to_peft

    sets = {"x": {"per": "all", "peft": "peft"}}
    experiment_of(tiny_checkpoint, adapter_sets=sets, agents={"x": {"adapters": "x"}})
    sections = config.base_sections(config.load_experiment("c.yaml"), None)
    shapes = get_adapter_params(build_on_meta(sections["model"], "fp32"))
    weights = {name: torch.ones(weight.shape) for name, weight in shapes.items()}
    layout = read_layout(sections["checkpointer"]["model_type"], tiny_checkpoint)
    save_peft(
        Path("peft"), to_peft(weights, layout, alpha=sections["model"]["lora_alpha"], dropout=0.0, base_model="b"), {}
    )
    status, out, _ = run("--config", "c.yaml")
    assert "ok       adapter_sets.x.peft peft: 1 PEFT adapters fit the base" in out
    assert status == 0


def test_several_gpus_are_told_who_would_train_what(run, experiment_of, tiny_checkpoint, monkeypatch):
    from test_doctor_machine import give_gpus

    give_gpus(monkeypatch, n=2)
    experiment_of(tiny_checkpoint, device="cuda")
    out = run("--config", "c.yaml")[1]
    assert "training fits GPU 0 H200, 70.0 GB free" in out
    assert "tune run --nproc_per_node 2: parallel=auto: process 0: 2 adapters; process 1: 2 adapters" in out
