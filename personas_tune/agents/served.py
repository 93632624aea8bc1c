"""Agents on a server that hosts the base and the exported adapters, such as vLLM.

A label's probability is the product over its answer's tokens, as of agents in this process. The server
is asked what may come next after the prompt, and after the prompt with the beginning of each answer.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from personas_tune.adapters.base_model import TOKENIZER_FILES, build_on_meta, load_tokenizer
from personas_tune.adapters.selection import read_assignment
from personas_tune.agents.agent import Agent
from personas_tune.agents.settings import AgentSettings, find_agent
from personas_tune.datasets import ChatTokenizer, RatingDataset
from personas_tune.errors import ConfigError, PromptError, ServerError
from personas_tune.evaluation.readouts import Probabilities
from personas_tune.llm.scoring import MOST_TOKENS_ASKED, LogProbabilities, Reading, Scorer
from personas_tune.llm.settings import ServerSettings
from personas_tune.workspace import read_json

Begun = tuple[int, ...]  # the beginning of an answer
Hosted = dict[str | None, tuple[str, str]]  # of an adapter, or the base (None): the address and its name there


def load_served_agent(
    experiment: str | Path,
    agent: str,
    *,
    base_url: str | Mapping[str, str],
    concurrency: int = 32,
    timeout_s: float = 120,
    max_retries: int = 8,
    overrides: Sequence[str] = (),
    allow_paid_calls: bool = False,
) -> Agent:
    """An agent whose base and adapters are on a server; here it takes the tokenizer and the experiment's files.

    An adapter goes by the name ``SET-ADAPTER`` there, such as ``persona-0``. A key, if the server wants one, is
    read from ``OPENAI_API_KEY`` now. Connections stay open until the agent is closed or let go of.

    Args:
        experiment: As for :func:`load_agent`.
        agent: Its name under ``agents``.
        base_url: The server's address, such as ``http://localhost:8000/v1``; for merged adapters, of which a server
            has one, a mapping from each name (``persona-0``) to its address.
        concurrency: Most requests in flight to one address; a request has one item.
        timeout_s: For a whole request.
        max_retries: Of one request after 408, 409, 429, 5xx and broken connections.
        overrides: ``key=value`` for the config, as on a recipe's command line.
        allow_paid_calls: As for :func:`load_agent`.

    Raises:
        ServerError: If the server is down, or doesn't host what the agent needs.
        ConfigError: If there is no such agent, an address is none, or a bound isn't what it may be.
        AdapterError: If the tokenizer isn't the one that the adapters were trained with, or a user has no adapter.
        DataError: If a stage's files are damaged.
        MissingInputError: If a stage hasn't run.
        SeveralErrors: For several mistakes.
    """
    bounds: dict[str, Any] = {"concurrency": concurrency, "timeout_s": timeout_s, "max_retries": max_retries}
    _require_bounds(bounds)
    addresses = {"": base_url} if not isinstance(base_url, Mapping) else dict(base_url)
    for address in addresses.values() or [None]:
        if not isinstance(address, str) or not address.strip():  # never the public one that the environment may name
            raise ConfigError("no address", where="base_url", remedy="give one, such as http://localhost:8000/v1")
    settings = find_agent(experiment, agent, overrides)
    sections = settings.base_sections
    files = [sections["tokenizer"].get(key) for key in TOKENIZER_FILES]
    settings.require_trained_base([Path(str(file)) for file in files if file is not None and Path(str(file)).is_file()])
    tokenizer = load_tokenizer(sections["tokenizer"], build_on_meta(sections["model"], settings.cfg.dtype))
    assignment = None
    if settings.adapters is not None:
        folder = settings.workspace.adapter_set(settings.adapters)
        assignment = read_assignment(folder, settings.adapters, settings.cohort)
    servers = {url: ServerSettings(model="", base_url=url, **bounds) for url in addresses.values()}
    scorer = Scorer(servers)
    try:
        hosted = _find_models(settings, scorer, addresses, assignment)
        score = partial(_score, scorer, tokenizer, hosted)
        return Agent(settings, tokenizer, assignment, score, allow_paid_calls=allow_paid_calls, close=scorer.close)
    except BaseException:
        scorer.close()
        raise


def _require_bounds(bounds: Mapping[str, Any]) -> None:
    least = {"concurrency": 1, "max_retries": 0}
    for key, value in bounds.items():
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if key in least and not (is_whole and value >= least[key]):
            raise ConfigError(f"{value!r} is too few", where=key, remedy=f"give a whole number from {least[key]} on")
    timeout_s = bounds["timeout_s"]
    if not isinstance(timeout_s, int | float) or not 0 < timeout_s < math.inf:
        raise ConfigError(f"{timeout_s!r} is no time", where="timeout_s", remedy="give seconds above 0")


def _find_models(
    settings: AgentSettings, scorer: Scorer, addresses: Mapping[str, str], assignment: Mapping[str, str] | None
) -> Hosted:
    """Where each adapter, or the base (None), is served, and what it is called there.

    Raises:
        ConfigError: If no address is given for one of them.
        ServerError: If a server doesn't have one of them.
    """
    if assignment is None:
        if "" not in addresses:
            raise ConfigError("several addresses", where="base_url", remedy="the base alone takes one address")
        return {None: (addresses[""], _find_base(settings, scorer, addresses[""]))}
    names = {adapter: adapter.replace("/", "-") for adapter in sorted(set(assignment.values()))}
    unknown = [name for name in names.values() if "" not in addresses and name not in addresses]
    if unknown:
        raise ConfigError(f"no address of {unknown[0]}", where="base_url", remedy="name one for each adapter")
    hosted: Hosted = {adapter: (addresses.get(name, addresses.get("", "")), name) for adapter, name in names.items()}
    for url in dict.fromkeys(url for url, _ in hosted.values()):
        here = sorted(name for at, name in hosted.values() if at == url)
        listed = [model.name for model in scorer.models(url)]
        missing = [name for name in here if name not in listed]
        if missing:
            what = f"{', '.join(missing)} not served, but {', '.join(listed) or 'nothing'}"
            remedy = f"serve them: {_command(settings, sorted(names.values()))}"
            raise ServerError(what, where=scorer.shown_urls[url], remedy=remedy)
    return hosted


def _find_base(settings: AgentSettings, scorer: Scorer, url: str) -> str:
    models = scorer.models(url)
    merged = tuple(f"{name}-" for name in settings.cfg.adapter_sets)
    bases = [model.name for model in models if model.parent is None and not model.name.startswith(merged)]
    if len(bases) != 1:
        listed = ", ".join(model.name for model in models) or "nothing"
        remedy = f"serve the agent's base: {_command(settings, ())}"
        raise ServerError(f"not one base is served, but {listed}", where=scorer.shown_urls[url], remedy=remedy)
    return bases[0]


def _command(settings: AgentSettings, names: Sequence[str]) -> str:
    """The line that serves an agent: the one that ``persona_export`` wrote, else one to fill in."""
    exported = settings.workspace.root / "export"
    record = exported / ("serving.json" if settings.base is None else f"serving_{settings.base}.json")
    if record.is_file() and (command := read_json(record).get("command")):
        return f"`{command}`"
    base = settings.base_sections["checkpointer"].get("checkpoint_dir")
    if not names:
        return f"`vllm serve {base}`"
    modules = " ".join(f"{name}={exported / str(settings.adapters) / name.rpartition('-')[2]}" for name in names)
    return f"`vllm serve {base} --enable-lora --lora-modules {modules}` after `tune run persona_export --config ...`"


def _score(
    scorer: Scorer,
    tokenizer: ChatTokenizer,
    hosted: Hosted,
    dataset: RatingDataset,
    assignment: Mapping[str, str] | None,
    labels: Sequence[str],
) -> Probabilities:
    answers = [tuple(tokenizer.answer_tokens(label)) for label in labels]
    begun = beginnings(answers)
    tokens = sorted({token for answer in answers for token in answer})
    if len(tokens) > MOST_TOKENS_ASKED:
        what = f"the {len(labels)} labels have {len(tokens)} tokens, a server tells of {MOST_TOKENS_ASKED} at once"
        raise PromptError(what, where="data.rating_scale", remedy="use an agent of load_agent")
    models = [hosted[None if assignment is None else assignment[sample.user_id]] for sample in dataset.samples]
    # One adapter's prompts, and those that begin alike, one after the other: the server has them in its cache.
    order = sorted(range(len(dataset)), key=lambda row: (models[row], dataset.rows[row].prompt))
    readings = [(models[row][0], Reading(models[row][1], dataset.rows[row].prompt, begun, tokens)) for row in order]
    p = np.empty((len(dataset), len(labels)))
    for row, told in zip(order, scorer.read(readings), strict=True):
        p[row] = distribution(answers, dict(zip(begun, told, strict=True)))
    return p


def beginnings(answers: Sequence[Begun]) -> list[Begun]:
    """All that answers begin with and go on from, the empty beginning first.

    Example:
        >>> beginnings([(4, 9), (4, 5, 9), (3, 9)])
        [(), (3,), (4,), (4, 5)]
    """
    return sorted({answer[:n] for answer in answers for n in range(len(answer))}, key=lambda start: (len(start), start))


def distribution(answers: Sequence[Begun], after: Mapping[Begun, LogProbabilities]) -> Probabilities:
    """Probabilities of answers, renormalised over them, shape ``(n_answers,)``.

    Args:
        answers: Their tokens, end of turn included.
        after: Log probabilities of the next token after each beginning.

    Raises:
        ServerError: If none has a probability above zero.
    """
    logs = np.array([sum(after[answer[:n]][token] for n, token in enumerate(answer)) for answer in answers])
    # vLLM writes -9999 where a probability is zero.
    if logs.max() < -9000:
        raise ServerError("the server gives all labels probability 0", where="labels", remedy="is it the agent's base?")
    weights = np.exp(logs - logs.max())
    return np.asarray(weights / weights.sum())
