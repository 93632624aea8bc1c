"""Better agents through the real recipes: like-minded users in the prompt, calibration, hybrids."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from pipelines import rows, run_recipe

from personas_tune.datasets import RatingSource
from personas_tune.prompts.render import render_prompt


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


def test_calibration_and_hybrids(csv_run, root):
    ran(
        "persona_eval", csv_run, root,
        "~agents.single", "agents.mended={adapters: persona, calibrate: true}", "evaluation.hybrids=[persona]",
        "evaluation.calibration_share=0.5",
    )  # fmt: skip
    raw, mended = (
        np.array([row["p"] for row in rows(root, f"eval/predictions_{name}")]) for name in ("persona", "mended")
    )
    np.testing.assert_allclose(mended.sum(1), 1)
    assert np.abs(mended - raw).max() > 0.01
    metrics = json.loads((root / "eval" / "metrics.json").read_text())
    baselines = {row["name"]: row for row in metrics["baselines"]}
    assert baselines["hybrid_persona"]["rmse"] != baselines["hybrid_without_agent"]["rmse"]
    pairs = {(pair["a"], pair["b"]) for pair in metrics["paired"]}
    assert ("hybrid_persona", "hybrid_without_agent") in pairs
    named = {agent["name"]: agent["calibrated"] for agent in metrics["agents"]}
    assert named["mended"]
    assert not named["persona"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("agents.base={readout: generate, calibrate: true}", "set readout to expected or argmax"),
        ("evaluation.hybrids=[nobody]", "evaluation.hybrids: no agent 'nobody'; under agents: base"),
        ("retrieval.neighbours=-1", "retrieval.neighbours"),
    ],
)
def test_what_makes_no_sense_is_told(csv_run, root, override, said):
    outcome = run_recipe("persona_eval", csv_run.config, f"output_dir={root}", override)
    assert outcome.status == 2
    assert said in outcome.err
