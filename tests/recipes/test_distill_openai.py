"""The recipes against a real server on loopback: distilled, clustered, indexed, trained and measured."""

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from openai_server import Server
from pipelines import (
    Finished,
    csv_experiment,
    files_below,
    read,
    rows,
    run_recipe,
    run_to_the_end,
    small_log,
    write_yaml,
)

KEY = "sk-canary-0123456789abcdef"
PRICES = "distill.prices={input: 2.5, cached_input: 1.25, output: 10}"


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server(openai_server: Callable[..., Server]) -> Server:
    return openai_server()


@pytest.fixture
def prepared(tmp_path: Path, tiny_checkpoint: Path, server: Server) -> Finished:
    """An experiment that has its data, and is to be distilled by the server."""
    small_log().write(tmp_path)
    experiment = csv_experiment(tmp_path, tiny_checkpoint)
    experiment["distill"] = {"distiller": "openai", "base_url": server.base_url, "batch_size": 3, "profile_words": 60}
    experiment["embedding"] = {"base_url": server.base_url}
    return run_to_the_end(write_yaml(tmp_path / "x.yaml", experiment), recipe="persona_prepare")


def distill(prepared: Finished, *overrides: str) -> Any:
    return run_recipe("persona_distill", prepared.config, *overrides)


def calls(server: Server, path: str = "/chat/completions") -> list[dict[str, Any]]:
    return [bill for bill in server.billed() if bill["path"].endswith(path)]


