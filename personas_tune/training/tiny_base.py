"""A small Phi-3-architecture base trained from nothing, with a tokenizer of its own.

It stands in for Phi-3-Mini where there is no network, no GPU and no time, and goes through the
same tokenizer, checkpointer and recipes: the folder that is written is a Hugging Face checkpoint.
"""

import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchtune.models.phi3 import phi3, phi3_mini_tokenizer
from torchtune.models.phi3._convert_weights import phi3_tune_to_hf
from torchtune.models.phi3._tokenizer import PHI3_SPECIAL_TOKENS

from personas_tune.datasets.tokens import TokenRow
from personas_tune.errors import ConfigError
from personas_tune.training.batches import shared_length
from personas_tune.training.shared_prefix import shared_logits


@dataclass(frozen=True)
class TinyBaseShape:
    """Sizes of a tiny base, named as torchtune's ``phi3`` builder names them."""

    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    embed_dim: int
    intermediate_dim: int
    max_seq_len: int


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


def train_tokenizer(texts: Sequence[str], vocab_size: int, folder: Path, *, split_digits: bool = True) -> Any:
    """Train a SentencePiece BPE model with Phi-3's special tokens and load it as torchtune's Phi-3 tokenizer.

    Args:
        texts: What it is trained on.
        vocab_size: Pieces, special ones included; equals the model's.
        folder: Gets ``tokenizer.model`` and ``special_tokens.json``.
        split_digits: Make each digit a token of its own.

    Raises:
        ConfigError: If the texts don't give so many pieces.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            control_symbols=list(PHI3_SPECIAL_TOKENS),
            unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
            byte_fallback=True,
        split_digits=split_digits,
                normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            num_threads=1,
            minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        reason = " ".join(str(error).rpartition("] ")[2].split())
        raise ConfigError(
            f"no vocabulary of {vocab_size} from these texts", where="base_training.vocab_size", remedy=reason
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    special = [{"id": pieces.piece_to_id(token), "content": token} for token in PHI3_SPECIAL_TOKENS]
    (folder / "special_tokens.json").write_text(
        json.dumps({"added_tokens": special}, indent=1) + "\n", encoding="utf-8"
    )
    return phi3_mini_tokenizer(str(folder / "tokenizer.model"), special_tokens_path=str(folder / "special_tokens.json"))


def build_tiny_base(shape: TinyBaseShape, seed: int) -> nn.Module:
    """A randomly initialised model.

    Weights are normal with sd sqrt(2 / (5 d)) (SmallInit, Nguyen and Salazar 2019), which at GPT-2's width is
    its 0.02; those that write to the residual stream are scaled down by sqrt(2 x layers), as GPT-2's are.
    """
    sd = math.sqrt(2 / (5 * shape.embed_dim))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: nn.Module = phi3(**asdict(shape))
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


def save_tiny_base(model: nn.Module, shape: TinyBaseShape, special_ids: dict[str, int], folder: Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` (bf16) in Hugging Face's Phi-3 format."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = phi3_tune_to_hf({name: weight.detach() for name, weight in model.state_dict().items()})
    stored = {name: weight.to(torch.bfloat16).contiguous() for name, weight in weights.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.embed_dim,
        "intermediate_size": shape.intermediate_dim,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "max_position_embeddings": shape.max_seq_len,
        "original_max_position_embeddings": shape.max_seq_len,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": special_ids["<|endoftext|>"],
        "pad_token_id": special_ids["<|endoftext|>"],
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


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
