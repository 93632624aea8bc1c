"""A base's checkpoint and tokenizer, looked at without loading a weight."""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn
from torchtune.modules import MultiHeadAttention

from personas_tune.adapters.bank import AdapterBank
from personas_tune.adapters.base_model import build_on_meta, checkpoint_inputs, load_tokenizer
from personas_tune.adapters.checkpoint_headers import (
    MODEL_TYPES,
    SUFFIX,
    check_index,
    misfits,
    read_headers,
    read_object,
)
from personas_tune.adapters.layouts import has_layout
from personas_tune.datasets.tokens import ChatTokenizer
from personas_tune.doctor.findings import Finding, found
from personas_tune.doctor.machine import GB
from personas_tune.errors import CheckpointError, PersonasTuneError

PICKLES = (".bin", ".pt", ".pth")
SHORT_BUDGET = 256  # tokens; a profile and a few memories take more


def check_checkpoint(network: nn.Module, sections: Mapping[str, Any]) -> list[Finding]:
    """Whether a base's files are there, whole, and fit the model section.

    Args:
        network: Of the model section, on the meta device.
        sections: ``model``, ``tokenizer`` and ``checkpointer``, references resolved.
    """
    try:
        files = checkpoint_inputs(**sections)
    except PersonasTuneError as error:
        return [Finding("missing", line) for line in error.lines]
    if "FullModelHFCheckpointer" not in str(sections["checkpointer"].get("_component_")):
        return [Finding("note", "checkpoint files are there; another format than Hugging Face's isn't looked into")]
    folder = Path(sections["checkpointer"]["checkpoint_dir"])
    try:
        described = read_object(folder / "config.json")
        architecture = _check_architecture(described, sections["checkpointer"])
        return [architecture, *_check_weights(network, folder, files, described, sections["checkpointer"])]
    except PersonasTuneError as error:
        return [Finding("missing", line) for line in error.lines]


def _check_architecture(described: Mapping[str, Any], checkpointer: Mapping[str, Any]) -> Finding:
    """Whether the checkpointer reads what config.json says that the checkpoint is."""
    names, model_type = described.get("architectures"), str(checkpointer.get("model_type"))
    name = str(names[0]) if isinstance(names, list) and names else "no architecture"
    served = "" if has_layout(model_type) else " (its adapters can't be exported to PEFT)"
    if name not in MODEL_TYPES:
        return Finding("note", f"config.json names {name}, model_type is {model_type}{served}")
    mend = f"set checkpointer.model_type={MODEL_TYPES[name][0]}"
    return found(model_type in MODEL_TYPES[name], f"config.json names {name}, model_type is {model_type}{served}", mend)


def _check_weights(
    network: nn.Module,
    folder: Path,
    files: Sequence[Path],
    described: Mapping[str, Any],
    checkpointer: Mapping[str, Any],
) -> Iterator[Finding]:
    weights = [file for file in files if file.suffix in (SUFFIX, *PICKLES)]
    pickled = [file.name for file in weights if file.suffix != SUFFIX]
    if pickled:
        yield Finding(
            "note", f"{pickled[0]} is a pickle, which isn't opened here", f"a {SUFFIX} file says what it holds"
        )
        return
    headers = read_headers(weights)
    index = check_index(folder, weights, headers)
    dtypes = ", ".join(sorted(headers.dtypes))
    size = f"{headers.n_bytes / GB:.2f} GB on disk"
    yield Finding("ok", f"{len(headers.weights)} weights ({dtypes}), {size}{f', index: {index}' if index else ''}")
    different = misfits(network, headers, described, str(checkpointer.get("model_type")))
    if different is None:
        yield Finding("note", f"whether the weights fit the model can't be told for {checkpointer.get('model_type')}")
        return
    yield _fitting(different)
    yield from _check_numbers(network, described)


def _fitting(different: Sequence[str]) -> Finding:
    if not different:
        return Finding("ok", "names and shapes of all weights fit the model section")
    more = f", and {len(different) - 1} more" if len(different) > 1 else ""
    return Finding("missing", f"weights don't fit the model section ({different[0]}{more})", "match it to config.json")


def _check_numbers(network: nn.Module, described: Mapping[str, Any]) -> Iterator[Finding]:
    """What fits weights of any value, and computes something else: heads, positions, the norm's epsilon."""
    attention = next((module for module in network.modules() if isinstance(module, MultiHeadAttention)), None)
    if attention is None:
        return
    rope = described.get("rope_parameters")
    theta = rope.get("rope_theta") if isinstance(rope, dict) else described.get("rope_theta")
    pairs = {
        "num_attention_heads": (described.get("num_attention_heads"), attention.num_heads),
        "num_key_value_heads": (described.get("num_key_value_heads"), attention.num_kv_heads),
        "rope_theta": (theta, getattr(attention.pos_embeddings, "base", None)),
        "rms_norm_eps": (described.get("rms_norm_eps"), getattr(getattr(network, "norm", None), "eps", None)),
    }
    for name, (of_checkpoint, of_model) in pairs.items():
        if isinstance(of_checkpoint, int | float) and of_model is not None and of_checkpoint != of_model:
            what = f"config.json has {name} {of_checkpoint:g}, the model section builds {of_model:g}"
            yield Finding("missing", what, "match the model section to config.json")


