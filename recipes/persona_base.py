"""Train a tiny base of Phi-3's or Llama-3's architecture from nothing, on users outside the cohort.

It takes the place of Phi-3-Mini or LLaMA-3-8B where there is no network or GPU. What it learns are the test rows
of finished experiments whose cohorts it may see (``base_training.corpora``): held-out ratings of
users whose earlier ratings made the prompts.

Reads   data/, memory/, samples/ of every corpus
Writes  base/ (a Hugging Face checkpoint with its tokenizer), or ``base_training.checkpoint_dir``

    tune run persona_base --config quickstart_base.yaml
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from omegaconf import DictConfig
from torch import nn
from tqdm import tqdm

from personas_tune import config
from personas_tune.datasets import ChatTokenizer, RatingDataset, RatingSource, TokenRow
from personas_tune.errors import ConfigError
from personas_tune.evaluation.readouts import expected_ratings, label_probabilities
from personas_tune.prompts.render import render_prompt
from personas_tune.training.tiny_base import TinyBaseShape, TinyBaseTraining, build_tiny_base, train_tiny_base
from personas_tune.training.tiny_checkpoint import save_tiny_base
from personas_tune.training.tiny_tokenizers import train_tokenizer
from personas_tune.workspace import Stage, Workspace, open_stage, prompt_inputs


@dataclass
class Corpus:
    """Tokenised rows to train on, each row's user, and rows of held-out users to validate on."""

    rows: list[TokenRow] = field(default_factory=list)
    users: list[str] = field(default_factory=list)
    validation_rows: list[TokenRow] = field(default_factory=list)
    validation_ratings: list[float] = field(default_factory=list)


def prompt_texts(sources: Sequence[RatingSource], stride: int) -> list[str]:
    """The text of every ``stride``-th prompt, for the tokenizer."""
    return [
        message["content"]
        for source in sources
        for sample in source.samples("test")[::stride]
        for message in render_prompt(source.template, source.parts(sample, "both"))
    ]


def tokenise_corpora(sources: Sequence[RatingSource], tokenizer: ChatTokenizer, validation_users: int) -> Corpus:
    """All test rows of the corpora; those of a few users of the first one are held out of all."""
    corpus = Corpus()
    held_out = set(sorted({sample.user_id for sample in sources[0].samples("test")})[:validation_users])
    for number, source in enumerate(sources):
        dataset = RatingDataset(tokenizer, source, source.samples("test"), "both")
        for sample, row in zip(dataset.samples, dataset.rows, strict=True):
            if sample.user_id not in held_out:
                corpus.rows.append(row)
                corpus.users.append(f"{number}/{sample.user_id}")
            elif number == 0:
                corpus.validation_rows.append(row)
                corpus.validation_ratings.append(sample.rating)
    return corpus


def validation_rmse(model: nn.Module, corpus: Corpus, labels: Sequence[str], tokenizer: ChatTokenizer) -> float:
    """RMSE of the expected rating on the held-out users' rows."""
    p = label_probabilities(
        model,
        [row.prompt for row in corpus.validation_rows],
        [tokenizer.answer_tokens(label) for label in labels],
        pad_id=tokenizer.pad_id,
        max_tokens=2048,
    )
    model.train()
    error = expected_ratings(p, [float(label) for label in labels]) - np.array(corpus.validation_ratings)
    return float(np.sqrt(np.mean(error**2)))


def train_and_save(cfg: DictConfig, sources: Sequence[RatingSource], stage: Stage) -> None:
    """Train the tokenizer, then the model, and write both."""
    options = cfg.base_training
    folder = stage.path("tokenizer.model").parent
    texts = prompt_texts(sources, options.tokenizer_stride)
    tokenizer = train_tokenizer(
        texts, options.vocab_size, folder, architecture=options.architecture, split_digits=options.split_digits
    )
    stage.path("special_tokens.json")
    tokenizer.max_seq_len = options.max_seq_len
    chat = ChatTokenizer(tokenizer)
    corpus = tokenise_corpora(sources, chat, options.validation_users)
    if len(corpus.rows) < options.rows_per_step:
        raise ConfigError(
            f"{len(corpus.rows)} rows to train on, one step takes {options.rows_per_step}",
            where="base_training.rows_per_step",
            remedy="lower it, lower base_training.validation_users, or bring more users",
        )
    shape = TinyBaseShape(**{key: options[key] for key in TinyBaseShape.__dataclass_fields__})
    settings = TinyBaseTraining(
        seed=cfg.seed, **{key: options[key] for key in TinyBaseTraining.__dataclass_fields__ if key != "seed"}
    )
    model = build_tiny_base(shape, cfg.seed)
    n_weights = sum(weight.numel() for weight in model.parameters())
    print(f"persona_base: {n_weights:,} weights, {len(corpus.rows):,} rows of {len(set(corpus.users)):,} users")
    started = time.perf_counter()
    with tqdm(desc="train base", unit="step") as progress:

        def on_step(step: int, n_steps: int, loss: float) -> None:
            progress.total = n_steps
            progress.update(1)
            progress.set_postfix_str(f"loss {loss:.3f}")
            every = options.validate_every_n_steps
            if (every and step % every == 0) or step == n_steps:
                rmse = validation_rmse(model, corpus, sources[0].labels, chat)
                progress.write(f"step {step}: loss {loss:.4f}, validation RMSE {rmse:.4f}")

        train_tiny_base(model, corpus.rows, corpus.users, settings, chat.pad_id, on_step)
    save_tiny_base(model, shape, tokenizer.special_tokens, folder)
    stage.path("config.json")
    stage.path("model.safetensors")
    seconds = time.perf_counter() - started
    print(f"persona_base: trained in {seconds:.0f} s; wrote {stage.folder}")


@config.parse
def recipe_main(cfg: DictConfig) -> None:
    """Make the base, unless it is there and nothing it depends on has changed."""
    options = cfg.base_training
    sources = [RatingSource(folder) for folder in options.corpora or [cfg.output_dir]]
    folder = Path(options.checkpoint_dir or Workspace.at(cfg.output_dir).root / "base").absolute()
    inputs = [file for source in sources for file in [source.workspace.test_samples, *prompt_inputs(source.workspace)]]
    with open_stage(folder, config.settings_of(cfg, "base_training"), inputs, seed=cfg.seed) as stage:
        if stage.is_current:
            print(f"persona_base: {folder} is up to date")
            return
        train_and_save(cfg, sources, stage)


if __name__ == "__main__":
    recipe_main()
