"""What a model says of each rating label, and what it says when it just talks.

The probability of a label is the product over all of its answer's tokens, end of turn included
("4" begins "4.5"), given the prompt and renormalised over the labels.
"""

import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchtune.generation import sample

from personas_tune.adapters.bank import stable_seed
from personas_tune.datasets.token_tree import common_prefix_length
from personas_tune.datasets.tokens import TokenRow
from personas_tune.training.forward import answer_logits, plain_batch, shared_batch

Probabilities = NDArray[np.float64]


@torch.no_grad()
def label_probabilities(
    model: nn.Module,
    prompts: Sequence[list[int]],
    answers: Sequence[list[int]],
    *,
    pad_id: int,
    max_tokens: int,
    on_rows: Callable[[int], None] = lambda n_rows: None,
) -> Probabilities:
    """Each prompt's distribution over the rating labels.

    Prompts that follow one another and begin alike (one user's) have their common beginning read
    once, and each prompt is read once for all labels.

    Args:
        model: With the adapter in use that shall answer, or adapters disabled.
        prompts: Tokens up to where the answer begins.
        answers: The labels' answers, end-of-turn token included.
        pad_id: Token that fills up short rows.
        max_tokens: Tokens of one forward pass, about.
        on_rows: Called with the number of prompts done since the last call.

    Returns:
        Shape ``(len(prompts), len(answers))``; rows sum to 1.
    """
    model.eval()
    device = next(model.parameters()).device
    n_answer_tokens = sum(len(answer) for answer in answers)
    lengths = [len(answer) for answer in answers]
    blocks = []
    for run in neighbours(prompts, n_answer_tokens, max_tokens):
        branches = [[TokenRow(prompts[i] + answer, len(prompts[i])) for answer in answers] for i in run]
        batch = shared_batch([branches], pad_id).to(device)
        log_p = answer_logits(model, batch).double().log_softmax(-1)
        chosen = log_p.gather(1, batch.targets.unsqueeze(1)).squeeze(1)
        of_labels = torch.stack([part.sum() for part in torch.split(chosen, lengths * len(run))])
        blocks.append(of_labels.view(len(run), len(answers)).softmax(-1).cpu().numpy())
        on_rows(len(run))
    return np.concatenate(blocks)


def neighbours(prompts: Sequence[list[int]], n_answer_tokens: int, max_tokens: int) -> Iterator[range]:
    """Cut prompts into runs of neighbours that share at least half of their tokens, of about ``max_tokens``."""
    start, n_tokens, shared = 0, 0, 0
    for index, prompt in enumerate(prompts):
        common = min(shared, common_prefix_length(prompts[start], prompt)) if index > start else len(prompt)
        n_tokens = common + (index - start + 1) * (len(prompt) - common + n_answer_tokens)
        if index > start and (n_tokens > max_tokens or common < len(prompt) / 2):
            yield range(start, index)
            start, common = index, len(prompt)
        shared = common
    yield range(start, len(prompts))


def expected_ratings(probabilities: Probabilities, values: Sequence[float]) -> NDArray[np.float64]:
    """Probability-weighted mean of the labels' values, shape ``(n,)``."""
    return np.asarray(probabilities @ np.asarray(values, dtype=np.float64))


def most_likely_ratings(probabilities: Probabilities, values: Sequence[float]) -> NDArray[np.float64]:
    """Value of the most probable label, shape ``(n,)``; the lower one on ties."""
    return np.asarray(np.asarray(values, dtype=np.float64)[probabilities.argmax(axis=1)])


@torch.no_grad()
def generate_answers(
    model: nn.Module,
    prompts: Sequence[list[int]],
    names: Sequence[str],
    *,
    pad_id: int,
    stop_tokens: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    max_tokens: int,
    seed: int,
    on_rows: Callable[[int], None] = lambda n_rows: None,
) -> list[list[int]]:
    """Let the model answer freely, as the paper does (appendix A).

    Each prompt draws from a random stream of its own, so batching doesn't change its answer.

    Args:
        model: With the adapter in use that shall answer, or adapters disabled.
        prompts: Tokens up to where the answer begins.
        names: A name for each prompt; seeds its random stream.
        pad_id: Token that fills up short rows.
        stop_tokens: Tokens that end an answer; not returned.
        max_new_tokens: Length of an answer; less where the model's context ends.
        temperature: 0 takes the most probable token.
        top_k: Draw among so many tokens; None for all.
        max_tokens: Tokens of one forward pass, padding included.
        seed: The experiment's seed.
        on_rows: Called with the number of prompts done since the last call.

    Returns:
        Tokens of each answer.
    """
    model.eval()
    answers: list[list[int]] = []
    width = max(len(prompt) for prompt in prompts) + max_new_tokens
    size = max(1, max_tokens // width)
    for start in range(0, len(prompts), size):
        chunk = prompts[start : start + size]
        generators = [torch.Generator().manual_seed(stable_seed(seed, name)) for name in names[start : start + size]]
        answers += _generate_chunk(
            model, chunk, generators, pad_id, set(stop_tokens), max_new_tokens, temperature, top_k
        )
        on_rows(len(chunk))
    return answers


def _generate_chunk(
    model: nn.Module,
    prompts: Sequence[list[int]],
    generators: Sequence[torch.Generator],
    pad_id: int,
    stop_tokens: set[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
) -> list[list[int]]:
    device = next(model.parameters()).device
    longest = int(model.max_seq_len)  # type: ignore[arg-type]
    answers: list[list[int]] = [[] for _ in prompts]
    going = list(range(len(prompts)))
    for _ in range(max_new_tokens):
        # The answer token of these rows is a placeholder: only what precedes it is read.
        rows = [TokenRow([*prompts[i], *answers[i], pad_id], len(prompts[i]) + len(answers[i])) for i in going]
        logits = answer_logits(model, plain_batch(rows, pad_id).to(device)).cpu()
        noise = torch.stack([torch.empty(logits.shape[1]).exponential_(1, generator=generators[i]) for i in going])
        drawn = _draw(logits, noise, temperature, top_k)
        for i, token in zip(going, drawn, strict=True):
            answers[i].append(token)
        has_room = [len(prompts[i]) + len(answers[i]) < longest for i in going]
        going = [i for i, room in zip(going, has_room, strict=True) if room and answers[i][-1] not in stop_tokens]
        if not going:
            break
    return [answer[:-1] if answer and answer[-1] in stop_tokens else answer for answer in answers]


def _draw(logits: Tensor, noise: Tensor, temperature: float, top_k: int | None) -> list[int]:
    if temperature == 0:
        return list(logits.argmax(-1).tolist())
    return list(sample(logits, temperature=temperature, top_k=top_k, q=noise).squeeze(1).tolist())


def parse_rating(text: str, labels: Sequence[str]) -> float | None:
    """The first rating label in a generated text that isn't part of a longer number, or None.

    Example:
        >>> parse_rating("Rating: 4", ["1", "2", "3", "4", "5"])
        4.0
        >>> parse_rating("4.0", ["1", "2", "3", "4", "5"])
        4.0
        >>> parse_rating("45", ["1", "2", "3", "4", "5"]) is None
        True
    """
    alternatives = "|".join(re.escape(label) for label in sorted(labels, key=len, reverse=True))
    match = re.search(rf"(?<![\d.\-])({alternatives})(?:\.0+)?(?!\d|\.\d)", text)
    return float(match.group(1)) if match else None
