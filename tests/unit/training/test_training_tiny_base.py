"""Tiny bases: their tokenizers, their checkpoints as other libraries read them, and the one that ships as Llama-3's."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import LABELS, TINY, write_experiment
from torch import nn

from personas_tune.adapters.base_model import BaseModel, load_base
from personas_tune.config import base_sections, load_experiment
from personas_tune.datasets import RatingDataset, RatingSource
from personas_tune.errors import ConfigError
from personas_tune.evaluation.readouts import label_probabilities
from personas_tune.training.fit import AdapterJob, TrainingSettings, train_steps
from personas_tune.training.tiny_base import TinyBaseShape, build_tiny_base
from personas_tune.training.tiny_checkpoint import save_tiny_base
from personas_tune.training.tiny_tokenizers import train_tokenizer

TEXTS = ["I rated Amélie (2001) as 4.5 because it made me laugh.", "Its average is 3.74, from 128 ratings."] * 5
ARCHITECTURES = pytest.mark.parametrize("architecture", ["phi3", "llama3"])
N_SPECIAL = 13  # of Llama-3's own, without the reserved ones


# Tokenizers


def test_byte_pairs_are_merged_in_the_order_of_their_frequency(tmp_path: Path) -> None:
    # Words "abab" and " abab": ab occurs four times, then abab twice, then the space before it once.
    tokenizer = train_tokenizer(["abab abab"], 256 + 3 + N_SPECIAL, tmp_path, architecture="llama3")
    ranks = [line.split() for line in (tmp_path / "tokenizer.model").read_text(encoding="ascii").splitlines()]
    assert ranks[256:] == [["YWI=", "256"], ["YWJhYg==", "257"], ["IGFiYWI=", "258"]]  # base64 of ab, abab and " abab"
    assert tokenizer.encode("abab ababa", add_bos=False, add_eos=False) == [257, 258, ord("a")]


@ARCHITECTURES
def test_a_tokenizer_writes_tokens_of_its_vocabulary_and_reads_them_back(architecture: str, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, 316, tmp_path, architecture=architecture)
    tokens = tokenizer.encode("Amélie, 4.5", add_bos=False, add_eos=False)
    assert tokenizer.decode(tokens) == "Amélie, 4.5"
    assert max([*tokens, *tokenizer.special_tokens.values()]) < 316
    assert len(tokens) < len("Amélie, 4.5".encode())


@pytest.mark.parametrize(("split_digits", "n_merged", "n_tokens"), [(True, 3, 4), (False, 5, 2)])
def test_numbers_of_llama3_are_split_into_digits_only_where_asked(
    split_digits: bool, n_merged: int, n_tokens: int, tmp_path: Path
) -> None:
    size = 256 + n_merged + N_SPECIAL  # merged are the three pairs of " the", and the two of 199
    tokenizer = train_tokenizer(["1998 the"], size, tmp_path, architecture="llama3", split_digits=split_digits)
    assert len(tokenizer.encode("1998", add_bos=False, add_eos=False)) == n_tokens


@ARCHITECTURES
def test_texts_that_give_too_few_tokens_are_refused(architecture: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"vocab_size: no vocabulary of 900 from these texts; .*\d+"):
        train_tokenizer(["a b"], 900, tmp_path, architecture=architecture)


def test_a_tokenizer_that_was_trained_again_is_the_one_that_is_read(tmp_path: Path) -> None:
    n_tokens = []
    for text in ("abab", "cdcd"):
        train_tokenizer([f"{text} {text}"], 256 + 3 + N_SPECIAL, tmp_path, architecture="llama3")
        base = small_base(tmp_path, 256 + 3 + N_SPECIAL)
        n_tokens.append(len(base.tokenizer.answer_tokens("abab")))
    assert n_tokens == [2, 5]  # a merged pair or four bytes, and the end of the turn


# Checkpoints


@ARCHITECTURES
def test_transformers_computes_the_same_logits(architecture: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    shape = TinyBaseShape(**TINY, architecture=architecture)
    tokenizer = train_tokenizer(TEXTS, 316, tmp_path, architecture=architecture)
    model = build_tiny_base(shape, seed=1)
    for weight in model.parameters():
        weight.data = weight.data.to(torch.bfloat16).float()  # as it is stored
    save_tiny_base(model, shape, tokenizer.special_tokens, tmp_path)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = torch.randint(0, shape.vocab_size, (2, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(tokens), peer(tokens).logits, rtol=1e-4, atol=1e-4)
    assert peer.config.num_key_value_heads == TINY["num_kv_heads"] < TINY["num_heads"]


def small_base(folder: Path, vocab_size: int) -> BaseModel:
    """A random Llama-3-shaped base beside the tokenizer in ``folder``, as an experiment loads it."""
    sizes = {**TINY, "vocab_size": vocab_size}
    shape = TinyBaseShape(**sizes, architecture="llama3")
    special = dict.fromkeys(("<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>"), 0)
    save_tiny_base(build_tiny_base(shape, seed=1), shape, special, folder)
    sections = base_sections(load_experiment("paper_table1_tiny.yaml"), "llama3")
    sections["model"].update(sizes)
    files = {"path": str(folder / "tokenizer.model"), "special_tokens_path": str(folder / "special_tokens.json")}
    sections["tokenizer"].update(files)
    sections["checkpointer"].update(checkpoint_dir=str(folder), output_dir=str(folder / "unused"))
    return load_base(**sections, device="cpu", dtype="fp32")


# The base in LLaMA-3's seat


@pytest.fixture(scope="module")
def llama3(tmp_path_factory: pytest.TempPathFactory) -> tuple[BaseModel, RatingDataset]:
    """The bundled base and a few samples in its tokens."""
    base = load_base(**base_sections(load_experiment("paper_table1_tiny.yaml"), "llama3"), device="cpu", dtype="fp32")
    source = RatingSource(write_experiment(tmp_path_factory.mktemp("llama3")).root)
    return base, RatingDataset(base.tokenizer, source, source.samples("train")[:8], "both")


def probabilities(base: BaseModel, dataset: RatingDataset) -> np.ndarray:
    answers = [base.tokenizer.answer_tokens(label) for label in LABELS]
    prompts = [row.prompt for row in dataset.rows]
    return label_probabilities(base.model, prompts, answers, pad_id=base.tokenizer.pad_id, max_tokens=4096)


def test_the_bundled_llama3_rates_a_prompt(llama3: tuple[BaseModel, RatingDataset]) -> None:
    base, dataset = llama3
    assert dataset.n_shortened == 0
    p = probabilities(base, dataset)
    assert p.shape == (8, 5)
    assert p.sum(1) == pytest.approx(1)
    assert np.ptp(p @ [1, 2, 3, 4, 5]) > 0  # not the same for every prompt


def test_an_adapter_on_the_bundled_llama3_learns_and_the_base_stays(llama3: tuple[BaseModel, RatingDataset]) -> None:
    base, dataset = llama3
    before = {name: weight.clone() for name, weight in base.model.state_dict().items() if "lora" not in name}
    losses = trained_losses(base, dataset, n_epochs=6)
    assert losses[-1] < losses[0] < np.log(1600) / 2  # a base of random weights begins at ln 1600
    after = base.model.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


def trained_losses(base: BaseModel, dataset: RatingDataset, n_epochs: int) -> list[float]:
    settings = TrainingSettings(
        epochs=n_epochs, batch_size=8, gradient_accumulation_steps=1, rows_per_user=4, prefix_sharing="auto", seed=5
    )
    job = AdapterJob(
        name="set/all",
        rows=dataset.rows,
        prefixes=[sample.user_id for sample in dataset.samples],
        optimizer=torch.optim.AdamW(base.bank.add_new("set/all", seed=3).masters.values(), lr=1e-2),
        lr_scheduler=None,
        validation_rows=[],
    )
    pad_id = base.tokenizer.pad_id
    steps = train_steps(base.model, base.bank, [job], nn.CrossEntropyLoss(), settings, pad_id=pad_id)
    return [step.loss for step in steps]


def test_ids_without_text_are_left_out_of_an_answer(llama3: tuple[BaseModel, RatingDataset]) -> None:
    tokenizer = llama3[0].tokenizer
    answer = tokenizer.answer_tokens("4")[:-1]
    assert tokenizer.decode([*answer, 1_000_000]) == tokenizer.decode(answer)
    assert tokenizer.decode([1_000_000]) == ""
