"""Predictions of an agent for every test sample."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from torchtune.modules.peft import disable_adapter

from personas_tune.adapters.base_model import BaseModel
from personas_tune.datasets import RatingDataset, Sample
from personas_tune.evaluation.readouts import (
    Probabilities,
    expected_ratings,
    generate_answers,
    label_probabilities,
    most_likely_ratings,
    parse_rating,
)


@dataclass(frozen=True)
class Sampling:
    """How ``generate`` answers are drawn (paper, appendix A)."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    seed: int


def predict_distributions(
    base: BaseModel,
    dataset: RatingDataset,
    rows: Sequence[int],
    assignment: Mapping[str, str] | None,
    labels: Sequence[str],
    max_tokens: int,
    on_rows: Callable[[int], None],
) -> Probabilities:
    """Distributions over the labels, shape ``(len(rows), n_labels)``.

    Args:
        base: The base, with the assigned adapters in its bank.
        dataset: The samples.
        rows: Which of them, as indices.
        assignment: Adapter in the bank by user; None for the base alone.
        labels: The rating labels.
        max_tokens: Tokens in memory at once, about.
        on_rows: Called with the number of samples done since the last call.
    """
    answers = [base.tokenizer.answer_tokens(label) for label in labels]
    p = np.empty((len(rows), len(labels)))
    for adapter, chosen in _by_adapter(dataset.samples, rows, assignment):
        with _in_use(base, adapter):
            p[chosen] = label_probabilities(
                base.model,
                [dataset.rows[rows[place]].prompt for place in chosen],
                answers,
                pad_id=base.tokenizer.pad_id,
                max_tokens=max_tokens,
                on_rows=on_rows,
            )
    return p


def predict_texts(
    base: BaseModel,
    dataset: RatingDataset,
    rows: Sequence[int],
    assignment: Mapping[str, str] | None,
    sampling: Sampling,
    max_tokens: int,
    on_rows: Callable[[int], None],
) -> list[str]:
    """What the agent says for each of the rows when it generates freely; arguments as above."""
    texts = [""] * len(rows)
    for adapter, chosen in _by_adapter(dataset.samples, rows, assignment):
        with _in_use(base, adapter):
            answers = generate_answers(
                base.model,
                [dataset.rows[rows[place]].prompt for place in chosen],
                [dataset.samples[rows[place]].name for place in chosen],
                pad_id=base.tokenizer.pad_id,
                stop_tokens=base.tokenizer.stop_tokens,
                max_new_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                max_tokens=max_tokens,
                seed=sampling.seed,
                on_rows=on_rows,
            )
        for place, answer in zip(chosen, answers, strict=True):
            texts[place] = base.tokenizer.decode(answer)
    return texts


def share_of_rows(
    samples: Sequence[Sample], assignment: Mapping[str, str] | None, part: int, n_parts: int
) -> list[int]:
    """The rows that one of several processes predicts: neighbours by adapter and user, as many as the others have.

    Args:
        samples: All test samples.
        assignment: Adapter by user; None for the base alone.
        part: Which process, from 0 on.
        n_parts: How many there are.

    Returns:
        Indices of samples; those of all parts are each row once.
    """

    def neighbours(index: int) -> tuple[str, str]:
        user = samples[index].user_id
        return ("" if assignment is None else assignment[user], user)

    order = sorted(range(len(samples)), key=neighbours)
    return order[len(order) * part // n_parts : len(order) * (part + 1) // n_parts]


def prediction_table(
    samples: Sequence[Sample], p: Probabilities, labels: Sequence[str], texts: Sequence[str] | None
) -> pa.Table:
    """A row per sample, as ``predictions_<agent>.parquet`` has it.

    Args:
        samples: The test samples.
        p: Their label probabilities, shape ``(n_samples, n_labels)``.
        labels: The labels.
        texts: Generated answers; None leaves ``text`` and ``parsed`` empty.
    """
    values = [float(label) for label in labels]
    n = len(samples)
    return pa.table(
        {
            "user_id": [sample.user_id for sample in samples],
            "item_id": [sample.item_id for sample in samples],
            "position": pa.array([sample.position for sample in samples], pa.int32()),
            "rating": [sample.rating for sample in samples],
            "persona": pa.array([sample.persona for sample in samples], pa.int32()),
            "p": pa.array(list(p), pa.list_(pa.float64())),
            "expected": expected_ratings(p, values),
            "argmax": most_likely_ratings(p, values),
            "text": pa.array(texts if texts is not None else [None] * n, pa.string()),
            "parsed": pa.array(
                [parse_rating(text, labels) for text in texts] if texts is not None else [None] * n, pa.float64()
            ),
        }
    )


def _by_adapter(
    samples: Sequence[Sample], rows: Sequence[int], assignment: Mapping[str, str] | None
) -> list[tuple[str | None, list[int]]]:
    """Places in ``rows`` by adapter; users of a set's training have one, others would be a bug."""
    groups: dict[str | None, list[int]] = {}
    for place, index in enumerate(rows):
        groups.setdefault(None if assignment is None else assignment[samples[index].user_id], []).append(place)
    return sorted(groups.items(), key=lambda entry: entry[0] or "")


@contextmanager
def _in_use(base: BaseModel, adapter: str | None) -> Iterator[None]:
    if adapter is None:
        with disable_adapter(base.model):
            yield
    else:
        with base.bank.use(adapter):
            yield
