"""A small base of Phi-3's or Llama-3's architecture trained from nothing.

It stands in for Phi-3-Mini or LLaMA-3-8B where there is no network, no GPU and no time, and goes
through the same tokenizer, checkpointer and recipes (``tiny_tokenizers.py``, ``tiny_checkpoint.py``).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchtune.models.llama3 import llama3
from torchtune.models.phi3 import phi3

from personas_tune.datasets.token_tree import shared_length
from personas_tune.datasets.tokens import TokenRow
from personas_tune.training.shared_prefix import shared_logits

_BUILDERS: dict[str, Callable[..., nn.Module]] = {"phi3": phi3, "llama3": llama3}


@dataclass(frozen=True)
class TinyBaseShape:
    """Architecture (``phi3`` or ``llama3``) and sizes of a tiny base, named as torchtune's builders name them."""

    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    embed_dim: int
    intermediate_dim: int
    max_seq_len: int
    architecture: str = "phi3"


@dataclass(frozen=True)
class TinyBaseTraining:
    """How a tiny base is trained.

    Args:
        epochs: Passes over all rows.
        max_steps: Steps after which training ends; None for all rows.
        rows_per_step: Rows of one optimizer step.
        rows_per_user: How many of them share a user, and so a prefix that is computed once.
        learning_rate: Peak of a cosine schedule.
        weight_decay: AdamW's, on matrices only.
        warmup_steps: Steps until the peak.
        prompt_loss_weight: Weight of the mean loss over the prompts' own tokens (beyond what a user's
            rows share), beside 1 for the answers'. What the prompts say of earlier ratings teaches
            reading and arithmetic long before the few answer tokens could.
        seed: Seeds weights and order.
    """

    epochs: int
    max_steps: int | None
    rows_per_step: int
    rows_per_user: int
    learning_rate: float
    weight_decay: float
    warmup_steps: int
    prompt_loss_weight: float
    seed: int


def build_tiny_base(shape: TinyBaseShape, seed: int) -> nn.Module:
    """A randomly initialised model.

    Weights are normal with sd sqrt(2 / (5 d)) (SmallInit, Nguyen and Salazar 2019), which at GPT-2's width is
    its 0.02; those that write to the residual stream are scaled down by sqrt(2 x layers), as GPT-2's are.
    """
    sizes = asdict(shape)
    build = _BUILDERS[sizes.pop("architecture")]
    sd = math.sqrt(2 / (5 * shape.embed_dim))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build(**sizes)
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                residual = name.endswith(("output_proj.weight", "w2.weight"))
                nn.init.normal_(weight, std=sd / math.sqrt(2 * shape.num_layers) if residual else sd)
    return model


def train_tiny_base(
    model: nn.Module,
    rows: Sequence[TokenRow],
    users: Sequence[str],
    settings: TinyBaseTraining,
    pad_id: int,
    on_step: Callable[[int, int, float], None],
) -> None:
    """Train all weights on the rows' answers.

    Args:
        model: From :func:`build_tiny_base`.
        rows: Tokenised samples.
        users: Each row's user.
        settings: How.
        pad_id: Token that fills up short rows.
        on_step: Called with step, number of steps and loss after each step.
    """
    all_steps = [chosen for epoch in range(settings.epochs) for chosen in _steps(users, epoch, settings)]
    steps = all_steps[: settings.max_steps]
    optimizer = torch.optim.AdamW(
        _decay_groups(model, settings.weight_decay), lr=settings.learning_rate, betas=(0.9, 0.98), fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warm_cosine(settings.warmup_steps, len(steps)))
    model.train()
    for step, chosen in enumerate(steps, start=1):
        groups = [[rows[index] for index in run] for run in chosen]
        loss, answer_loss = _language_loss(model, groups, settings, pad_id)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        on_step(step, len(steps), answer_loss)


def _language_loss(
    model: nn.Module, groups: Sequence[Sequence[TokenRow]], settings: TinyBaseTraining, pad_id: int
) -> tuple[Tensor, float]:
    """The loss to minimise, and the answers' part of it."""
    if settings.prompt_loss_weight == 0:
        logits, targets = shared_logits(model, [[[row] for row in group] for group in groups], pad_id)
        loss = nn.functional.cross_entropy(logits, targets)
        return loss, loss.item()
    # With the answer said to begin right after the shared prefix, every later token is predicted.
    starts = [shared_length(group) + 1 for group in groups]
    whole = [[[TokenRow(row.tokens, start)] for row in group] for group, start in zip(groups, starts, strict=True)]
    logits, targets = shared_logits(model, whole, pad_id)
    losses = nn.functional.cross_entropy(logits, targets, reduction="none")
    in_answer = torch.cat(
        [
            torch.arange(start, len(row.tokens)) >= row.answer_start
            for group, start in zip(groups, starts, strict=True)
            for row in group
        ]
    )
    answers, prompts = losses[in_answer].mean(), losses[~in_answer].mean()
    return answers + settings.prompt_loss_weight * prompts, answers.item()


def _steps(users: Sequence[str], epoch: int, settings: TinyBaseTraining) -> Iterator[list[list[int]]]:
    """The rows of each step, grouped by user: shuffled runs of one user's rows, filled up to a step."""
    generator = np.random.default_rng([settings.seed, epoch])
    by_user: dict[str, list[int]] = {}
    for index in generator.permutation(len(users)).tolist():
        by_user.setdefault(users[index], []).append(index)
    size = settings.rows_per_user
    runs = [chosen[i : i + size] for chosen in by_user.values() for i in range(0, len(chosen), size)]
    step: list[list[int]] = []
    for position in generator.permutation(len(runs)).tolist():
        step.append(runs[position])
        if sum(len(run) for run in step) >= settings.rows_per_step:
            yield step
            step = []


def _decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    matrices = [
        weight for name, weight in model.named_parameters() if weight.dim() == 2 and "tok_embeddings" not in name
    ]
    others = [weight for name, weight in model.named_parameters() if weight.dim() != 2 or "tok_embeddings" in name]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _warm_cosine(warmup_steps: int, n_steps: int) -> Callable[[int], float]:
    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, n_steps - warmup_steps)))

    return factor
