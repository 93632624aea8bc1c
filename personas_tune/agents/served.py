"""Agents on a server that hosts the base and the exported adapters, such as vLLM.

A label's probability is the product over its answer's tokens, as of agents in this process. The server
is asked what may come next after the prompt, and after the prompt with the beginning of each answer.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from personas_tune.adapters.base_model import build_on_meta, load_tokenizer
from personas_tune.agents.agent import Agent
from personas_tune.agents.settings import AgentSettings, find_agent
from personas_tune.datasets import ChatTokenizer, RatingDataset
from personas_tune.errors import PromptError, ServerError
from personas_tune.evaluation.readouts import Probabilities
from personas_tune.llm.scoring import MOST_TOKENS_ASKED, LogProbabilities, Reading, read_next_tokens, served_models
from personas_tune.llm.settings import ServerSettings
from personas_tune.workspace import read_json, read_table

Begun = tuple[int, ...]  # the beginning of an answer


def load_served_agent(
    experiment: str | Path,
    agent: str,
    *,
    base_url: str,
    concurrency: int = 32,
    timeout_s: float = 120,
    max_retries: int = 8,
    overrides: Sequence[str] = (),
    allow_paid_calls: bool = False,
) -> Agent:
    """An agent whose base and adapters are on a server; here it takes the tokenizer and the experiment's files.

    An adapter goes by the name ``SET-ADAPTER`` there, such as ``persona-0``. A key, if the server wants one, is
    read from ``OPENAI_API_KEY``.

    Args:
        experiment: As for :func:`load_agent`.
        agent: Its name under ``agents``.
        base_url: The server's address, such as ``http://localhost:8000/v1``.
        concurrency: Most requests in flight; a request has one item.
        timeout_s: For a whole request.
        max_retries: Of one request after 408, 409, 429, 5xx and broken connections.
        overrides: ``key=value`` for the config, as on a recipe's command line.
        allow_paid_calls: As for :func:`load_agent`.

    Raises:
        ServerError: If the server is down, or doesn't host what the agent needs.
        ConfigError: If there is no such agent, or the address is none.
        MissingInputError: If a stage hasn't run.
        SeveralErrors: For several mistakes.
    """
    settings = find_agent(experiment, agent, overrides)
    sections = settings.base_sections
    tokenizer = load_tokenizer(sections["tokenizer"], build_on_meta(sections["model"], settings.cfg.dtype))
    assignment = None if settings.adapters is None else _read_assignment(settings, settings.adapters)
    server = ServerSettings(
        model="", base_url=base_url, concurrency=concurrency, timeout_s=timeout_s, max_retries=max_retries
    )
    names = _served_names(settings, server, assignment)
    score = partial(_score, server, tokenizer, names)
    return Agent(settings, tokenizer, assignment, score, allow_paid_calls=allow_paid_calls)


def _read_assignment(settings: AgentSettings, adapters: str) -> dict[str, str]:
    path = settings.workspace.adapter_set(adapters) / "assignment.parquet"
    rows = read_table(path, ("user_id", "adapter")).to_pylist()
    return {row["user_id"]: f"{adapters}/{row['adapter']}" for row in rows}


def _served_names(
    settings: AgentSettings, server: ServerSettings, assignment: Mapping[str, str] | None
) -> dict[str | None, str]:
    """What the server calls each adapter, or the base (None).

    Raises:
        ServerError: If it doesn't have one of them.
    """
    models = served_models(server)
    where = str(server.base_url).rpartition("@")[2]
    listed = ", ".join(model.name for model in models) or "nothing"
    if assignment is None:
        merged = tuple(f"{name}-" for name in settings.cfg.adapter_sets)
        bases = [model.name for model in models if model.parent is None and not model.name.startswith(merged)]
        if len(bases) != 1:
            remedy = f"serve the agent's base: {_command(settings, ())}"
            raise ServerError(f"not one base is served, but {listed}", where=where, remedy=remedy)
        return {None: bases[0]}
    names: dict[str | None, str] = {adapter: adapter.replace("/", "-") for adapter in sorted(set(assignment.values()))}
    missing = sorted(set(names.values()) - {model.name for model in models})
    if missing:
        remedy = f"serve them: {_command(settings, sorted(names.values()))}"
        raise ServerError(f"{', '.join(missing)} not served, but {listed}", where=where, remedy=remedy)
    return names


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
    server: ServerSettings,
    tokenizer: ChatTokenizer,
    names: Mapping[str | None, str],
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
    models = [names[None if assignment is None else assignment[sample.user_id]] for sample in dataset.samples]
    # One adapter's prompts, and those that begin alike, one after the other: the server has them in its cache.
    order = sorted(range(len(dataset)), key=lambda row: (models[row], dataset.rows[row].prompt))
    readings = [Reading(models[row], dataset.rows[row].prompt, begun, tokens) for row in order]
    p = np.empty((len(dataset), len(labels)))
    for row, told in zip(order, read_next_tokens(server, readings), strict=True):
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
