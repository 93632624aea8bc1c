"""Agents on a server: the same answers as in this process, and one line for whatever is wrong with the server."""

import asyncio
import contextlib
import gc
import json
import os
import shutil
import signal
import threading
import time
from itertools import pairwise

import numpy as np
import pytest
from loopback.completions import BASE, serve_models
from pipelines import export_adapters, without_an_adapter

from personas_tune.agents import load_agent, load_served_agent
from personas_tune.errors import AdapterError, ConfigError, ServerError
from personas_tune.llm.scoring import Reading
from personas_tune.llm.settings import KEY_VARIABLE


@pytest.fixture(scope="module")
def served(csv_run, tiny_checkpoint, tmp_path_factory):
    adapters = export_adapters(csv_run, tmp_path_factory.mktemp("served"))
    assert {"persona-0", "persona-1", "single-all"} == adapters.keys()
    with serve_models(tiny_checkpoint, adapters) as server:
        yield server


@pytest.fixture
def server(served):
    """The same, its ledger empty and without faults."""
    served.requests.clear()
    served.keys.clear()
    served.hosts.clear()
    served.faults, served.faulty, served.most_at_once = [], None, 0
    return served


@pytest.fixture(scope="module")
def local(csv_run):
    return {name: load_agent(csv_run.root, name) for name in ("base", "persona", "single")}


@pytest.fixture
def agent(csv_run, server):
    return load_served_agent(csv_run.root, "persona", base_url=server.base_url, max_retries=1)


@pytest.mark.parametrize("name", ["base", "persona", "single"])
def test_a_served_agent_says_what_the_one_in_this_process_says(csv_run, server, local, name):
    mine, theirs = local[name], load_served_agent(csv_run.root, name, base_url=server.base_url)
    assert theirs.labels == mine.labels
    pairs = [(user, mine.items[:2]) for user in mine.users]
    for one, other in zip(mine.rate_many(pairs), theirs.rate_many(pairs), strict=True):
        np.testing.assert_allclose(other.p, one.p, atol=1e-5)
    ratings = [(item, rating) for item, rating in zip(mine.items[:4], (5, 4, 1, 2), strict=True)]
    met = [each.rate(each.meet(ratings), mine.items[4:6]).p for each in (mine, theirs)]
    np.testing.assert_allclose(*met, atol=1e-5)
    names = {body["model"] for body in server.requests}
    assert names == {"base": {BASE}, "persona": {"persona-0", "persona-1"}, "single": {"single-all"}}[name]


def test_adapters_change_what_is_said(local):
    user, items = local["base"].users[0], local["base"].items[:3]
    p = [local[name].rate(user, items).p for name in ("base", "persona", "single")]
    assert np.abs(p[0] - p[1]).max() > 1e-3 < np.abs(p[1] - p[2]).max()


def test_each_item_is_one_request_of_token_ids_and_no_weights_are_loaded(agent, server, csv_run):
    agent.rate(agent.users[0], agent.items[:3])
    assert len(server.requests) == 3
    body = server.requests[0]
    assert body["max_tokens"] == 1
    first, *begun = body["prompt"]
    answers = [agent._tokenizer.answer_tokens(label) for label in agent.labels]
    assert {tuple(each[len(first) :]) for each in begun} == {
        tuple(answer[:n]) for answer in answers for n in range(1, len(answer))
    }
    assert all(each[: len(first)] == first for each in begun)
    assert sorted({token for answer in answers for token in answer}) == body["logprob_token_ids"]
    assert any(len(answer) > 2 for answer in answers)  # 3.5 begins as 3 does


def test_users_are_asked_for_one_after_the_other_and_adapters_too(csv_run, server):
    agent = load_served_agent(csv_run.root, "persona", base_url=server.base_url, concurrency=1)
    users, items = agent.users, agent.items[:2]
    owner = {}
    for user in users:
        agent.rate(user, items)
        owner |= {tuple(body["prompt"][0]): user for body in server.requests[-len(items) :]}
    server.requests.clear()
    agent.rate_many([(user, [item]) for item in items for user in users])
    asked = [(body["model"], owner[tuple(body["prompt"][0])]) for body in server.requests]
    assert len(asked) == len(users) * len(items)
    assert sum(one != other for one, other in pairwise(asked)) == len(users) - 1
    models = [model for model, _ in asked]
    assert models == sorted(models)
    assert server.most_at_once == 1


