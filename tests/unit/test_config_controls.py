"""Keys that ask whether personas help: what doesn't fit is refused in a line."""

import pytest

from personas_tune.config import load_experiment
from personas_tune.errors import PersonasTuneError

SETS = "adapter_sets: {persona: {per: persona}, single: {per: all}}\n"
AGENTS = "agents: {mine: {adapters: persona}, one: {adapters: single}, base: {}}\n"
MINIMAL = f"output_dir: run\n{SETS}{AGENTS}"


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Load the minimal experiment with overrides."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(MINIMAL, encoding="utf-8")
    return lambda *overrides: load_experiment("c.yaml", overrides)


@pytest.mark.parametrize(("overrides", "expected"), [
    (["adapter_sets.persona.share=0"], "adapter_sets.persona.share"),
    (["adapter_sets.persona.share=1.01"], "adapter_sets.persona.share"),
    (["adapter_sets.persona.share=-0.5"], "adapter_sets.persona.share"),
    (["adapter_sets.persona.share=.nan"], "adapter_sets.persona.share"),
    (["adapter_sets.persona.share=half"], "adapter_sets.persona.share"),
    (["adapter_sets.persona.rows_from=others"], "adapter_sets.persona.rows_from"),
    (["adapter_sets.single.rows_from=all"], "rows_from: all needs per: persona"),
    (["adapter_sets.persona.rows_from=all", "adapter_sets.persona.shuffle_personas=true"],
     "set rows_from: all or shuffle_personas"),
    (["adapter_sets.single.rows=largest_persona", "adapter_sets.single.share=0.5"],
     "rows largest_persona and share 0.5 both say how many rows; set one of them"),
    (["adapter_sets.single.rows=100", "adapter_sets.single.share=0.5"], "rows 100 and share 0.5 both say"),
    (["evaluation.own_versus_other=[nobody]"],
     "evaluation.own_versus_other: no agent 'nobody'; agents that have an adapter per persona: mine"),
    (["evaluation.own_versus_other=[one]"],
     "evaluation.own_versus_other: agent 'one' has no adapter per persona; agents that have one: mine"),
    (["evaluation.own_versus_other=[base]"],
     "evaluation.own_versus_other: agent 'base' has no adapter per persona; agents that have one: mine"),
    (["evaluation.own_versus_other=[one]", "~agents.mine"],
     "evaluation.own_versus_other: agent 'one' has no adapter per persona; agents that have one: none"),
    (["evaluation.own_versus_other=mine"], "evaluation.own_versus_other"),
    (["evaluation.own_versus_other_rows=0"], "evaluation.own_versus_other_rows"),
    (["personas.words=nltk"], "personas.words"),
    (["personas.stability_seeds=-1"], "personas.stability_seeds"),
    (["personas.stability_seeds=many"], "personas.stability_seeds"),
])  # fmt: skip
def test_what_doesnt_fit_is_refused_in_a_line(load, overrides, expected):
    with pytest.raises(PersonasTuneError) as caught:
        load(*overrides)
    (line,) = caught.value.lines
    assert expected in line
    assert line.startswith("override ")


@pytest.mark.parametrize("overrides", [
    ["adapter_sets.persona.rows_from=all", "adapter_sets.persona.share=0.5"],
    ["adapter_sets.persona.shuffle_personas=true", "adapter_sets.persona.share=0.5"],
    ["adapter_sets.single.share=0.25"],
    ["adapter_sets.single.rows=5", "adapter_sets.single.share=1"],
    ["evaluation.own_versus_other=[mine]", "evaluation.own_versus_other_rows=100"],
    ["personas.stability_seeds=0", "personas.words=spacy"],
])  # fmt: skip
def test_what_fits_is_taken(load, overrides):
    load(*overrides)


def test_two_mistakes_are_told_together(load):
    with pytest.raises(PersonasTuneError) as caught:
        load("evaluation.own_versus_other=[nobody, one]")
    assert len(caught.value.lines) == 2
