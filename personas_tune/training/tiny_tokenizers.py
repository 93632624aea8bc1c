"""Tokenizers of tiny bases: trained on their prompts, in the files that torchtune's own tokenizers read."""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from tiktoken.load import dump_tiktoken_bpe
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from torchtune.models.llama3 import llama3_tokenizer
from torchtune.models.llama3._tokenizer import CL100K_PATTERN, SPECIAL_TOKENS
from torchtune.models.phi3 import phi3_mini_tokenizer
from torchtune.models.phi3._tokenizer import PHI3_SPECIAL_TOKENS

from personas_tune.datasets.tiktoken_files import read_afresh
from personas_tune.errors import ConfigError

MODEL_FILE, SPECIAL_FILE = "tokenizer.model", "special_tokens.json"


def train_tokenizer(
    texts: Sequence[str], vocab_size: int, folder: Path, *, architecture: str = "phi3", split_digits: bool = True
) -> Any:
    """Train an architecture's kind of tokenizer, write it and load it with torchtune.

    Phi-3's is a SentencePiece BPE model, Llama-3's a list of byte pairs in tiktoken's format. Both get the special
    tokens of the real one, at ids within ``vocab_size``.

    Args:
        texts: What it is trained on.
        vocab_size: Tokens, special ones included; equals the model's.
        folder: Gets ``tokenizer.model`` and ``special_tokens.json``.
        architecture: ``phi3`` or ``llama3``.
        split_digits: Make each digit a token of its own.

    Raises:
        ConfigError: If the texts don't give so many tokens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    train = {"phi3": _train_sentencepiece, "llama3": _train_byte_pairs}[architecture]
    special_ids = train(texts, vocab_size, folder / MODEL_FILE, split_digits)
    added = [{"id": token_id, "content": token} for token, token_id in special_ids.items()]
    (folder / SPECIAL_FILE).write_text(json.dumps({"added_tokens": added}, indent=1) + "\n", encoding="utf-8")
    load = {"phi3": phi3_mini_tokenizer, "llama3": llama3_tokenizer}[architecture]
    with read_afresh():
        return load(str(folder / MODEL_FILE), special_tokens_path=str(folder / SPECIAL_FILE))


def _train_sentencepiece(texts: Sequence[str], vocab_size: int, path: Path, split_digits: bool) -> dict[str, int]:
    """Write the model; return its special tokens' ids."""
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
        raise _too_few_tokens(vocab_size, " ".join(str(error).rpartition("] ")[2].split())) from error
    path.write_bytes(model.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return {token: pieces.piece_to_id(token) for token in PHI3_SPECIAL_TOKENS}


def _train_byte_pairs(texts: Sequence[str], vocab_size: int, path: Path, split_digits: bool) -> dict[str, int]:
    """Write the ranks; return the special tokens' ids, which follow them."""
    n_ranks = vocab_size - len(SPECIAL_TOKENS)
    ranks = _byte_pair_ranks(_words_as_bytes(texts, split_digits), n_ranks)
    if len(ranks) < n_ranks:
        most = len(ranks) + len(SPECIAL_TOKENS)
        raise _too_few_tokens(vocab_size, f"set it to {most} at most, or bring more texts")
    dump_tiktoken_bpe(dict(ranks), str(path))
    return {token: n_ranks + number for number, token in enumerate(SPECIAL_TOKENS)}


def _words_as_bytes(texts: Sequence[str], split_digits: bool) -> Iterator[str]:
    """The pieces that pairs never cross, a character for each byte."""
    pattern = CL100K_PATTERN
    if split_digits:
        pattern = pattern.replace(r"\p{N}{1,3}", r"\p{N}")
    splitter = pre_tokenizers.Split(Regex(pattern), "isolated")
    for text in texts:
        for word, _ in splitter.pre_tokenize_str(text):
            yield word.encode("utf-8").decode("latin-1")


def _byte_pair_ranks(words: Iterator[str], n_ranks: int) -> Mapping[bytes, int]:
    """The 256 bytes, then the merged pairs in the order of merging."""
    trainer = trainers.BpeTrainer(
        vocab_size=n_ranks, initial_alphabet=[chr(byte) for byte in range(256)], show_progress=False
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.train_from_iterator(words, trainer)
    return {token.encode("latin-1"): rank for token, rank in tokenizer.get_vocab().items()}


def _too_few_tokens(vocab_size: int, remedy: str) -> ConfigError:
    return ConfigError(
        f"no vocabulary of {vocab_size} from these texts", where="base_training.vocab_size", remedy=remedy
    )
