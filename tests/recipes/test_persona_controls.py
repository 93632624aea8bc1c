"""Do personas help: adapters on rows of all users or on growing shares, their losses, own against other adapters."""

import hashlib
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pipelines import files_below, rows, run_recipe, write_yaml
from several import Started
from test_resume import complete, experiment, stop_in_step
from tiny import N_TRAIN, N_USERS, write_experiment

from personas_tune.training.checkpoints import MARKER


@pytest.fixture(scope="module")
def config(tiny_checkpoint, tmp_path_factory):
    """An experiment that waits for its adapters."""
    folder = tmp_path_factory.mktemp("controls")
    root = write_experiment(folder / "run").root
    return write_yaml(folder / "experiment.yaml", experiment(root, tiny_checkpoint))


@pytest.fixture
def root(config, tmp_path):
    """A copy of the experiment's folder."""
    return Path(shutil.copytree(config.parent / "run", tmp_path / "run"))


def trained(config, root, *overrides):
    outcome = run_recipe("persona_lora", config, f"output_dir={root}", *overrides)
    assert outcome.status == 0, outcome.err
    return outcome


def n_rows(root, adapter_set):
    return {
        path.parent.name: json.loads(path.read_text())["rows"]
        for path in sorted((root / "adapters" / adapter_set).glob("*/training.json"))
    }


