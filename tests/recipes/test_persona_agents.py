"""Better agents through the real recipes: like-minded users in the prompt, calibration, hybrids."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pipelines import rows, run_recipe
from several import Started

from personas_tune.datasets import RatingSource
from personas_tune.evaluation.calibration import fit_calibration
from personas_tune.prompts.render import render_prompt
from personas_tune.workspace import MANIFEST


@pytest.fixture
def root(csv_run, tmp_path):
    """A copy of a finished run."""
    return Path(shutil.copytree(csv_run.root, tmp_path / "run"))


def ran(recipe, csv_run, root, *overrides):
    outcome = run_recipe(recipe, csv_run.config, f"output_dir={root}", *overrides)
    assert outcome.status == 0, outcome.err
    return outcome


def test_prompts_end_with_what_like_minded_users_say(csv_run, root):
    ran("persona_raft", csv_run, root, "retrieval.neighbours=5")
    source = RatingSource(root)
    for split in ("train", "test"):
        for sample, row in zip(source.samples(split), rows(root, f"samples/{split}"), strict=True):
            said = render_prompt(source.template, source.parts(sample, "both"))[-1]["content"].splitlines()[-1]
            assert f"give it {row['neighbours_rating']:.1f} on my scale." in said
            assert (f"({row['n_neighbours']})" in said) == (row["n_neighbours"] > 0)
    ran("persona_raft", csv_run, root)
    assert "neighbours_rating" not in rows(root, "samples/test")[0]


def test_the_evidence_in_the_prompt_is_a_baseline_of_its_own(csv_run, root):
    ran("persona_raft", csv_run, root, "retrieval.neighbours=5")
    ran("persona_eval", csv_run, root, "~agents.persona", "~agents.single")
    metrics = json.loads((root / "eval" / "metrics.json").read_text())
    evidence = next(row for row in metrics["baselines"] if row["name"] == "neighbours")
    test = rows(root, "samples/test")
    errors = [row["neighbours_rating"] - row["rating"] for row in test]
    assert evidence["rmse"] == pytest.approx(np.sqrt(np.mean(np.square(errors))))
    assert ("base", "neighbours") in {(pair["a"], pair["b"]) for pair in metrics["paired"]}


LEARNING = (
    "~agents.single", "agents.mended={adapters: persona, calibrate: true}", "evaluation.hybrids=[persona]",
    "evaluation.calibration_share=0.5",
)  # fmt: skip


def distributions(root, name):
    return np.array([row["p"] for row in rows(root, f"eval/predictions_{name}")])


def metrics_of(root):
    return json.loads((root / "eval" / "metrics.json").read_text())


@pytest.fixture(scope="module")
def learning(csv_run, tmp_path_factory):
    """A run with a calibrated agent and a hybrid, what it printed, and what it calibrated on."""
    root = Path(shutil.copytree(csv_run.root, tmp_path_factory.mktemp("learning") / "run"))
    asked = []

    def spy(*arguments):
        asked.append(arguments)
        return fit_calibration(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("personas_tune.evaluation.calibration.fit_calibration", spy)
        outcome = ran("persona_eval", csv_run, root, *LEARNING)
    return root, outcome, asked


def test_calibration_and_hybrids(learning):
    root, _, _ = learning
    raw, mended = distributions(root, "persona"), distributions(root, "mended")
    np.testing.assert_allclose(mended.sum(1), 1)
    assert np.abs(mended - raw).max() > 0.01
    metrics = metrics_of(root)
    baselines = {row["name"]: row for row in metrics["baselines"]}
    assert baselines["hybrid_persona"]["rmse"] != baselines["hybrid_without_agent"]["rmse"]
    pairs = {(pair["a"], pair["b"]) for pair in metrics["paired"]}
    assert ("hybrid_persona", "hybrid_without_agent") in pairs
    named = {agent["name"]: agent["calibrated"] for agent in metrics["agents"]}
    assert named["mended"]
    assert not named["persona"]


def test_an_agent_is_calibrated_on_the_later_half_of_each_users_train_rows(learning):
    root, _, asked = learning
    ((p_train, ratings, users, labels),) = asked
    p = distributions(root, "persona")
    by_user = {}
    for row in rows(root, "samples/train"):
        by_user.setdefault(row["user_id"], []).append((row["position"], row["rating"]))
    later = {
        user: [rating for _, rating in sorted(each)[len(each) - len(each) // 2 :]] for user, each in by_user.items()
    }
    assert {user: [r for r, u in zip(ratings, users, strict=True) if u == user] for user in later} == later
    assert p_train.shape == (len(ratings), len(labels))
    assert not np.array_equal(p_train[: len(p)], p[: len(p_train)])
    told = fit_calibration(p_train, ratings, users, labels).apply(p)
    np.testing.assert_allclose(told, distributions(root, "mended"), atol=1e-9)


def test_agents_calibrated_on_rows_that_adapters_know_are_named(learning):
    root, outcome, _ = learning
    (warned,) = (line for line in outcome.out.splitlines() if "warning: agent mended" in line)
    assert "adapter set persona" in warned
    assert "validation_share=0.5 and train again" in warned
    known = {agent["name"]: agent["calibrated_on_trained_rows"] for agent in metrics_of(root)["agents"]}
    assert known == {"base": False, "persona": True, "persona_generate": False, "mended": True}
    assert "rows that the adapters were trained on: persona, mended." in (root / "eval" / "table.md").read_text()


def test_calibration_sees_no_test_rating_and_is_clean_on_rows_held_out(csv_run, learning, root):
    test = pq.read_table(root / "samples" / "test.parquet")
    at = test.column_names.index("rating")
    pq.write_table(test.set_column(at, "rating", pa.array([3.0] * len(test))), root / "samples" / "test.parquet")
    manifest = root / "adapters" / "persona" / MANIFEST
    written = json.loads(manifest.read_text())
    written["settings"]["validation_share"] = 0.5
    manifest.write_text(json.dumps(written))
    outcome = ran("persona_eval", csv_run, root, *LEARNING, "~agents.base", "~agents.persona_generate")
    assert {row["rating"] for row in rows(root, "eval/predictions_mended")} == {3.0}
    np.testing.assert_allclose(distributions(root, "mended"), distributions(learning[0], "mended"), atol=1e-6)
    assert "warning" not in outcome.out
    assert not any(agent["calibrated_on_trained_rows"] for agent in metrics_of(root)["agents"])


def test_two_processes_calibrate_as_one_does(csv_run, learning, root):
    shutil.rmtree(root / "eval")
    outcomes = Started("persona_eval", csv_run.config, root, *LEARNING, "~agents.persona_generate", size=2).end()
    assert [outcome.status for outcome in outcomes] == [0, 0], outcomes[0].err
    np.testing.assert_allclose(distributions(root, "mended"), distributions(learning[0], "mended"), atol=1e-4)
    there, here = ({row["name"]: row["rmse"] for row in metrics_of(each)["baselines"]} for each in (root, learning[0]))
    assert there == pytest.approx(here, abs=1e-4)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["agents.base={readout: generate, calibrate: true}"], "set readout to expected or argmax"),
        (["evaluation.hybrids=[nobody]"], "evaluation.hybrids: no agent 'nobody'; under agents: base"),
        (["retrieval.neighbours=-1"], "retrieval.neighbours"),
        (["agents.neighbours={}"], "'neighbours' is the name of a baseline; rename the agent"),
        (["agents.hybrid_base={}"], "'hybrid_base' is the name of a baseline; rename the agent"),
        (["evaluation.hybrids=[base,base]"], "an agent is named twice"),
        (
            ["evaluation.hybrids=[base]", "evaluation.calibration_share=0.001"],
            "train rows of two users, there are 0 rows",
        ),
    ],
)
def test_what_makes_no_sense_is_told(csv_run, root, overrides, said):
    outcome = run_recipe("persona_eval", csv_run.config, f"output_dir={root}", *overrides)
    assert outcome.status == 2
    assert said in outcome.err
