"""What a user types: `tune run`, `tune validate`, from any folder."""

import os
import sys
from pathlib import Path

import pytest
from pipelines import Finished, csv_experiment, run_recipe, small_log, stage_folders, tune, write_yaml
from torchtune._cli.tune import TuneCLIParser

from personas_tune.config import bundled_configs, find_config, load_experiment

SMALL_WORLD = (
    "data.world={n_users: 120, n_items: 60, n_groups: 3, mean_interactions: 22, seed: 7}",
    "data.cohort={n_users: 6, min_interactions: 20, max_interactions: 24}",
)


def errors_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error:")]


def test_a_recipe_and_a_bundled_config_are_found_by_name_from_any_folder(tmp_path: Path) -> None:
    outcome = tune(
        tmp_path, "run", "persona_prepare", "--config", "quickstart.yaml", "output_dir=out", "seed=5", *SMALL_WORLD
    )
    assert outcome.status == 0, outcome.err
    assert "cohort: 6 users" in outcome.out
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert set(stage_folders(tmp_path / "out")) == {"data"}


def test_a_local_config_takes_overrides_whose_values_hold_an_equals_sign_and_paths_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small_log().write(tmp_path / "logs a=b")
    write_yaml(Path("mine.yaml"), csv_experiment(Path("logs a=b"), Path("none")))
    outcome = run_recipe("persona_prepare", "mine.yaml", "output_dir=runs/lr=1", "data.item_metadata=null")
    assert outcome.status == 0, outcome.err
    assert set(stage_folders(Path("runs/lr=1"))) == {"data"}


def test_a_recipe_of_one_process_refuses_several_and_writes_nothing(csv_run: Finished, tmp_path: Path) -> None:
    """Rank 0 exits with 2; torchrun, which started it, reports that and makes `tune` exit with 1."""
    outcome = tune(
        tmp_path,
        "run",
        "--nproc_per_node",
        "2",
        "persona_prepare",
        "--config",
        csv_run.config,
        f"output_dir={tmp_path}/out",
    )
    assert errors_of(outcome.err) == [
        "error: --nproc_per_node: this recipe runs in one process, not in 2; "
        "leave the flag out; persona_lora, persona_eval and persona_pipeline take it"
    ]
    assert outcome.status == 1
    assert "exitcode  : 2" in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", bundled_configs())
def test_each_bundled_config_passes_tune_validate_and_our_own_check(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tune", "validate", str(find_config(name))])
    parser = TuneCLIParser()
    parser.run(parser.parse_args())
    assert "Config is well-formed!" in capsys.readouterr().out
    assert load_experiment(name).output_dir == f"runs/{name.removesuffix('.yaml')}"


def test_what_the_papers_experiment_lacks_is_named_with_the_command_that_gets_it(tmp_path: Path) -> None:
    outcome = tune(tmp_path, "run", "persona_lora", "--config", "phi3_persona.yaml")
    assert outcome.status == 2
    samples = tmp_path / "runs" / "phi3_persona"
    assert errors_of(outcome.err) == [
        f"error: {samples}/data/items.parquet: file not found; run `tune run persona_prepare --config ...` first",
        f"error: {samples}/memory/profiles.parquet: file not found; run `tune run persona_distill --config ...` first",
        f"error: {samples}/samples/prompt.json: file not found; run `tune run persona_raft --config ...` first",
        "error: checkpoints/Phi-3-mini-4k-instruct: checkpoint folder not found; get it with "
        "`tune download microsoft/Phi-3-mini-4k-instruct --output-dir checkpoints/Phi-3-mini-4k-instruct`, "
        "or set checkpointer.checkpoint_dir and tokenizer.path to your copy",
    ]
    assert "Traceback" not in outcome.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("recipe", "lacking"),
    [
        ("persona_prepare", {"ml-1m": "download https://files.grouplens.org/datasets/movielens/ml-1m.zip"}),
        ("persona_cluster", {"memory/profiles.parquet": "persona_distill"}),
        (
            "persona_raft",
            {
                "data/interactions.parquet": "persona_prepare",
                "memory/memories.parquet": "persona_distill",
                "personas/personas.parquet": "persona_cluster",
            },
        ),
        (
            "persona_eval",
            {
                "data/items.parquet": "persona_prepare",
                "memory/profiles.parquet": "persona_distill",
                "samples/prompt.json": "persona_raft",
                "adapters/persona/manifest.json": "persona_lora",
                "checkpoint folder": "tune download microsoft/Phi-3-mini-4k-instruct",
            },
        ),
    ],
)
def test_every_recipe_names_each_thing_that_has_to_come_first(
    recipe: str, lacking: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = run_recipe(recipe, "phi3_persona.yaml")
    assert outcome.status == 2
    lines = errors_of(outcome.err)
    assert len(lines) == len(lacking)
    for line, (what, remedy) in zip(lines, lacking.items(), strict=True):
        assert what in line
        assert remedy in line
    assert os.listdir() == []
