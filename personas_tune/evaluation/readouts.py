"""What a model says of each rating label, and what it says when it just talks.

The probability of a label is the product over all of its answer's tokens, end of turn included
("4" begins "4.5"), given the prompt and renormalised over the labels.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from personas_tune.adapters.bank import stable_seed
from personas_tune.datasets.tokens import TokenRow
from personas_tune.training.batches import AnswerBatch, plan_prompts, plan_tree_round
from personas_tune.training.forward import fp32_head
from personas_tune.training.shared_prefix import PrefixReader

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

    What prompts have in common at their beginnings (one user's) is read once, and the rest of each
    prompt once for all labels.

    Args:
        model: With the adapter in use that shall answer, or adapters disabled.
        prompts: Tokens up to where the answer begins, in any order.
        answers: The labels' answers, end-of-turn token included.
        pad_id: Token that fills up short rows.
        max_tokens: Tokens in memory at once, about: of prefixes and of one pass of what follows them.
        on_rows: Called with the number of prompts done since the last call.

    Returns:
        Shape ``(len(prompts), len(answers))``; rows sum to 1.
    """
    model.eval()
    lengths = [len(answer) for answer in answers]
    p = np.empty((len(prompts), len(answers)))
    with PrefixReader(model) as reader, fp32_head(model):
        for batch, chosen in _read_prompts(reader, prompts, answers, pad_id, max_tokens):
            of_tokens = torch.split(_log_p(reader, batch), lengths * len(chosen))
            of_labels = torch.stack([part.sum() for part in of_tokens])
            p[chosen] = of_labels.view(len(chosen), len(answers)).softmax(-1).numpy()
            on_rows(len(chosen))
    return p


def _log_p(reader: PrefixReader, batch: AnswerBatch) -> Tensor:
    """Log probability of each answer token, shape ``(N,)``; only these leave the GPU."""
    logits = reader.place_logits(batch)
    log_sums = logits.logsumexp(-1)
    place, targets = batch.place.to(logits.device), batch.targets.to(logits.device)
    return (logits[place, targets] - log_sums[place]).double().cpu()


def _read_prompts(
    reader: PrefixReader, prompts: Sequence[list[int]], answers: Sequence[list[int]], pad_id: int, max_tokens: int
) -> Iterator[tuple[AnswerBatch, list[int]]]:
    """Read prefixes one after another; gives the passes of what follows them, and which prompts each pass has."""
    for groups, n_per_pass in plan_prompts(prompts, sum(len(answer) for answer in answers), max_tokens):
        branches = [[[TokenRow(prompts[i] + answer, len(prompts[i])) for answer in answers] for i in g] for g in groups]
        part = plan_tree_round(branches, n_per_pass, pad_id)
        reader.read(part.prefixes)
        left = chain.from_iterable(groups)
        for batch in part.batches:
            yield batch, list(islice(left, len(batch.tokens)))


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

    Each prompt draws from a random stream of its own, so batching doesn't change its answer. What
    prompts have in common is read once, the rest of each prompt once, and then a token at a time.

    Args:
        model: With the adapter in use that shall answer, or adapters disabled.
        prompts: Tokens up to where the answer begins, in any order.
        names: A name for each prompt; seeds its random stream.
        pad_id: Token that fills up short rows.
        stop_tokens: Tokens that end an answer; not returned.
        max_new_tokens: Length of an answer; less where the model's context ends.
        temperature: 0 takes the most probable token.
        top_k: Draw among so many tokens; None for all.
        max_tokens: Tokens in memory at once, about: of prefixes and of one pass of what follows them.
        seed: The experiment's seed.
        on_rows: Called with the number of prompts done since the last call.

    Returns:
        Tokens of each answer.
    """
    model.eval()
    longest = int(model.max_seq_len)  # type: ignore[arg-type]
    answers: list[list[int]] = [[] for _ in prompts]
    with PrefixReader(model) as reader, fp32_head(model):
        # A row needs a token to be predicted; which one it is doesn't matter.
        for batch, chosen in _read_prompts(reader, prompts, [[pad_id]], pad_id, max_tokens):
            generators = [torch.Generator().manual_seed(stable_seed(seed, names[index])) for index in chosen]
            limits = [min(max_new_tokens, longest - len(prompts[index])) for index in chosen]
            drawn = _generate(reader, batch, generators, limits, set(stop_tokens), temperature, top_k)
            for index, answer in zip(chosen, drawn, strict=True):
                answers[index] = answer[:-1] if answer[-1] in stop_tokens else answer
            on_rows(len(chosen))
    return answers


def _generate(
    reader: PrefixReader,
    batch: AnswerBatch,
    generators: Sequence[torch.Generator],
    limits: Sequence[int],
    stop_tokens: set[int],
    temperature: float,
    top_k: int | None,
) -> list[list[int]]:
    """Tokens drawn for each branch up to its limit (but one at least) or a stop token, which is returned too."""
    answers: list[list[int]] = [[] for _ in generators]
    going = list(range(len(answers)))
    seen = torch.arange(batch.tokens.shape[1]) <= batch.source.unsqueeze(1)
    assert batch.input_pos is not None
    position = batch.input_pos[batch.batch_index, batch.source]
    with reader.remembering():
        while True:
            logits = reader.logits(batch)[going]
            drawn = _draw(logits, [generators[i] for i in going], temperature, top_k)
            for i, token in zip(going, drawn, strict=True):
                answers[i].append(token)
            going = [i for i in going if answers[i][-1] not in stop_tokens and len(answers[i]) < limits[i]]
            if not going:
                return answers
            seen = nn.functional.pad(seen, (0, 1), value=True)
            position = position + torch.isin(torch.arange(len(answers)), torch.tensor(going))  # the others stay
            batch = _last_tokens(answers, position, seen, batch.runs)


def _last_tokens(answers: Sequence[list[int]], position: Tensor, seen: Tensor, runs: tuple[int, ...]) -> AnswerBatch:
    """The token that each answer ends with, to be run next."""
    tokens = torch.tensor([answer[-1] for answer in answers])
    row = torch.arange(len(answers))
    return AnswerBatch(
        tokens=tokens.unsqueeze(1),
        batch_index=row,
        source=torch.zeros_like(row),
        place=row,
        targets=tokens,
        input_pos=position.unsqueeze(1),
        mask=seen.unsqueeze(1),
        runs=runs,
    )


def _draw(logits: Tensor, generators: Sequence[torch.Generator], temperature: float, top_k: int | None) -> list[int]:
    """A token for each row of logits, drawn among its ``top_k``; only these leave the GPU.

    Dividing probabilities by exponential noise and taking the largest draws from them, as torchtune's ``sample`` does.
    """
    if temperature == 0:
        return list(logits.argmax(-1).tolist())
    n_tokens = logits.shape[1]
    best, tokens = (each.cpu() for each in logits.topk(min(top_k or n_tokens, n_tokens)))
    noise = torch.stack([torch.empty(best.shape[1]).exponential_(1, generator=each) for each in generators])
    drawn = ((best / temperature).softmax(-1) / noise).argmax(-1, keepdim=True)
    return list(tokens.gather(1, drawn).squeeze(1).tolist())


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
