"""Agents on a base in this process."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from personas_tune.adapters.base_model import BaseModel, checkpoint_inputs, load_base
from personas_tune.adapters.selection import load_adapter_set
from personas_tune.agents.agent import Agent
from personas_tune.agents.settings import find_agent
from personas_tune.datasets import RatingDataset
from personas_tune.evaluation.predict import predict_distributions
from personas_tune.evaluation.readouts import Probabilities


def load_agent(
    experiment: str | Path,
    agent: str,
    *,
    device: str | None = None,
    dtype: str | None = None,
    max_tokens_per_forward: int | None = None,
    overrides: Sequence[str] = (),
    allow_paid_calls: bool = False,
) -> Agent:
    """Load an agent's base and adapters, once for all that it will rate.

    Its distributions are those that ``persona_eval`` writes to ``eval/predictions_<agent>.parquet``.

    Args:
        experiment: The folder of a trained experiment (``output_dir``), or its config: a path or a bundled name.
        agent: Its name under ``agents``.
        device: ``cpu`` or ``cuda``; the config's if None.
        dtype: ``fp32`` or ``bf16``; the config's if None.
        max_tokens_per_forward: Tokens in memory at once, about; the config's if None.
        overrides: ``key=value`` for the config, as on a recipe's command line.
        allow_paid_calls: Whether an ``openai`` embedder may embed, for money, what the journal doesn't know.

    Raises:
        ConfigError: If there is no such agent, or a component or setting isn't what it may be.
        MissingInputError: If a stage hasn't run, or the base's files aren't there.
        AdapterError: If an adapter doesn't fit the base or was trained on another one, or a user has none.
        DataError: If a stage's files are damaged.
        CheckpointError: If a file of the base or of an adapter is damaged.
        SeveralErrors: For several mistakes.
    """
    own = {"device": device, "dtype": dtype, "evaluation.max_tokens_per_forward": max_tokens_per_forward}
    checked = [f"{key}={value}" for key, value in own.items() if value is not None]
    settings = find_agent(experiment, agent, overrides, checked)
    cfg = settings.cfg
    settings.require_trained_base(checkpoint_inputs(**settings.base_sections))
    base = load_base(**settings.base_sections, device=cfg.device, dtype=cfg.dtype)
    assignment = None
    if settings.adapters is not None:
        folder = settings.workspace.adapter_set(settings.adapters)
        assignment = load_adapter_set(base.bank, folder, settings.adapters, settings.cohort)
    score = partial(_score, base, cfg.evaluation.max_tokens_per_forward)
    return Agent(settings, base.tokenizer, assignment, score, allow_paid_calls=allow_paid_calls)


def _score(
    base: BaseModel,
    max_tokens: int,
    dataset: RatingDataset,
    assignment: Mapping[str, str] | None,
    labels: Sequence[str],
) -> Probabilities:
    rows = range(len(dataset))
    return predict_distributions(base, dataset, rows, assignment, labels, max_tokens, lambda n_rows: None)
