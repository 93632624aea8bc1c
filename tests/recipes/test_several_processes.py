"""Training and evaluating in several processes: what one process does, however the work is shared."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from pipelines import files_below, read, run_recipe, tune, write_yaml
from safetensors.torch import load_file
from several import Started
from test_resume import N_STEPS, checkpoints, complete, experiment
from tiny import write_experiment

SLOWLY = "loss={_component_: mishaps.SlowLoss}"
WITHOUT_DROPOUT = (
    "model.lora_dropout=0", "optimizer._component_=torch.optim.SGD", "optimizer.lr=1", "~lr_scheduler",
    "max_steps_per_epoch=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def config(tiny_checkpoint, tmp_path_factory):
    """An experiment that waits for its adapters."""
    folder = tmp_path_factory.mktemp("processes")
    root = write_experiment(folder / "run").root
    return write_yaml(folder / "experiment.yaml", experiment(root, tiny_checkpoint))


@pytest.fixture
def root(config, tmp_path):
    """A copy of the experiment's folder."""
    return Path(shutil.copytree(config.parent / "run", tmp_path / "run"))


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    """Trains a copy in so many processes; gives its folder, the same for the same arguments."""
    roots = {}

    def train(size, *overrides):
        if (size, overrides) not in roots:
            root = Path(shutil.copytree(config.parent / "run", tmp_path_factory.mktemp("trained") / "run"))
            finish(config, root, *overrides, size=size)
            roots[size, overrides] = root
        return roots[size, overrides]

    return train


def finish(config, root, *overrides, size, recipe="persona_lora"):
    """Run a recipe to its end; gives what the first process printed, the others being silent."""
    first, *others = Started(recipe, config, root, *overrides, size=size).end()
    assert [first.status, *(other.status for other in others)] == [0] * size, "".join(o.err for o in [first, *others])
    assert [other.out + other.err for other in others] == [""] * (size - 1)
    return first


# Training


@pytest.mark.parametrize(("size", "parallel"), [(2, "auto"), (3, "persona")])
def test_personas_placed_on_processes_get_the_bytes_of_one_process(trained, size, parallel):
    """With dropout, and if a process is left over."""
    root = trained(size, f"parallel={parallel}")
    assert files_below(root / "adapters") == files_below(trained(1) / "adapters")
    assert not checkpoints(root).exists()
    logged = (root / "logs" / "training.txt").read_text().splitlines()
    assert [line.split()[1] for line in logged if " lr:" in line] == [str(n) for n in range(1, N_STEPS + 1)]


@pytest.mark.parametrize(("size", "parallel"), [(2, "data"), (4, "auto"), (2, "fsdp")])
def test_without_dropout_processes_that_share_rows_come_to_the_same_gradients(trained, size, parallel):
    """Two steps of SGD at a rate of 1."""
    alone = trained(1, *WITHOUT_DROPOUT) / "adapters" / "persona"
    shared = trained(size, f"parallel={parallel}", *WITHOUT_DROPOUT) / "adapters" / "persona"
    for persona in ("0", "1"):
        there = load_file(shared / persona / "adapter.safetensors")
        for name, weight in load_file(alone / persona / "adapter.safetensors").items():
            torch.testing.assert_close(there[name], weight, rtol=1e-5, atol=1e-6)
    assert (shared / "assignment.parquet").read_bytes() == (alone / "assignment.parquet").read_bytes()


# Stopped and killed


@pytest.mark.parametrize(("parallel", "size_at_last"), [("auto", 1), ("data", 2), ("fsdp", 2)])
def test_killed_again_and_again_they_end_with_the_bytes_of_an_unbroken_run(
    config, root, trained, parallel, size_at_last
):
    kept = f"parallel={parallel}"
    draw = random.Random(0)
    for _ in range(2):
        steps_before = max(complete(root), default=0)
        run = Started("persona_lora", config, root, kept, SLOWLY, size=2)
        assert run.wait_until(lambda before=steps_before: max(complete(root), default=0) > before)
        time.sleep(draw.uniform(0, 0.1))
        assert [outcome.status for outcome in run.send(signal.SIGKILL)] == [-signal.SIGKILL] * 2
    printed = finish(config, root, kept, SLOWLY, size=size_at_last).out
    assert "adapters/persona goes on after step" in printed
    unbroken = trained(1) if size_at_last == 1 else trained(2, kept)
    assert files_below(root / "adapters") == files_below(unbroken / "adapters")


