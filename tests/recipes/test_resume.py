"""Training that is stopped, killed or refused a checkpoint; whatever goes on ends with the bytes of an unbroken run."""

import os
import random
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
from pipelines import files_below, run_recipe, write_yaml
from several import Started
from tiny import base_sections, write_experiment

from personas_tune.training import fit
from personas_tune.training.checkpoints import MARKER, Checkpoints

N_STEPS = 12  # two personas, two epochs of three steps


def experiment(root, checkpoint):
    return {
        "output_dir": str(root),
        "seed": 3,
        **base_sections(checkpoint, lora_dropout=0.1),
        "epochs": 2,
        "batch_size": 3,
        "gradient_accumulation_steps": 2,
        "rows_per_user": 3,
        "validation_share": 0.2,
        "training": {"checkpoint_every_n_steps": 1, "prefix_sharing": "auto"},
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 0.01},
        "lr_scheduler": {
            "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup", "num_warmup_steps": 2,
        },
        "metric_logger": {
            "_component_": "torchtune.training.metric_logging.DiskLogger",
            "log_dir": "${output_dir}/logs",
            "filename": "training.txt",
        },
        "adapter_sets": {"persona": {"per": "persona"}},
    }  # fmt: skip


@pytest.fixture(scope="module")
def config(tiny_checkpoint, tmp_path_factory):
    """An experiment that waits for its adapters."""
    folder = tmp_path_factory.mktemp("resume")
    root = write_experiment(folder / "run").root
    return write_yaml(folder / "experiment.yaml", experiment(root, tiny_checkpoint))


@pytest.fixture(scope="module")
def unbroken(config, tmp_path_factory):
    """What the adapters are if nothing happens."""
    root = tmp_path_factory.mktemp("unbroken") / "run"
    shutil.copytree(config.parent / "run", root)
    assert run_recipe("persona_lora", config, f"output_dir={root}").status == 0
    return files_below(root / "adapters")


@pytest.fixture
def root(config, tmp_path):
    """A copy of the experiment's folder, to be trained in."""
    return Path(shutil.copytree(config.parent / "run", tmp_path / "run"))


def checkpoints(root):
    return root / "adapters" / ".persona.checkpoints"


def complete(root):
    """Steps of the complete checkpoints; they may come and go meanwhile."""
    with suppress(FileNotFoundError):
        names = [name for name in os.listdir(checkpoints(root)) if (checkpoints(root) / name / MARKER).exists()]
        return sorted(int(name.removeprefix("step_")) for name in names)
    return []


def finish(config, root, *overrides):
    outcome = run_recipe("persona_lora", config, f"output_dir={root}", *overrides)
    assert outcome.status == 0, outcome.err
    return outcome


def test_a_run_that_is_killed_again_and_again_ends_with_the_bytes_of_an_unbroken_one(config, root, unbroken):
    draw = random.Random(0)
    for kill in range(3):
        steps_before = max(complete(root), default=0)
        child = Started("persona_lora", config, root)
        if child.wait_until(lambda before=steps_before: max(complete(root), default=0) > before):
            time.sleep(draw.uniform(0, 0.2))
        (outcome,) = child.send(signal.SIGKILL)
        assert kill == 2 or outcome.status == -signal.SIGKILL, outcome.err
    finish(config, root)
    assert files_below(root / "adapters") == unbroken
    assert not checkpoints(root).exists()