def test_no_more_requests_are_in_flight_than_allowed(csv_run, server):
    agent = load_served_agent(csv_run.root, "persona", base_url=server.base_url, concurrency=3)
    agent.rate(agent.users[0], agent.items[:10])
    assert 1 < server.most_at_once <= 3


def test_what_breaks_off_is_asked_again(csv_run, server, local):
    agent = load_served_agent(csv_run.root, "persona", base_url=server.base_url, concurrency=2)
    server.faults = [429, 500, 503]
    user, items = agent.users[0], agent.items[:2]
    np.testing.assert_allclose(agent.rate(user, items).p, local["persona"].rate(user, items).p, atol=1e-5)
    assert len(server.requests) == 2 + 3


def test_it_works_where_an_event_loop_is_running_as_in_a_notebook(agent, local):
    user, items = agent.users[0], agent.items[:2]

    async def cell():
        return agent.rate(user, items)

    np.testing.assert_allclose(asyncio.run(cell()).p, local["persona"].rate(user, items).p, atol=1e-5)


def test_the_key_comes_from_the_environment(csv_run, server, monkeypatch):
    for key in (None, "secret-key-of-mine"):
        if key is not None:
            monkeypatch.setenv(KEY_VARIABLE, key)
        with load_served_agent(csv_run.root, "persona", base_url=server.base_url) as agent:
            agent.rate(agent.users[0], agent.items[:1])
    assert server.keys == [None, "Bearer secret-key-of-mine"]


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ("logprobs", "`logprobs` must be set"),
        ("return_tokens_as_token_ids", "without the log probabilities of the tokens asked for"),
        ("logprob_token_ids", "without the log probabilities of the tokens asked for"),
    ],
)
def test_the_server_holds_requests_to_vllms_contract(agent, monkeypatch, gone, words):
    whole = Reading.body.fget
    monkeypatch.setattr(Reading, "body", property(lambda self: {k: v for k, v in whole(self).items() if k != gone}))
    with pytest.raises(ServerError, match=words):
        agent.rate(agent.users[0], agent.items[:1])


def test_a_prompt_above_the_servers_context_is_told(agent, server, monkeypatch):
    monkeypatch.setattr(server.models, "context", 100)
    with pytest.raises(ServerError, match=r"maximum context length is 100.* the served base and its context"):
        agent.rate(agent.users[0], agent.items[:1])


def request_threads():
    return {thread for thread in threading.enumerate() if thread.name == "personas_tune requests"}


def test_connections_stay_open_until_the_agent_is_closed(csv_run, server):
    before = request_threads()
    with load_served_agent(csv_run.root, "persona", base_url=server.base_url, concurrency=1) as agent:
        n_connections = server.n_connections
        for item in agent.items[:3]:
            agent.rate(agent.users[0], [item])
        assert server.n_connections == n_connections
        assert len(request_threads() - before) == 1
    assert request_threads() <= before
    agent.close()
    with pytest.raises(ServerError, match="the agent is closed; load it again"):
        agent.rate(agent.users[0], agent.items[:1])


def test_an_agent_that_is_let_go_of_closes_its_connections(csv_run, server):
    before = request_threads()
    agent = load_served_agent(csv_run.root, "persona", base_url=server.base_url)
    assert request_threads() - before
    del agent
    gc.collect()
    assert request_threads() <= before


def test_an_interrupt_stops_at_once_and_the_agent_works_on(agent, server, monkeypatch):
    slow = threading.Event()

    async def cell():
        return agent.rate(agent.users[0], agent.items[:4])

    answer = server.models.next_log_probabilities

    def held(*asked):
        slow.wait(20)
        return answer(*asked)

    monkeypatch.setattr(server.models, "next_log_probabilities", held)
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    begun = time.monotonic()
    try:
        with contextlib.closing(asyncio.new_event_loop()) as loop, pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(cell())
        assert time.monotonic() - begun < 5
    finally:
        slow.set()
        timer.join()
    assert agent.rate(agent.users[0], agent.items[:1]).p.shape == (1, len(agent.labels))


def test_each_merged_adapter_may_have_a_server_of_its_own(csv_run, server, local):
    addresses = {"persona-0": server.base_url, "persona-1": server.base_url.replace("127.0.0.1", "localhost")}
    with load_served_agent(csv_run.root, "persona", base_url=addresses) as agent:
        pairs = [(user, agent.items[:2]) for user in agent.users]
        for one, other in zip(local["persona"].rate_many(pairs), agent.rate_many(pairs), strict=True):
            np.testing.assert_allclose(other.p, one.p, atol=1e-5)
    assert {body["model"]: host for body, host in zip(server.requests, server.hosts, strict=True)} == {
        name: address.removeprefix("http://").removesuffix("/v1") for name, address in addresses.items()
    }
    for name, given in (("persona", {"persona-0": server.base_url}), ("base", addresses)):
        with pytest.raises(ConfigError, match=r"no address of persona-1|the base alone takes one address"):
            load_served_agent(csv_run.root, name, base_url=given)