def stop_one(config, root, number, *overrides):
    """Tell the second of two processes to stop; gives after which step they did."""
    run = Started("persona_lora", config, root, SLOWLY, *overrides, size=2)
    assert run.wait_until(lambda: bool(complete(root)))
    outcomes = run.send(number, ranks=[1])
    assert [outcome.status for outcome in outcomes] == [128 + number] * 2
    step = max(complete(root))
    assert errors_of(outcomes) == [
        f"error: interrupted: adapters/persona stopped after step {step} of {N_STEPS}, its checkpoint is kept; "
        "run the same command to go on"
    ]
    return step


def errors_of(outcomes):
    """All that they have printed on stderr but the progress, and what torchtune says."""
    lines = [line for outcome in outcomes for line in outcome.err.replace("\r", "\n").splitlines()]
    progress = ("train ", "persona/", "Converting Phi weights")
    return [line for line in lines if line.strip() and not line.startswith(progress)]


def test_told_to_stop_one_process_stops_all_and_more_may_go_on_with_whole_personas(config, root, trained):
    step = stop_one(config, root, signal.SIGTERM, "parallel=persona")
    resumed = finish(config, root, "parallel=persona", SLOWLY, "resume_from_checkpoint=true", size=3)
    assert f"goes on after step {step} from {checkpoints(root)}/step_{step}" in resumed.out
    assert files_below(root / "adapters") == files_below(trained(1) / "adapters")


def test_processes_that_shared_rows_go_on_as_many_and_others_say_why_they_dont(config, root, trained, tmp_path):
    step = stop_one(config, root, signal.SIGINT, "parallel=data")
    why = "is of another training (processes of adapter 0 was 2, is not set, processes of adapter 1 was 2, is not set)"
    refused = run_recipe("persona_lora", config, f"output_dir={root}", SLOWLY, "resume_from_checkpoint=true")
    assert refused.status == 2
    assert refused.err.startswith(f"error: {checkpoints(root)}/step_{step}: the checkpoint {why}; ")
    assert len(refused.err.splitlines()) == 1
    other = Path(shutil.copytree(root, tmp_path / "other"))
    anew = run_recipe("persona_lora", config, f"output_dir={other}", SLOWLY)
    assert f"persona_lora: adapters/persona: the checkpoint of step {step} {why}\n" in anew.out
    assert files_below(other / "adapters") == files_below(trained(1) / "adapters")
    finish(config, root, "parallel=data", SLOWLY, size=2)
    assert files_below(root / "adapters") == files_below(trained(2, "parallel=data") / "adapters")


@pytest.mark.parametrize("ranks", [[1], [0, 1]])
def test_told_to_stop_before_training_they_end_in_a_line(config, root, ranks):
    run = Started("persona_lora", config, root, size=2)
    assert run.wait_until(lambda: any(path.name.endswith(".tmp") for path in root.glob("adapters/.*")))
    time.sleep(0.1)
    outcomes = run.send(signal.SIGTERM, ranks)
    assert all(outcome.status in (2, 143) for outcome in outcomes)
    (line,) = errors_of(outcomes)
    assert line.startswith("error: interrupted: ")
    assert nothing_half_written(root)


# Mistakes and mishaps


def nothing_half_written(root):
    """Whether there is nothing but complete checkpoints."""
    found = [path.name for path in (root / "adapters").glob("*")] if (root / "adapters").exists() else []
    left = {path.name for path in checkpoints(root).glob("*")} if checkpoints(root).exists() else set()
    return found in ([], [".persona.checkpoints"]) and left == {f"step_{step}" for step in complete(root)}


