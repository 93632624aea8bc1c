"""The examples of docs/agents.md are run in their order: on a finished experiment, and against a server."""

import contextlib
import io
import re
from pathlib import Path

import numpy as np
from documented import ROOT
from loopback.completions import serve_models
from test_agents_served import export

PAGE = ROOT / "docs" / "agents.md"
ADDRESS = "http://localhost:8000/v1"


def blocks():
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def test_the_pages_examples_run(csv_run, tiny_checkpoint, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(csv_run.root)
    monkeypatch.chdir(tmp_path)
    adapters = export(csv_run, tmp_path)
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
        own, served = (names[name].rate(names["user"], names["items"]).p for name in ("agent", "served"))
    np.testing.assert_allclose(served, own, atol=1e-5)
    assert set(names["happy"]) == set(names["recommended"])
    assert names["newcomer"].user_id in names["agent"].users
    assert Path("runs/quickstart").is_symlink()