def test_adapters_are_trained_on_shares_and_on_rows_of_all_users(config, root):
    trained(
        config, root, "epochs=1", "max_steps_per_epoch=1", "validation_share=null",
        "adapter_sets.from_all={per: persona, rows_from: all}",
        "adapter_sets.half={per: persona, share: 0.5}",
        "adapter_sets.third={per: all, share: 0.3334}",
    )  # fmt: skip
    half = N_USERS * N_TRAIN // 2
    assert n_rows(root, "persona") == n_rows(root, "from_all") == {"0": half, "1": half}
    assert n_rows(root, "half") == {"0": half // 2, "1": half // 2}
    assert n_rows(root, "third") == {"all": N_USERS * N_TRAIN // 3}
    files = files_below(root / "adapters")
    assert files["from_all/assignment.parquet"] == files["persona/assignment.parquet"]
    assert files["from_all/0/adapter.safetensors"] != files["persona/0/adapter.safetensors"]


def test_losses_are_those_that_were_logged_and_dont_depend_on_logging(config, root, tmp_path):
    trained(config, root)
    losses = rows(root, "adapters/persona/losses")
    assert [(row["adapter"], row["step"]) for row in losses] == [(a, s) for a in ("0", "1") for s in range(1, 7)]
    lines = [line for line in (root / "logs" / "training.txt").read_text().splitlines() if " lr:" in line]
    logged = [dict(word.rsplit(":", 1) for word in line.split() if ":" in word) for line in lines]
    for row, line in zip(losses, logged, strict=True):
        assert row["loss"] == float(line[f"loss/persona/{row['adapter']}"])
        assert row["learning_rate"] == float(line["lr"])
    for adapter in ("0", "1"):
        record = json.loads((root / "adapters" / "persona" / adapter / "training.json").read_text())
        mine = [row for row in losses if row["adapter"] == adapter]
        assert [row["validation_loss"] for row in mine if row["validation_loss"]] == record["validation_losses"]
        assert sum(row["n_rows"] for row in mine) == 2 * record["rows"]
    other = Path(shutil.copytree(config.parent / "run", tmp_path / "other"))
    trained(config, other, "log_every_n_steps=5", "training.schedule=interleaved")
    assert files_below(other / "adapters") == files_below(root / "adapters")


def make_old(checkpoint):
    """Take out of a checkpoint what training wrote nothing of before shares and losses were there."""
    marker = json.loads((checkpoint / MARKER).read_text())
    content = marker["content"]
    for key in ("share", "rows_from"):
        del content["origin"]["settings"]["adapter_set"][key]
    for name, part in content["parts"].items():
        if name.startswith("adapter_"):
            state = json.loads((checkpoint / f"{name}.json").read_text())
            state["dict"] = [pair for pair in state["dict"] if pair[0] != "history"]
            (checkpoint / f"{name}.json").write_text(json.dumps(state))
            part["files"][f"{name}.json"] = hashlib.sha256((checkpoint / f"{name}.json").read_bytes()).hexdigest()
    sha = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (checkpoint / MARKER).write_text(json.dumps({"sha256": sha, "content": content}))


def test_a_checkpoint_of_before_there_were_losses_is_refused_or_passed_over(config, root):
    stop_in_step(4, config, root)
    for step in complete(root):
        make_old(root / "adapters" / ".persona.checkpoints" / f"step_{step}")
    why = "of another training (adapter_set.rows_from was not set, is own, adapter_set.share was not set, is 1)"
    refused = run_recipe("persona_lora", config, f"output_dir={root}", "resume_from_checkpoint=true")
    assert (refused.status, len(refused.err.splitlines())) == (2, 1)
    assert why in refused.err
    assert f"the checkpoint of step 4 is {why}" in trained(config, root).out
    assert len(rows(root, "adapters/persona/losses")) == 12


CROSSWISE = "evaluation.own_versus_other=[persona,persona_generate]"


@pytest.fixture(scope="module")
def crosswise(csv_run, tmp_path_factory):
    """The CSV pipeline, evaluated with every adapter."""
    root = Path(shutil.copytree(csv_run.root, tmp_path_factory.mktemp("crosswise") / "run"))
    outcome = run_recipe("persona_eval", csv_run.config, f"output_dir={root}", CROSSWISE)
    assert outcome.status == 0, outcome.err
    return root


def metrics_of(root):
    return json.loads((root / "eval" / "metrics.json").read_text())


def test_own_and_other_adapters_are_measured_as_if_users_had_been_given_them(csv_run, crosswise, copy_of):
    """The other half of the matrix is what an evaluation finds when the two personas' adapters are swapped."""
    metrics = metrics_of(crosswise)
    root = copy_of(csv_run)
    assignment = rows(root, "adapters/persona/assignment")
    swapped = {
        "user_id": [row["user_id"] for row in assignment],
        "adapter": [str(1 - int(row["adapter"])) for row in assignment],
    }
    pq.write_table(pa.table(swapped), root / "adapters" / "persona" / "assignment.parquet")
    shutil.rmtree(root / "eval")
    assert (
        run_recipe("persona_eval", csv_run.config, f"output_dir={root}", "~agents.base", "~agents.single").status == 0
    )
    measured = metrics["own_versus_other"]["persona"]
    (own,) = (agent for agent in metrics["agents"] if agent["name"] == "persona")
    (other,) = (agent for agent in metrics_of(root)["agents"] if agent["name"] == "persona")
    assert measured["adapters"] == measured["personas"] == ["0", "1"]
    for persona in (0, 1):
        there, elsewhere = (agent["per_persona"][str(persona)] for agent in (own, other))
        assert measured["n"][persona] == there["n"]
        for figure in ("rmse", "mae"):
            assert measured[figure][persona][persona] == pytest.approx(there[figure], abs=1e-9)
            assert measured[figure][1 - persona][persona] == pytest.approx(elsewhere[figure], abs=1e-5)
    low, high = (measured["own_minus_other"][end] for end in ("low", "high"))
    assert low <= measured["own_minus_other"]["difference"] <= high
    assert metrics["own_versus_other"]["persona_generate"] == measured  # both by their distributions
    table = (crosswise / "eval" / "table.md").read_text()
    assert "persona: RMSE with adapter | users of 0 (n=" in table
    assert "persona: RMSE with the own adapter (*) minus RMSE with those of other personas is" in table


def test_of_several_processes_each_tries_its_share_of_the_rows(csv_run, crosswise, copy_of):
    root = copy_of(csv_run)
    shutil.rmtree(root / "eval")
    outcomes = Started("persona_eval", csv_run.config, root, CROSSWISE, size=2).end()
    assert [outcome.status for outcome in outcomes] == [0, 0], outcomes[0].err
    there, here = (metrics_of(each)["own_versus_other"]["persona"] for each in (root, crosswise))
    assert there["n"] == here["n"]
    for one, other in zip(there["rmse"], here["rmse"], strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_fewer_rows_are_as_many_of_each_persona(csv_run, copy_of):
    root = copy_of(csv_run)
    overrides = ["evaluation.own_versus_other=[persona]", "evaluation.own_versus_other_rows=10", "~agents.base"]
    outcome = run_recipe("persona_eval", csv_run.config, f"output_dir={root}", "~agents.single", *overrides)
    assert outcome.status == 0, outcome.err
    assert metrics_of(root)["own_versus_other"]["persona"]["n"] == [5, 5]


def test_persona_adapters_begin_where_the_adapter_for_all_ended(config, root):
    trained(
        config, root, "epochs=1", "optimizer.lr=0", "validation_share=null",
        "~adapter_sets.persona",
        "adapter_sets.single={per: all}",
        "adapter_sets.onward={per: persona, start_from: single}",
        "adapter_sets.fresh={per: persona}",
    )  # fmt: skip
    files = files_below(root / "adapters")
    single = files["single/all/adapter.safetensors"]
    assert files["onward/0/adapter.safetensors"] == files["onward/1/adapter.safetensors"] == single
    assert files["fresh/0/adapter.safetensors"] != single


@pytest.fixture(scope="module")
def onward(config, tiny_checkpoint, tmp_path_factory):
    """An experiment whose set `persona` begins with `single`, which is trained; and the finished one's folder."""
    folder = tmp_path_factory.mktemp("onward")
    root = Path(shutil.copytree(config.parent / "run", folder / "run"))
    sets = {"single": {"per": "all"}, "persona": {"per": "persona", "start_from": "single"}}
    onward = write_yaml(folder / "onward.yaml", {**experiment(root, tiny_checkpoint), "adapter_sets": sets})
    trained(onward, root, "~adapter_sets.persona")
    trained(onward, Path(shutil.copytree(root, folder / "finished")))
    return onward


def test_a_set_is_stale_when_the_one_that_it_begins_with_is_trained_again(onward, tmp_path):
    root = Path(shutil.copytree(onward.parent / "finished", tmp_path / "run"))
    before = files_below(root / "adapters")
    again = trained(onward, root).out
    assert "adapters/single is up to date" in again
    assert "adapters/persona is up to date" in again
    changed = trained(onward, root, "adapter_sets.single.share=0.5").out
    assert "is up to date" not in changed
    after = files_below(root / "adapters")
    for adapter in ("single/all", "persona/0", "persona/1"):
        assert after[f"{adapter}/adapter.safetensors"] != before[f"{adapter}/adapter.safetensors"]
    assert "adapters/persona is up to date" not in trained(onward, root).out  # with `single` as it was
    assert files_below(root / "adapters") == before


def test_a_stopped_set_that_begins_with_another_goes_on_to_the_same_bytes(onward, tmp_path):
    root = Path(shutil.copytree(onward.parent / "run", tmp_path / "run"))
    stop_in_step(5, onward, root)
    assert "adapters/persona goes on after step 5" in trained(onward, root).out
    assert files_below(root / "adapters") == files_below(onward.parent / "finished" / "adapters")


def test_a_checkpoint_of_a_set_that_began_with_other_weights_is_refused(onward, tmp_path):
    root = Path(shutil.copytree(onward.parent / "run", tmp_path / "run"))
    stop_in_step(5, onward, root)
    trained(onward, root, "adapter_sets.single.share=0.5", "~adapter_sets.persona")
    overrides = ["adapter_sets.single.share=0.5", "resume_from_checkpoint=true"]
    refused = run_recipe("persona_lora", onward, f"output_dir={root}", *overrides)
    assert (refused.status, len(refused.err.splitlines())) == (2, 1)
    assert "of another training (adapter.safetensors has changed)" in refused.err


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        ("{b: {per: persona, start_from: a}, a: {per: all}}", "no set 'a' of one adapter or of imported ones on that"),
        ("{a: {per: persona}, b: {per: persona, start_from: a}}", "such are: none"),
        ("{a: {per: all}, b: {per: persona, start_from: c}}", "such are: a"),
    ],
)
def test_a_set_begins_with_one_adapter_that_is_trained_before(config, root, sets, said):
    outcome = run_recipe("persona_lora", config, f"output_dir={root}", "~adapter_sets", f"adapter_sets={sets}")
    assert outcome.status == 2
    assert said in outcome.err