def check_tokenizer(
    network: nn.Module, tokenizer: Mapping[str, Any], labels: Sequence[str]
) -> tuple[list[Finding], ChatTokenizer | None]:
    """Whether a tokenizer loads, knows no more tokens than the model, and tells the labels apart.

    Args:
        network: On the meta device.
        tokenizer: The section.
        labels: The rating labels.

    Returns:
        What was found, and the tokenizer, if it can be used.
    """
    try:
        chat = load_tokenizer(tokenizer, network)
        answers = [chat.answer_tokens(label) for label in labels]
    except PersonasTuneError as error:
        return [Finding("missing", line) for line in error.lines], None
    except Exception as error:  # tokenizer libraries raise all sorts for a damaged file
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        mend = "download the base's tokenizer again"
        return [Finding("missing", f"{tokenizer.get('_component_')} can't be used ({reason})", mend)], None
    findings = [_chat_format(chat, network, tokenizer), _check_labels(chat, labels, answers)]
    return [*findings, _check_budget(chat, network, tokenizer)], chat


def _chat_format(chat: ChatTokenizer, network: nn.Module, tokenizer: Mapping[str, Any]) -> Finding:
    name = str(tokenizer.get("_component_")).rpartition(".")[2]
    known = getattr(getattr(network, "tok_embeddings", None), "num_embeddings", "?")
    stops = ", ".join(map(str, chat.stop_tokens))
    return Finding(
        "ok", f"{name}: tokens up to {chat.largest_token} of the model's {known}; an answer ends with {stops}"
    )


def _check_labels(chat: ChatTokenizer, labels: Sequence[str], answers: Sequence[Sequence[int]]) -> Finding:
    """How each label stands in an answer: as which tokens, and whether these read back as the label."""
    told = ", ".join(f"{label}={'+'.join(map(str, answer))}" for label, answer in zip(labels, answers, strict=True))
    lengths = sorted({len(answer) for answer in answers})
    size = f"{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
    what = f"labels in {size} tokens, the end of the turn included: {told}"
    if len({tuple(answer) for answer in answers}) < len(answers):
        return Finding("missing", f"{what}: two are the same", "take the base's own tokenizer, or another rating_scale")
    if any(answer[-1] not in chat.stop_tokens for answer in answers):
        return Finding("missing", f"{what}: one has no end of turn", "take the base's own tokenizer")
    unread = [label for label, answer in zip(labels, answers, strict=True) if _text(chat, answer) != label]
    if unread:
        return Finding("note", f"{what}: {unread[0]!r} reads back as {_text(chat, answers[labels.index(unread[0])])!r}")
    return Finding("ok", what)


def _text(chat: ChatTokenizer, answer: Sequence[int]) -> str:
    return chat.decode([token for token in answer if token not in chat.stop_tokens]).strip()


def _check_budget(chat: ChatTokenizer, network: nn.Module, tokenizer: Mapping[str, Any]) -> Finding:
    longest, asked = int(network.max_seq_len), tokenizer.get("max_seq_len")  # type: ignore[arg-type]
    budget = chat.max_seq_len or longest
    what = f"rows of up to {budget} tokens, and the model takes {longest}"
    if isinstance(asked, int) and asked > longest:
        return Finding("note", f"{what}: tokenizer.max_seq_len {asked} is more than that, and counts for nothing")
    if budget < SHORT_BUDGET:
        return Finding("note", f"{what}: few for a profile and memories", "raise tokenizer.max_seq_len if the base can")
    return Finding("ok", what)


def build_network(sections: Mapping[str, Any], dtype: str, *, recompute: bool) -> nn.Module:
    """The network of a model section on the meta device, its base frozen; the same one when it is asked for again.

    Raises:
        PersonasTuneError: If the builder doesn't take its arguments, or makes nothing that holds adapters.
    """
    return _build(json.dumps(dict(sections["model"]), default=str), dtype, recompute)


@lru_cache(maxsize=4)  # with weights in NF4 it takes a second
def _build(model: str, dtype: str, recompute: bool) -> nn.Module:
    network = build_on_meta(json.loads(model), dtype, enable_activation_checkpointing=recompute)
    AdapterBank(network)
    if not hasattr(network, "max_seq_len"):
        raise CheckpointError("the model is no torchtune decoder", where="model", remedy="use a lora_* builder")
    return network