@pytest.mark.parametrize(
    "given",
    [
        {"base_url": ""}, {"base_url": None}, {"base_url": {}}, {"base_url": {"persona-0": ""}}, {"concurrency": 0},
        {"concurrency": 2.5}, {"timeout_s": 0}, {"timeout_s": "1"}, {"max_retries": -1},
    ],
    ids=str,
)  # fmt: skip
def test_mistaken_bounds_and_addresses_are_told_in_one_line(csv_run, server, monkeypatch, given):
    monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
    with pytest.raises(ConfigError) as error:
        load_served_agent(csv_run.root, "persona", **{"base_url": server.base_url, **given})
    assert str(error.value).startswith(next(iter(given)))
    assert "\n" not in str(error.value)
    assert server.requests == []


def test_a_user_without_an_adapter_is_told(csv_run, server, copy_of):
    root = copy_of(csv_run)
    without_an_adapter(root)
    with pytest.raises(AdapterError, match="no adapter for user"):
        load_served_agent(root, "persona", base_url=server.base_url)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (500, "no answer in 2 attempts, the last: HTTP 500: as told"),
        (400, "HTTP 400: as told; check that the served base and its context are the experiment's"),
        (401, "OPENAI_API_KEY"),
        (404, "HTTP 404: as told; check model and base_url"),
        ("no_ids", "an answer without the log probabilities of the tokens asked for; it takes a server with"),
        ("too_few", "answers to"),
        ("no_choices", "an answer without choices"),
        ("not_a_number", "log probabilities that are no numbers"),
        ("zero", "the server gives all labels probability 0"),
    ],
)
def test_what_is_wrong_with_an_answer_is_told_in_one_line(agent, server, fault, words):
    server.faulty = fault
    with pytest.raises(ServerError) as error:
        agent.rate(agent.users[0], agent.items[:2])
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_base_of_another_vocabulary_is_told(agent, server, monkeypatch):
    monkeypatch.setattr(server.models, "vocab_size", 100)
    with pytest.raises(ServerError, match=r"is out of vocabulary; check that the served base"):
        agent.rate(agent.users[0], agent.items[:1])


def test_a_server_that_is_down_is_told(csv_run):
    with pytest.raises(ServerError, match=r"127.0.0.1:9/v1: no connection .*; see whether the server is up"):
        load_served_agent(csv_run.root, "persona", base_url="http://127.0.0.1:9/v1")
    with pytest.raises(ConfigError, match="is no address"):
        load_served_agent(csv_run.root, "persona", base_url="localhost")


def test_adapters_that_are_not_served_are_named_with_the_line_that_serves_them(csv_run, server, copy_of):
    root = copy_of(csv_run)
    (root / "adapters" / "other").mkdir()
    for file in ("manifest.json", "assignment.parquet"):
        shutil.copy(root / "adapters" / "persona" / file, root / "adapters" / "other" / file)
    overrides = ["adapter_sets.other={per: persona}", "agents.other={adapters: other}"]

    def refused():
        with pytest.raises(ServerError) as error:
            load_served_agent(root, "other", base_url=server.base_url, overrides=overrides)
        return str(error.value)

    told = refused()
    assert "other-0, other-1 not served, but tiny-base, persona-0" in told
    assert f"--enable-lora --lora-modules other-0={root}/export/other/0 other-1=" in told
    (root / "export").mkdir()
    (root / "export" / "serving.json").write_text(json.dumps({"command": "vllm serve tiny --enable-lora"}))
    assert "serve them: `vllm serve tiny --enable-lora`" in refused()


def test_a_server_without_one_base_is_told(csv_run, server, monkeypatch):
    for names in (["persona-0"], [BASE, "another", "single-all"]):
        monkeypatch.setattr(server.models, "names", names)
        monkeypatch.setattr(server, "merged", tuple(names))
        with pytest.raises(ServerError, match=f"not one base is served, but {', '.join(names)}"):
            load_served_agent(csv_run.root, "base", base_url=server.base_url)
