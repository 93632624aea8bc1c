"""The paper's grid from its own config: all agents in one run, small, on the two bundled bases."""

import json
import math

import pytest
from pipelines import Finished, run_to_the_end

from personas_tune.config import load_experiment

CONFIG = "paper_table1_tiny.yaml"
SMALL = (
    "data.world={n_users: 300, n_items: 60, n_groups: 3, mean_interactions: 30, seed: 7}",
    "data.cohort={n_users: 8, min_interactions: 20, max_interactions: 30}",
    "data.split.test_rows=16",
    "personas.stability_seeds=2",
    "epochs=1",
    "max_steps_per_epoch=1",
    "evaluation.n_resamples=99",
)


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    root = tmp_path_factory.mktemp("grid") / "run"
    return run_to_the_end(CONFIG, f"output_dir={root}", *SMALL)


def test_all_agents_are_measured_with_the_papers_figures_beside_their_own(grid: Finished) -> None:
    declared = load_experiment(CONFIG).agents
    measured = json.loads((grid.root / "eval" / "metrics.json").read_text(encoding="utf-8"))["agents"]
    assert [agent["name"] for agent in measured] == list(declared)
    assert len(measured) == 22
    assert [agent["published"] for agent in measured] == [agent.published for agent in declared.values()]
    assert sum(agent["published"] is not None for agent in measured) == 11
    for agent in measured:
        for figure in ("rmse", "mae", "rmse_filled", "mae_filled"):
            if figure.endswith("filled") or agent["urr"] < 1:
                assert math.isfinite(agent[figure]), (agent["name"], figure)
        assert agent["readout"] == "generate" or agent["urr"] == 0


def test_its_table_and_its_report_name_all_agents(grid: Finished) -> None:
    table = (grid.root / "eval" / "table.md").read_text(encoding="utf-8")
    page = (grid.root / "report" / "index.html").read_text(encoding="utf-8")
    first_cells = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")]
    for agent in load_experiment(CONFIG).agents:
        assert agent in first_cells
        assert agent in page
    assert "paper RMSE" in table
