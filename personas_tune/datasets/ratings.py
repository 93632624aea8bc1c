"""The dataset that torchtune's recipes and ours train on: one rating a row."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from torch.utils.data import Dataset
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX
from torchtune.datasets import PackedDataset

from personas_tune.datasets.arguments import require, require_whole
from personas_tune.datasets.source import RatingSource, Sample, of_persona
from personas_tune.datasets.tokens import ChatTokenizer, TokenRow
from personas_tune.errors import PromptError
from personas_tune.prompts.render import PromptParts, fit_prompt, render_prompt
from personas_tune.schema import MemoriesSeen


class RatingDataset(Dataset[Mapping[str, list[int]]]):
    """Samples as ``tokens`` and ``labels``, with loss on the answer only.

    Args:
        tokenizer: Writes the rows.
        source: The experiment that the samples come from.
        samples: Which of its samples.
        memories: What the prompts show (``short``, ``long`` or ``both``).

    Attributes:
        source: As given.
        samples: As given.
        rows: The tokenised samples, in the order of ``samples``.
        n_shortened: How many prompts were shortened to fit the context.

    Raises:
        PromptError: If a sample can't fit the model's context; names it.
    """

    def __init__(
        self, tokenizer: ChatTokenizer, source: RatingSource, samples: Sequence[Sample], memories: MemoriesSeen
    ) -> None:
        self.source = source
        self.samples = list(samples)
        self.rows: list[TokenRow] = []
        self.n_shortened = 0
        for sample in self.samples:
            row, shortened = _fitted_row(tokenizer, source, sample, memories)
            self.rows.append(row)
            self.n_shortened += shortened

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Mapping[str, list[int]]:
        return labelled(self.rows[index])


def labelled(row: TokenRow, start: int = 0) -> dict[str, list[int]]:
    """``tokens`` and ``labels`` of a row from its token ``start`` on, which must be in the prompt."""
    return {
        "tokens": row.tokens[start:],
        "labels": [CROSS_ENTROPY_IGNORE_IDX] * (row.answer_start - start) + row.answer,
    }


def _fitted_row(
    tokenizer: ChatTokenizer, source: RatingSource, sample: Sample, memories: MemoriesSeen
) -> tuple[TokenRow, bool]:
    label = source.label(sample)

    def tokenise(parts: PromptParts) -> TokenRow:
        return tokenizer.row(render_prompt(source.template, parts), label)

    parts = source.parts(sample, memories)
    row = tokenise(parts)
    if tokenizer.fits(row):
        return row, False
    fitted, _ = fit_prompt(parts, lambda version: tokenizer.fits(tokenise(version)), where=sample.name)
    return tokenise(fitted), True


def ratings_of(tokenizer: Any, source: str, split: str, persona: int | None, memories: MemoriesSeen) -> RatingDataset:
    """The rows that both builders make available; arguments as :func:`persona_rating_dataset` has them."""
    require(isinstance(source, str | Path), "source", source, "name the output_dir of an experiment")
    require(isinstance(split, str), "split", split, "use train or test")
    require(memories in get_args(MemoriesSeen), "memories", memories, "use short, long or both")
    if persona is not None:
        require_whole("persona", persona, 0)
    experiment = RatingSource(source)
    samples = of_persona(experiment.samples(split), persona)
    return RatingDataset(ChatTokenizer(tokenizer), experiment, samples, memories)


def persona_rating_dataset(
    tokenizer: Any,
    *,
    source: str,
    split: str = "train",
    persona: int | None = None,
    memories: MemoriesSeen = "both",
    packed: bool = False,
) -> RatingDataset | PackedDataset:
    """Ratings to predict, for any torchtune recipe that takes a ``dataset``.

    Loss falls on the whole answer (label and end of turn) and on nothing else. Prompts longer than
    ``tokenizer.max_seq_len`` are shortened (never the answer), which
    :func:`personas_tune.prompts.render.shorter_versions` explains.

    Args:
        tokenizer: A torchtune ``ModelTokenizer``; recipes pass theirs.
        source: ``output_dir`` of an experiment for which ``persona_raft`` has run.
        split: ``train`` or ``test``.
        persona: Only this persona's users; None for all.
        memories: ``short`` (profile), ``long`` (retrieved memories) or ``both``.
        packed: Pack rows up to ``tokenizer.max_seq_len`` tokens (torchtune's PackedDataset).

    Raises:
        ConfigError: If an argument can't be used.
        MissingInputError: If a stage hasn't run.
        PromptError: If a sample can't fit, or ``packed`` is asked for without ``max_seq_len``.

    Example:
        In a torchtune YAML::

            dataset:
              _component_: personas_tune.datasets.persona_rating_dataset
              source: runs/quickstart
              persona: 0
    """
    require(isinstance(packed, bool), "packed", packed, "use true or false")
    dataset = ratings_of(tokenizer, source, split, persona, memories)
    if not packed:
        return dataset
    if tokenizer.max_seq_len is None:
        raise PromptError(
            "packed needs a length", where="tokenizer.max_seq_len", remedy="set tokenizer.max_seq_len=4096"
        )
    return PackedDataset(dataset, max_seq_len=tokenizer.max_seq_len, padding_idx=tokenizer.pad_id)