def test_the_whole_pipeline_runs_on_what_the_server_wrote(prepared: Finished, server: Server) -> None:
    overrides = ["personas.embedder=openai", "retrieval.embedder=openai"]
    run_to_the_end(prepared.config, *overrides)
    profiles, memories = rows(prepared.root, "memory/profiles"), rows(prepared.root, "memory/memories")
    train = [row for row in rows(prepared.root, "data/interactions") if row["split"] == "train"]
    assert {row["distiller"] for row in profiles} == {"openai"}
    assert [(row["user_id"], row["position"]) for row in memories] == [
        (row["user_id"], row["position"]) for row in train
    ]
    uptos = Counter(row["user_id"] for row in profiles)
    n_train = Counter(row["user_id"] for row in train)
    assert uptos == {user_id: 1 + -(-n // 3) for user_id, n in n_train.items()}
    assert all(row["n_words"] <= 60 for row in profiles)
    assert json.loads((prepared.root / "personas" / "clustering.json").read_text())["embedder"]["embedder"] == "openai"
    assert "persona" in (prepared.root / "eval" / "table.md").read_text()
    n_billed = len(server.billed())
    again = run_to_the_end(prepared.config, *overrides)
    assert again.outcome.out.count("up to date") >= 6
    assert len(server.billed()) == n_billed


def test_a_finished_job_makes_no_call_when_its_tables_are_lost(prepared: Finished, server: Server) -> None:
    assert distill(prepared).status == 0
    before, n_billed = files_below(prepared.root / "memory"), len(server.billed())
    for name in ("manifest.json", "profiles.parquet", "memories.parquet"):
        (prepared.root / "memory" / name).unlink()
    assert distill(prepared).status == 0
    after = files_below(prepared.root / "memory")
    assert {name: after[name] for name in before if "journal" not in name} == {
        name: content for name, content in before.items() if "journal" not in name
    }
    assert len(server.billed()) == n_billed


def test_one_more_user_costs_that_users_calls(prepared: Finished, server: Server) -> None:
    path = prepared.root / "data" / "users.parquet"
    everyone = path.read_bytes()
    users = read(prepared.root, "data/users")
    pq.write_table(users.slice(1), path)
    assert distill(prepared).status == 0
    n_billed = len(server.billed())
    path.write_bytes(everyone)
    assert distill(prepared).status == 0
    n_reflections = -(-users["n_train"][0].as_py() // 3)
    assert n_reflections <= len(server.billed()) - n_billed <= 2 * n_reflections  # each with a consolidation at most


def test_a_dry_run_tells_the_calls_that_the_run_makes_and_sends_nothing(prepared: Finished, server: Server) -> None:
    told = distill(prepared, "distill.dry_run=true", "distill.profile_words=400", PRICES)
    assert told.status == 0
    assert server.requests() == []
    assert not (prepared.root / "memory").exists()
    assert distill(prepared, "distill.profile_words=400").status == 0
    n_calls = len(calls(server))
    assert f"{n_calls} calls of gpt-4o, 0 of them answered already" in told.out
    assert "USD online" in told.out
    after = distill(prepared, "distill.dry_run=true", "distill.profile_words=400", PRICES)
    assert f"{n_calls} calls of gpt-4o, {n_calls} of them answered already" in after.out
    assert "cost about 0.00 USD" in after.out


def test_a_dry_run_of_the_pipeline_ends_with_the_estimate(prepared: Finished, server: Server) -> None:
    outcome = run_recipe("persona_pipeline", prepared.config, "distill.dry_run=true", PRICES)
    assert outcome.status == 0
    assert "nothing was sent" in outcome.out
    assert "persona_cluster" not in outcome.out
    assert server.requests() == []


def test_items_of_test_rows_alone_are_never_sent(prepared: Finished, server: Server) -> None:
    """What the server was asked about stands in its answers' reasons and favourites, and so in the journal."""
    path = prepared.root / "data" / "items.parquet"
    items = read(prepared.root, "data/items")
    rated = [row for row in rows(prepared.root, "data/interactions") if row["split"] == "train"]
    train_items = {row["item_id"] for row in rated}
    titles = [
        f"Seen{number}" if item_id in train_items else f"Canary{number}"
        for number, item_id in enumerate(items["item_id"].to_pylist())
    ]
    genres = [[title] for title in titles]
    changed = items.set_column(items.column_names.index("title"), "title", pa.array(titles))
    pq.write_table(changed.set_column(items.column_names.index("genres"), "genres", pa.array(genres)), path)
    assert distill(prepared, "distill.profile_words=400").status == 0
    written = b"".join(file.read_bytes() for file in (prepared.root / "memory").iterdir())
    assert any(title.startswith("Canary") for title in titles)
    assert b"Seen" in written
    assert b"Canary" not in written


def test_the_batch_api_gives_the_same_tables(prepared: Finished, server: Server, tmp_path: Path) -> None:
    assert distill(prepared).status == 0
    online = files_below(prepared.root / "memory")
    journal = tmp_path / "other" / "journal.sqlite"
    overrides = [f"distill.journal={journal}", "distill.batch_api=true", "distill.batch_poll_s=0.05"]
    (prepared.root / "memory" / "manifest.json").unlink()
    assert distill(prepared, *overrides).status == 0
    batch = files_below(prepared.root / "memory")
    for name in ("profiles.parquet", "memories.parquet", "index.html"):
        assert batch[name] == online[name]
    assert server.batches()
    assert journal.is_file()


def test_users_that_stay_incomplete_are_named_and_can_be_left_out_by_name(prepared: Finished, server: Server) -> None:
    server.set(faults={"refusal": 0.25})
    overrides = ["distill.max_tries=1"]
    failed = distill(prepared, *overrides)
    assert failed.status == 2
    named = [line.split()[2].rstrip(":") for line in failed.err.splitlines() if line.startswith("error: user ")]
    assert 0 < len(named) < 6
    assert f"distill.max_incomplete={len(named)}" in failed.err
    assert not (prepared.root / "memory" / "profiles.parquet").exists()
    server.set(faults={"refusal": 1.0})
    assert distill(prepared, *overrides, f"distill.max_incomplete={len(named)}").status == 0
    left_out = json.loads((prepared.root / "memory" / "left_out.json").read_text())
    assert sorted(left_out) == sorted(named)
    assert not {row["user_id"] for row in rows(prepared.root, "memory/profiles")} & set(named)
    for recipe in ("persona_cluster", "persona_raft"):
        assert run_recipe(recipe, prepared.config).status == 0
    assert not {row["user_id"] for row in rows(prepared.root, "samples/test")} & set(named)


@pytest.mark.parametrize(
    ("options", "overrides", "told"),
    [
        ({"api_key": "sk-other"}, [], "with a key that this server takes"),
        ({}, ["distill.model=gpt-none"], "gpt-none"),
        ({"faults": {"quota": 1.0}}, [], "quota"),
        ({"faults": {"bad_request": 1.0}}, [], "check model, sampling and response_format"),
        ({}, ["distill.max_tokens=2000"], "max_tokens"),
        ({}, [PRICES, "distill.max_usd=0.01"], "max_usd"),
        ({}, ["distill.base_url=ftp://x"], "no address"),
        ({}, ["distill.base_url=https://api.openai.com/v1"], "export OPENAI_API_KEY"),
    ],
)
def test_what_can_not_go_on_is_one_line_and_writes_no_table(
    prepared: Finished, server: Server, options: dict[str, Any], overrides: list[str], told: str
) -> None:
    server.set(**options)
    outcome = distill(prepared, *overrides)
    errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert outcome.status == 2
    assert len(errors) == 1
    assert told in errors[0]
    assert "Traceback" not in outcome.err
    assert not (prepared.root / "memory" / "profiles.parquet").exists()


def test_the_key_is_sent_and_stands_nowhere_else(
    prepared: Finished, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.set(api_key=KEY)
    outcome = distill(prepared, PRICES)
    assert outcome.status == 0
    assert server.requests()[-1]["has_key"]
    server.set(api_key="sk-other-0123456789")
    refused = distill(prepared, "distill.memory_words=40")
    assert refused.status == 2
    printed = outcome.out + outcome.err + refused.out + refused.err
    written = b"".join(path.read_bytes() for path in prepared.root.rglob("*") if path.is_file())
    assert KEY not in printed
    assert KEY.encode() not in written


def test_a_second_run_on_the_same_journal_says_so(prepared: Finished, server: Server) -> None:
    server.set(latency_s=2.0)
    with _start(prepared) as first:
        _wait_for(lambda: server.counts()["under_way"] > 0)
        second = distill(prepared)
        first.kill()
    assert second.status == 2
    assert str(first.pid) in second.err


def test_a_run_that_is_asked_to_stop_waits_for_what_it_paid_and_goes_on_later(
    prepared: Finished, server: Server
) -> None:
    server.set(latency_s=0.3)
    with _start(prepared, "distill.concurrency=2") as process:
        _wait_for(lambda: len(server.billed()) >= 2)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "error: interrupted" in err
    server.set(latency_s=0.0)
    assert distill(prepared).status == 0
    assert max(Counter(bill["request"] for bill in server.billed()).values()) == 1


def _start(prepared: Finished, *overrides: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "persona_distill", "--config", str(prepared.config), *overrides]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _wait_for(condition: Callable[[], bool]) -> None:
    for _ in _patience():
        if condition():
            return
    raise AssertionError("it never happened")


def _patience() -> Iterator[int]:
    for look in range(600):
        yield look
        time.sleep(0.05)