def test_a_run_that_is_killed_while_it_saves_ends_with_the_bytes_of_an_unbroken_one(config, root, unbroken):
    for step in (1, 3, 5):
        child = Started("persona_lora", config, root, "training.keep_last_n_checkpoints=1")
        temporary = checkpoints(root) / f"step_{step}.tmp"
        assert child.wait_until(temporary.exists)
        assert child.send(signal.SIGKILL)[0].status == -signal.SIGKILL
        assert len(complete(root)) <= 2  # the one before is only removed when this one is whole
        assert max(complete(root), default=0) in (step - 1, step)
    finish(config, root)
    assert files_below(root / "adapters") == unbroken


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_told_to_stop_it_finishes_the_step_saves_it_and_says_so(config, root, unbroken, number, status):
    child = Started("persona_lora", config, root, "training.checkpoint_every_n_steps=2")
    assert child.wait_until(lambda: 2 in complete(root))
    (outcome,) = child.send(number)
    assert outcome.status == status
    (line,) = [line for line in outcome.err.splitlines() if "error" in line]
    step = max(complete(root))
    assert line == (
        f"error: interrupted: adapters/persona stopped after step {step} of {N_STEPS}, its checkpoint is kept; "
        "run the same command to go on"
    )
    resumed = finish(config, root, "resume_from_checkpoint=true")
    assert f"goes on after step {step} from {checkpoints(root)}/step_{step}" in resumed.out
    assert f"{step}/{N_STEPS}" in resumed.err  # where the progress bar begins
    assert files_below(root / "adapters") == unbroken
    logged = (root / "logs" / "training.txt").read_text().splitlines()
    assert [line.split()[1] for line in logged if " lr:" in line] == [str(n) for n in range(1, N_STEPS + 1)]


def test_before_it_trains_it_ends_at_once(config, root):
    child = Started("persona_lora", config, root)
    assert child.wait_until(lambda: list(root.glob("adapters/.persona.tmp")))
    time.sleep(0.1)
    (outcome,) = child.send(signal.SIGTERM)
    assert outcome.status == 143
    assert outcome.err.splitlines()[-1].startswith("error: interrupted: ")
    assert [path.name for path in (root / "adapters").glob("*.tmp")] == []


# Stopped after some steps, in this process


def stop_in_step(step, config, root):
    """Run until a step in which the process is told to stop."""
    step_as_ever = fit.AdapterJob.next_rows
    steps = iter(range(1, N_STEPS + 1))

    def next_rows(job, settings):
        if next(steps) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return step_as_ever(job, settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit.AdapterJob, "next_rows", next_rows)
        outcome = run_recipe("persona_lora", config, f"output_dir={root}")
    assert outcome.status == 130, outcome.err
    assert complete(root) == [step - 1, step]


@pytest.fixture(scope="module")
def stopped_run(config, tmp_path_factory):
    """A run that was told to stop in its fifth step."""
    root = Path(shutil.copytree(config.parent / "run", tmp_path_factory.mktemp("stopped") / "run"))
    stop_in_step(5, config, root)
    return root


@pytest.fixture
def stopped(stopped_run, tmp_path):
    """A copy of it, to go on with."""
    return Path(shutil.copytree(stopped_run, tmp_path / "run"))


@pytest.mark.parametrize("overrides", [
    [], ["resume_from_checkpoint=last"], ["resume_from_checkpoint=STEP_4"],
    ["training.schedule=interleaved", "training.offload_waiting=true"],
    ["training.checkpoint_every_n_steps=null", "training.keep_last_n_checkpoints=1"],
])  # fmt: skip
def test_it_goes_on_and_ends_with_the_bytes_of_an_unbroken_run(config, stopped, unbroken, overrides):
    overrides = [word.replace("STEP_4", str(checkpoints(stopped) / "step_4")) for word in overrides]
    outcome = finish(config, stopped, *overrides)
    step = 4 if "step_4" in str(overrides) else 5
    assert f"persona_lora: adapters/persona goes on after step {step} from" in outcome.out
    assert files_below(stopped / "adapters") == unbroken
    assert not checkpoints(stopped).exists()
    assert "is up to date" in finish(config, stopped, "resume_from_checkpoint=true").out


def test_told_to_stop_in_the_last_step_it_only_has_to_write_the_adapters(config, root, unbroken):
    stop_in_step(N_STEPS, config, root)
    finish(config, root)
    assert files_below(root / "adapters") == unbroken


def test_asked_to_start_anew_it_does_and_says_what_it_passes_over(config, stopped, unbroken):
    outcome = finish(config, stopped, "resume_from_checkpoint=false")
    assert f"persona_lora: adapters/persona: {checkpoints(stopped)}/step_5 is passed over" in outcome.out
    assert f"0/{N_STEPS}" in outcome.err
    assert files_below(stopped / "adapters") == unbroken