@pytest.mark.parametrize(("overrides", "expected"), [
    (["epochs=0"], "epochs is 0"),
    (["optimizer._component_=torch.optim.Adamm"], "optimizer"),
    (["checkpointer.checkpoint_dir=nowhere"], "nowhere: checkpoint folder not found"),
    (["loss={_component_: mishaps.NanInSecondProcess}", "training.prefix_sharing=off"],
     "adapter persona/1: loss is nan at step 3"),
    (["loss={_component_: mishaps.NanInSecondProcess}", "training.prefix_sharing=off", "parallel=data"],
     "adapter persona/0: loss is nan at step "),
    (["optimizer._component_=mishaps.FullDiskInSecondProcess"], "a checkpoint can't be written"),
])  # fmt: skip
def test_what_goes_wrong_in_one_process_or_in_all_is_said_once_and_all_end(config, root, overrides, expected):
    outcomes = Started("persona_lora", config, root, *overrides, size=2).end()
    (line,) = errors_of(outcomes)
    assert line.startswith("error: ")
    assert expected in line
    assert [outcome.status for outcome in outcomes] == [2, 2]
    assert nothing_half_written(root)


def test_a_process_of_a_team_that_is_gone_is_missed_by_the_others(config, root):
    run = Started(
        "persona_lora", config, root, SLOWLY, "parallel=data", "training.checkpoint_every_n_steps=null", size=2
    )
    assert run.wait_until(lambda: (root / "logs").exists())
    time.sleep(0.1)
    first, second = run.send(signal.SIGKILL, ranks=[1])
    assert (first.status, second.status) == (2, -signal.SIGKILL)
    (line,) = errors_of([first])
    assert line.startswith("error: several processes: another process can't be reached (")


# Evaluating, and all stages


def assert_same_evaluation(root, expected):
    assert (root / "eval" / "table.md").read_text() == (expected / "eval" / "table.md").read_text()
    for agent in ("base", "single", "persona", "persona_generate"):
        ours, theirs = (read(each, f"eval/predictions_{agent}") for each in (root, expected))
        p, p_there = (torch.tensor(table["p"].to_pylist()) for table in (ours, theirs))
        torch.testing.assert_close(p, p_there, rtol=0, atol=1e-4)
        for column in set(theirs.column_names) - {"p", "expected"}:
            assert ours[column].equals(theirs[column]), (agent, column)


@pytest.mark.parametrize(("size", "parallel"), [(4, "auto"), (2, "fsdp")])
def test_an_evaluation_is_the_same_in_several_processes(csv_run, copy_of, size, parallel):
    root = copy_of(csv_run)
    shutil.rmtree(root / "eval")
    printed = finish(csv_run.config, root, f"parallel={parallel}", size=size, recipe="persona_eval").out
    assert str(root / "eval" / "table.md") in printed
    assert_same_evaluation(root, csv_run.root)


def test_a_pipeline_runs_the_stages_before_training_once(csv_run, tmp_path):
    root = tmp_path / "run"
    printed = finish(csv_run.config, root, "parallel=persona", size=2, recipe="persona_pipeline").out
    assert printed.count("] persona_prepare\n") == printed.count("cohort: 6 users") == 1
    assert "adapters/persona: " in printed
    made, expected = files_below(root), files_below(csv_run.root)
    assert made.keys() == expected.keys()
    assert [name for name in made if not name.startswith(("eval/", "report/")) and made[name] != expected[name]] == []
    assert_same_evaluation(root, csv_run.root)


# With torchrun


def test_under_torchrun_a_mistake_of_one_process_is_said_once(config, root):
    outcome = tune(
        root.parent, "run", "--nproc_per_node", "2", "persona_lora", "--config", config, f"output_dir={root}",
        "loss={_component_: mishaps.NanInSecondProcess}", "training.prefix_sharing=off",
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
    )  # fmt: skip
    assert outcome.status == 1  # torchrun's
    said = "error: adapter persona/1: loss is nan at step 3; lower optimizer.lr\n"
    assert outcome.err.count("error: ") == outcome.err.count(said) == 1
    assert nothing_half_written(root)
