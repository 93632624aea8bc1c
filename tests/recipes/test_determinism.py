"""One seed, one result: in another folder, from another process, under another hash seed, byte for byte."""

import json
import os
from pathlib import Path

import pytest
from pipelines import Finished, csv_experiment, files_below, run_to_the_end, small_log, tune, write_yaml

from personas_tune.workspace import MANIFEST

# What a run writes; the plot and the logs are for people.
STAGES = ("data", "memory", "personas", "samples", "adapters", "eval", "report")


@pytest.fixture(scope="module")
def run_elsewhere(csv_run: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CSV pipeline once more, by `tune` itself and into a folder below an empty working folder."""
    folder = tmp_path_factory.mktemp("elsewhere")
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    outcome = tune(
        folder, "run", "persona_pipeline", "--config", csv_run.config, "output_dir=runs/again", env=environment
    )
    assert outcome.status == 0, outcome.out + outcome.err
    return folder / "runs" / "again"


def test_two_runs_with_one_seed_give_equal_bytes(csv_run: Finished, run_elsewhere: Path) -> None:
    one, other = files_below(csv_run.root), files_below(run_elsewhere)
    assert {name.partition("/")[0] for name in one} == set(STAGES)
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []


def test_their_manifests_differ_in_nothing_but_where_the_inputs_lay(csv_run: Finished, run_elsewhere: Path) -> None:
    for stage in ("data", "memory", "personas", "samples", "adapters/persona", "adapters/single"):
        pair = [
            json.loads((root / stage / MANIFEST).read_text(encoding="utf-8")) for root in (csv_run.root, run_elsewhere)
        ]
        inputs = [sorted(record.pop("inputs").values()) for record in pair]
        assert inputs[0] == inputs[1]
        assert pair[0] == pair[1]


def test_another_seed_draws_another_cohort(csv_run: Finished, tmp_path: Path) -> None:
    other = run_to_the_end(csv_run.config, f"output_dir={tmp_path}", "seed=4", recipe="persona_prepare").root
    one, two = files_below(csv_run.root), files_below(other)
    assert all(one[name] != two[name] for name in two)


def test_on_the_same_users_another_seed_still_trains_other_adapters(csv_run: Finished, tmp_path: Path) -> None:
    small = ["data.cohort.n_users=null", "data.cohort.max_interactions=13", "~adapter_sets.single", "~agents"]
    roots = []
    for seed in (3, 4):
        overrides = [f"output_dir={tmp_path / str(seed)}", f"seed={seed}", *small]
        stages = "stages=[persona_prepare,persona_distill,persona_cluster,persona_raft,persona_lora]"
        roots.append(run_to_the_end(csv_run.config, *overrides, stages).root)
    one, two = (files_below(root) for root in roots)
    for stage in ("data", "memory"):
        assert [name for name in one if name.startswith(f"{stage}/") and one[name] != two[name]] == []
    assert one["adapters/persona/0/adapter.safetensors"] != two["adapters/persona/0/adapter.safetensors"]


def test_a_world_is_the_same_every_time_and_another_world_seed_gives_another(
    world_run: Finished, tmp_path: Path
) -> None:
    def prepared(name: str, *overrides: str) -> dict[str, bytes]:
        folder = tmp_path / name
        return files_below(
            run_to_the_end(world_run.config, f"output_dir={folder}", *overrides, recipe="persona_prepare").root
        )

    first = {name: content for name, content in files_below(world_run.root).items() if name.startswith("data/")}
    assert prepared("again") == first
    other = prepared("other", "data.world.seed=8")
    assert other.keys() == first.keys()
    assert all(other[name] != first[name] for name in first)


def test_the_order_of_a_logs_rows_says_nothing_but_ties(
    csv_run: Finished, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Rows in another order, with every user's own rows still in theirs, give the same tables."""
    log = small_log()
    log.ratings.sort(key=lambda row: row["user_id"], reverse=True)
    log.items.reverse()
    log.write(tmp_path)
    config = write_yaml(tmp_path / "experiment.yaml", csv_experiment(tmp_path, tiny_checkpoint))
    again = files_below(run_to_the_end(config, recipe="persona_prepare").root)
    first = files_below(csv_run.root)
    assert [name for name in again if again[name] != first[name]] == []