def test_after_other_settings_it_starts_anew_and_says_why(config, stopped):
    outcome = finish(config, stopped, "optimizer.lr=0.02", "max_steps_per_epoch=1")
    assert "of another training (max_steps_per_epoch was None, is 1, optimizer.lr was 0.01, is 0.02)" in outcome.out
    assert not checkpoints(stopped).exists()


def test_a_later_set_starts_anew_while_the_one_that_was_stopped_goes_on(config, stopped):
    outcome = finish(config, stopped, "resume_from_checkpoint=true", "adapter_sets.single={per: all, rows: 6}")
    assert outcome.out.count("goes on after step") == 1
    assert (stopped / "adapters" / "single" / "manifest.json").is_file()


@pytest.mark.parametrize("damage", ["cut", "foreign", "other base", "incomplete", "missing", "another set's"])
def test_a_checkpoint_that_doesnt_do_is_refused_in_a_line_and_nothing_changes(config, stopped, damage, tmp_path):
    last = checkpoints(stopped) / "step_5"
    overrides = ["resume_from_checkpoint=true"]
    if damage == "cut":
        file = last / "adapter_1.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
        expected = f"{last}: the checkpoint is damaged (adapter_1.safetensors is not what was written)"
    elif damage == "foreign":
        overrides += ["epochs=3"]
        expected = f"{last}: the checkpoint is of another training (epochs was 2, is 3)"
    elif damage == "other base":
        base = shutil.copytree(config_checkpoint(config), tmp_path / "base")
        weights = bytearray((base / "model.safetensors").read_bytes())
        weights[-1] ^= 1
        (base / "model.safetensors").write_bytes(weights)
        overrides += [f"checkpointer.checkpoint_dir={base}"]
        expected = f"{last}: the checkpoint is of another training (model.safetensors has changed)"
    elif damage == "incomplete":
        (last / MARKER).unlink()
        overrides = [f"resume_from_checkpoint={last}"]
        expected = f"{last}: the checkpoint is not complete (it has no {MARKER})"
    elif damage == "missing":
        shutil.rmtree(checkpoints(stopped))
        expected = f"{checkpoints(stopped)}: no complete checkpoint"
    else:
        overrides = [f"resume_from_checkpoint={last}", "~adapter_sets.persona", "adapter_sets.other={per: persona}"]
        expected = f"{last}: the checkpoint is of another training (the set was persona, is other)"
    before = files_below(stopped)
    outcome = run_recipe("persona_lora", config, f"output_dir={stopped}", *overrides)
    assert outcome.status == 2
    assert outcome.err.startswith(f"error: {expected}; ")
    assert len(outcome.err.splitlines()) == 1
    assert files_below(stopped) == before


def config_checkpoint(config):
    import yaml

    return Path(yaml.safe_load(config.read_text())["checkpointer"]["checkpoint_dir"])


def test_without_checkpoints_none_is_written(config, root, unbroken):
    finish(config, root, "training.keep_last_n_checkpoints=0")
    assert not checkpoints(root).exists()
    assert files_below(root / "adapters") == unbroken


def test_by_default_a_checkpoint_is_written_whenever_an_adapter_ends_an_epoch(config, root, monkeypatch):
    saved = []
    save_as_ever = Checkpoints.save
    monkeypatch.setattr(
        Checkpoints, "save", lambda self, step, *rest: (saved.append(step), save_as_ever(self, step, *rest))
    )
    finish(config, root, "training.checkpoint_every_n_steps=null")
    assert saved == [3, 6, 9]  # after the last step the adapters themselves are written


def test_the_order_of_steps_and_waiting_in_cpu_memory_change_no_byte(config, root, unbroken):
    finish(config, root, "training.schedule=interleaved", "training.offload_waiting=true")
    assert files_below(root / "adapters") == unbroken
    finish(config, root)  # and don't make the set anew
