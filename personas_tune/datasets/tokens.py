"""Token rows: a prompt and an answer as a torchtune tokenizer writes them.

The answer of a row is its label's tokens and the end-of-turn token, nothing else: the assistant
header that chat formats put before it and the line break that some put after it carry no loss.
(torchtune's own SFT datasets also train on the header and the break.)
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torchtune.data import Message

from personas_tune.errors import PromptError
from personas_tune.prompts.render import Message as ChatMessage

# Two answers that begin and end differently: what their rows share around them is the chat format.
_ANSWERS = ("x", "7")
_PROBE = ({"role": "system", "content": "a"}, {"role": "user", "content": "b"})


@dataclass(frozen=True)
class TokenRow:
    """One tokenised sample.

    Args:
        tokens: Prompt, then answer, ending with the end-of-turn token.
        answer_start: Index of the answer's first token.
    """

    tokens: list[int]
    answer_start: int

    @property
    def answer(self) -> list[int]:
        """The answer's tokens."""
        return self.tokens[self.answer_start :]

    @property
    def prompt(self) -> list[int]:
        """The tokens before the answer."""
        return self.tokens[: self.answer_start]


class ChatTokenizer:
    """Writes prompts and answers as tokens with any torchtune chat tokenizer.

    Args:
        tokenizer: A torchtune ``ModelTokenizer``. Its ``max_seq_len`` is the budget of a row; its own
            truncation, which would cut answers off, is switched off.

    Raises:
        PromptError: If the tokenizer's chat format has no recognisable place for the answer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.max_seq_len: int | None = getattr(tokenizer, "max_seq_len", None)
        self._tokenizer = copy.copy(tokenizer)
        self._tokenizer.max_seq_len = None
        self.pad_id: int = tokenizer.pad_id
        rows = [self._chat(_PROBE, answer) for answer in _ANSWERS]
        self._header_end = _common_prefix(rows[0], rows[1])
        self._n_after = _common_prefix(rows[0][::-1], rows[1][::-1]) - 1
        if self._n_after < 0:
            raise PromptError("no end-of-turn token after the answer", where="tokenizer", remedy="use a chat tokenizer")
        # torchtune's own stop tokens lack the one that ends a turn in some chat formats (Phi-3's <|end|>).
        end_of_turn = rows[0][-1 - self._n_after]
        self.stop_tokens: list[int] = sorted({end_of_turn, *getattr(tokenizer, "stop_tokens", [])})
        # A model must know all tokens of text and the special ones of a row. Not every special one: torchtune's Llama 3
        # tokenizer has one for images, 128256, for which models of text have no row.
        n_of_text = getattr(tokenizer, "base_vocab_size", getattr(tokenizer, "vocab_size", 1))
        self.largest_token: int = max(int(n_of_text) - 1, self.pad_id, *rows[0])

    def answer_tokens(self, label: str) -> list[int]:
        """The tokens of an answer, end-of-turn included, as they stand in a row."""
        row = self._chat(_PROBE, label)
        return row[self._header_end : len(row) - self._n_after]

    def row(self, messages: Sequence[ChatMessage], label: str) -> TokenRow:
        """Tokenise a prompt with its answer; nothing is cut off."""
        tokens = self._chat(messages, label)
        tokens = tokens[: len(tokens) - self._n_after]
        return TokenRow(tokens, len(tokens) - len(self.answer_tokens(label)))

    def fits(self, row: TokenRow) -> bool:
        """Whether a row is within the model's context."""
        return self.max_seq_len is None or len(row.tokens) <= self.max_seq_len

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of generated tokens; those without text, such as ids that only fill up a vocabulary, are left out."""
        try:
            return str(self._tokenizer.decode(list(tokens)))
        except (KeyError, IndexError):
            return "" if len(tokens) == 1 else "".join(self.decode([token]) for token in tokens)

    def _chat(self, messages: Sequence[ChatMessage], answer: str) -> list[int]:
        chat = [Message(role=message["role"], content=message["content"], masked=True) for message in messages]
        chat.append(Message(role="assistant", content=answer))
        tokens, _ = self._tokenizer.tokenize_messages(chat)
        return list(tokens)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
