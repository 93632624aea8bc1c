"""The configs of the paper's Table 1 declare its eleven rows with its figures, and twins read out as distributions."""

from pathlib import Path
from typing import Any

import pytest

from personas_tune.config import base_sections, load_experiment
from personas_tune.schema import AdapterSet

PUBLISHED = """
No. Base   Adapters     Memories RMSE  MAE   URR
0   llama3 -            short    1.158 0.847 0
1   llama3 -            both     1.221 0.883 0
2   llama3 -            long     1.229 0.888 0
3   phi3   -            short    1.203 0.863 4.23
4   phi3   -            both     1.315 0.952 2.93
5   phi3   single_max   short    1.312 0.940 1.30
6   phi3   single_min   short    1.180 0.848 1.93
7   phi3   single_max   both     1.150 0.834 1.15
8   phi3   single_min   both     1.337 1.042 3.01
9   phi3   persona      short    1.292 0.937 2.29
10  phi3   persona      both     1.171 0.881 1.77
"""
ROWS = [line.split()[1:] for line in PUBLISHED.strip().splitlines()[1:]]
SETS = {
    "single_max": {"per": "all", "rows": "largest_persona"},
    "single_min": {"per": "all", "rows": "smallest_persona"},
    "persona": {"per": "persona", "rows": None},
}
GRIDS = pytest.mark.parametrize("name", ["paper_table1.yaml", "paper_table1_tiny.yaml", "paper_table1_tiny_ml.yaml"])


def row_of(cfg: Any, agent: Any) -> list[str]:
    """Base, adapters and memories of an agent, as the paper's table names them."""
    trained = cfg.adapter_sets.get(agent.adapters) if agent.adapters else None
    kind = "-"
    if trained is not None:
        assert agent.memories in (None, trained.memories)
        kind = agent.adapters.removesuffix("_short")
        assert AdapterSet(**trained) == AdapterSet(**SETS[kind], memories=trained.memories)
    return [agent.base or "phi3", kind, agent.memories or trained.memories]


@GRIDS
def test_the_rows_and_figures_are_the_papers(name: str) -> None:
    cfg = load_experiment(name)
    agents = [agent for agent in cfg.agents.values() if agent.published is not None]
    assert {agent.readout for agent in agents} == {"generate"}
    assert [row_of(cfg, agent) for agent in agents] == [row[:3] for row in ROWS]
    for agent, (*_, rmse, mae, urr) in zip(agents, ROWS, strict=True):
        assert (agent.published.rmse, agent.published.mae) == (float(rmse), float(mae))
        assert 100 * agent.published.urr == pytest.approx(float(urr))


@GRIDS
def test_every_row_has_a_twin_that_differs_in_its_readout_only(name: str) -> None:
    cfg = load_experiment(name)
    rows = {agent: settings for agent, settings in cfg.agents.items() if settings.published is not None}
    assert set(cfg.agents) == {*rows, *(f"{agent}_expected" for agent in rows)}
    for agent, settings in rows.items():
        assert cfg.agents[f"{agent}_expected"] == {**settings, "readout": "expected", "published": None}


@GRIDS
def test_the_readout_is_the_papers_and_the_averages_are_free_of_test_rows(name: str) -> None:
    cfg = load_experiment(name)
    asked = cfg.evaluation.max_new_tokens, cfg.evaluation.temperature, cfg.evaluation.top_k
    assert asked == (4, 0.3, 50)
    assert (cfg.data.historical_average, cfg.data.traits) == ("outside", "train")
    leaky = load_experiment(name, ["data.historical_average=all", "data.traits=all", "output_dir=runs/leaky"])
    assert (leaky.data.historical_average, leaky.data.traits) == ("all", "all")


@GRIDS
def test_the_bases_are_the_papers_architectures(name: str) -> None:
    cfg = load_experiment(name)
    phi3, llama3 = base_sections(cfg, None), base_sections(cfg, "llama3")
    assert phi3["model"]["_component_"].startswith("torchtune.models.phi3.lora_phi3")
    assert llama3["model"]["_component_"].startswith("torchtune.models.llama3.lora_llama3")
    assert (phi3["checkpointer"]["model_type"], llama3["checkpointer"]["model_type"]) == ("PHI3_MINI", "LLAMA3")


def test_at_full_size_the_settings_are_the_papers() -> None:
    cfg = load_experiment("paper_table1.yaml")
    assert cfg.data.cohort == {"n_users": 200, "min_interactions": 100, "max_interactions": 200, "exclude": None}
    assert (cfg.data.split.train_fraction, cfg.data.split.test_rows) == (0.6, 7496)
    assert (cfg.personas.k, cfg.retrieval.k, cfg.prompt.profile) == (4, 1, "final")
    model = base_sections(cfg, None)["model"]
    assert (model["lora_rank"], model["lora_alpha"], model["lora_dropout"]) == (256, 32, 0.1)
    assert (list(model["lora_attn_modules"]), cfg.optimizer.lr, cfg.epochs) == (["q_proj", "k_proj"], 3e-4, 2)
    assert base_sections(cfg, "llama3")["model"]["_component_"] == "torchtune.models.llama3.lora_llama3_8b"


def test_the_tiny_base_in_the_larger_models_seat_is_the_larger() -> None:
    bases = Path(__file__).parents[2] / "personas_tune" / "bases"
    sizes = {base.name: sum(file.stat().st_size for file in base.iterdir()) for base in bases.iterdir()}
    assert sizes["tiny_phi3"] < sizes["tiny_llama3"]
    assert sum(sizes.values()) < 8e6
