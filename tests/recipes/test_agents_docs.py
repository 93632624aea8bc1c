"""The examples of docs/agents.md and README.md run in their order: on a small experiment, and against a server."""

import contextlib
import io
import re

import numpy as np
import pytest
from documented import ROOT
from loopback.completions import serve_models
from pipelines import export_adapters

from personas_tune.agents import load_served_agent

PAGE = ROOT / "docs" / "agents.md"
ADDRESS = "http://localhost:8000/v1"


def blocks(page=PAGE):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def here(csv_run, tmp_path, monkeypatch):
    """A folder in which a small experiment stands for the quickstart's."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(csv_run.root)
    monkeypatch.chdir(tmp_path)


def test_the_readmes_example_runs(here):
    examples = [block for block in blocks(ROOT / "README.md") if "personas_tune.agents" in block]
    assert examples
    for example in examples:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(example, "README.md", "exec"), {})
        assert "[" in out.getvalue()


def test_the_pages_examples_run(here, csv_run, tiny_checkpoint, tmp_path):
    adapters = export_adapters(csv_run, tmp_path)
    examples = blocks()
    assert len(examples) >= 6
    names: dict = {}
    with (
        serve_models(tiny_checkpoint, adapters) as server,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        for number, example in enumerate(examples, 1):
            code = compile(example.replace(ADDRESS, server.base_url), f"{PAGE.name}, example {number}", "exec")
            exec(code, names)
        assert len(server.requests) == len(names["items"])
        with load_served_agent(csv_run.root, "persona", base_url=server.base_url) as again:
            served = again.rate(names["user"], names["items"]).p
        own = names["agent"].rate(names["user"], names["items"]).p
    np.testing.assert_allclose(served, own, atol=1e-5)
    assert set(names["happy"]) == set(names["recommended"])
    assert names["newcomer"].user_id in names["agent"].users
