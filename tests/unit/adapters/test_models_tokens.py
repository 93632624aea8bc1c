"""Rows as the bundled configs' tokenizers write them, with the special tokens' real ids."""

import pytest
from published import LORA, PUBLISHED, QLORA
from torchtune import config as torchtune_config

from personas_tune.adapters.base_model import TOKENIZER_FILES
from personas_tune.config import load_experiment
from personas_tune.datasets.tiktoken_files import read_afresh
from personas_tune.datasets.tokens import ChatTokenizer

CHAT = [
    {"role": "system", "content": "You rate films.\nFrom 1 to 5."},
    {"role": "user", "content": "The River (1981), Drama. Which rating?"},
]
LABELS = ["1", "2", "3", "4", "5", *(f"{half / 2:g}" for half in range(1, 11, 2))]

# A row of two messages and the answer, as each model's card shows its chat format; ids from its tokenizer_config.json.
FORMATS = {
    "phi3": (
        ["<s>", "<|system|>", "\n", CHAT[0]["content"], "<|end|>", "\n", "<|user|>", "\n", CHAT[1]["content"],
         "<|end|>", "\n", "<|assistant|>", "\n"],
        {"<s>": 1, "<|system|>": 32006, "<|user|>": 32010, "<|assistant|>": 32001, "<|end|>": 32007},
        "<|end|>",
    ),
    "llama3": (
        ["<|begin_of_text|>", "<|start_header_id|>", "system", "<|end_header_id|>", "\n\n", CHAT[0]["content"],
         "<|eot_id|>", "<|start_header_id|>", "user", "<|end_header_id|>", "\n\n", CHAT[1]["content"], "<|eot_id|>",
         "<|start_header_id|>", "assistant", "<|end_header_id|>", "\n\n"],
        {"<|begin_of_text|>": 128000, "<|start_header_id|>": 128006, "<|end_header_id|>": 128007,
         "<|eot_id|>": 128009},
        "<|eot_id|>",
    ),
    "qwen2_5": (
        ["<|im_start|>", "system\n", CHAT[0]["content"], "<|im_end|>", "\n", "<|im_start|>", "user\n",
         CHAT[1]["content"], "<|im_end|>", "\n", "<|im_start|>", "assistant\n"],
        {"<|im_start|>": 151644, "<|im_end|>": 151645},
        "<|im_end|>",
    ),
}  # fmt: skip
MODELS = {"phi3": "phi3", "llama3": "llama3_2_1b", "qwen2_5": "qwen2_5_0_5b"}
each_kind = pytest.mark.parametrize("kind", FORMATS)


@pytest.fixture
def tokenizer(kind, tokenizer_files):
    """A kind's tokenizer from a YAML's section, of which only the folder is another."""
    section = load_experiment(LORA[MODELS[kind]]).tokenizer
    for key in TOKENIZER_FILES:
        if section.get(key) is not None:
            section[key] = str(tokenizer_files(kind) / section[key].rpartition("/")[2])
    with read_afresh():
        return torchtune_config.instantiate(section)


@each_kind
def test_a_row_is_in_the_models_own_chat_format(kind, tokenizer):
    def encode(text):
        # SentencePiece puts a space before what it encodes by itself, but not after a line break.
        inside_a_line = {"trim_leading_whitespace": True} if kind == "phi3" and text != "\n" else {}
        return tokenizer.encode(text, add_bos=False, add_eos=False, **inside_a_line)

    pieces, special, end = FORMATS[kind]
    row = ChatTokenizer(tokenizer).row(CHAT, "4")
    ids = [[special[piece]] if piece in special else encode(piece) for piece in pieces]
    assert row.prompt == [token for piece in ids for token in piece]
    assert row.answer == [*encode("4"), special[end]]


@each_kind
def test_the_families_end_of_turn_stops_generation(kind, tokenizer):
    _, special, end = FORMATS[kind]
    assert special[end] in ChatTokenizer(tokenizer).stop_tokens


@each_kind
@pytest.mark.parametrize("label", LABELS)
def test_a_labels_tokens_are_the_same_in_every_row_and_read_back_as_the_label(kind, label, tokenizer):
    chat = ChatTokenizer(tokenizer)
    _, special, end = FORMATS[kind]
    answer = chat.row(CHAT, label).answer
    assert answer == chat.answer_tokens(label) == chat.row([*CHAT[:1], {"role": "user", "content": "x"}], label).answer
    assert answer.index(special[end]) == len(answer) - 1
    assert chat.decode(answer[:-1]).strip() == label


@each_kind
def test_no_labels_answer_begins_with_anothers(kind, tokenizer):
    answers = [tuple(ChatTokenizer(tokenizer).answer_tokens(label)) for label in LABELS]
    assert not [(a, b) for a in answers for b in answers if a != b and b[: len(a)] == a]
    assert len(set(answers)) == len(LABELS)


@each_kind
def test_a_model_knows_every_token_of_a_row(kind, tokenizer):
    chat = ChatTokenizer(tokenizer)
    assert max(chat.row(CHAT, "4").tokens) <= chat.largest_token < PUBLISHED[MODELS[kind]].hf_config["vocab_size"]


@pytest.mark.parametrize("model", PUBLISHED)
def test_models_of_a_kind_have_one_tokenizer_section_but_for_the_folder(model):
    def section(config):
        return {key: str(value).rpartition("/")[2] for key, value in load_experiment(config).tokenizer.items()}

    alike = LORA[MODELS[PUBLISHED[model].tokenizer]]
    assert section(LORA[model]) == section(QLORA[model]) == section(alike)
