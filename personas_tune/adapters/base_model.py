"""Loading a frozen base model and its tokenizer through torchtune's own components."""

import inspect
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torchao.dtypes.nf4tensor import NF4Tensor
from torchtune import config as torchtune_config
from torchtune import training
from torchtune.modules import MultiHeadAttention
from torchtune.modules.peft import get_adapter_params

from personas_tune.adapters.bank import AdapterBank
from personas_tune.adapters.devices import find_device
from personas_tune.adapters.sharding import make_room_for_adapters, on_first_process, shard
from personas_tune.datasets.tiktoken_files import read_afresh
from personas_tune.datasets.tokens import ChatTokenizer
from personas_tune.errors import CheckpointError, ConfigError, MissingInputError, PersonasTuneError, raise_together

# Where `tune download` gets the checkpoint that a torchtune model builder is made for; tuned for chat, all of them.
HUB_NAMES = {
    "phi3_mini": "microsoft/Phi-3-mini-4k-instruct",
    "llama3_8b": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama3_2_1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama3_2_3b": "meta-llama/Llama-3.2-3B-Instruct",
    "qwen2_5_0_5b": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2_5_1_5b_instruct": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen2_5_3b": "Qwen/Qwen2.5-3B-Instruct",
}

# Of a repository's owner, what else `tune download` is told: who may have it must be known, and Meta's repositories
# hold all weights a second time in Meta's own format.
DOWNLOAD_FLAGS = {"meta-llama": " --ignore-patterns 'original/consolidated*' --hf-token \"$HF_TOKEN\""}

# Of a GPU's memory, for a base that is to leave room for adapters and activations.
LARGEST_SHARE = 0.7

_COMPILED_VARIANTS = 32  # of a layer

# What of a torchtune tokenizer's arguments names a file.
TOKENIZER_FILES = ("path", "special_tokens_path", "merges_file")


@dataclass(frozen=True)
class BaseModel:
    """A base that is ready to train or run.

    Args:
        model: The torchtune model, base weights frozen.
        bank: Its adapters; empty at first.
        tokenizer: Its tokenizer.
        model_type: The checkpointer's ``model_type``, such as ``PHI3_MINI``.
        checkpoint_dir: Where the weights came from.
    """

    model: nn.Module
    bank: AdapterBank
    tokenizer: ChatTokenizer
    model_type: str
    checkpoint_dir: Path

    @property
    def max_seq_len(self) -> int:
        """Longest sequence that the model takes."""
        return int(self.model.max_seq_len)  # type: ignore[arg-type]


def load_base(
    model: Mapping[str, Any],
    tokenizer: Mapping[str, Any],
    checkpointer: Mapping[str, Any],
    *,
    device: str,
    dtype: str,
    enable_activation_checkpointing: bool = False,
    compile: bool = False,
    sharded: bool = False,
) -> BaseModel:
    """Build a model with LoRA modules and load the base's weights into it.

    Args:
        model: A torchtune LoRA builder and its arguments.
        tokenizer: A torchtune tokenizer and its arguments.
        checkpointer: A torchtune checkpointer and its arguments.
        device: ``cpu``, ``cuda``, ...
        dtype: ``fp32`` or ``bf16``, of the base's weights and the forward pass.
        enable_activation_checkpointing: Recompute each layer in the backward pass: less memory, more time.
        compile: Compile each layer with ``torch.compile``.
        sharded: Spread the base's weights over all processes, each of which calls this; the first one reads them.

    Raises:
        ConfigError: If a component doesn't take its arguments, the device isn't there, or the model can't be sharded.
        MissingInputError: If checkpoint or tokenizer files aren't there; says how to get them.
        CheckpointError: If the checkpoint is damaged or doesn't fit the model.
    """
    raise_together(missing_base_files(model, tokenizer, checkpointer))
    torch_device = find_device(device)
    try:
        torch_dtype = training.get_dtype(dtype, device=torch_device)
    except RuntimeError as error:
        raise ConfigError(_flat(error), where="dtype", remedy="set dtype=fp32") from error
    with training.set_default_dtype(torch_dtype), torch.device("meta") if sharded else torch_device:
        network = _instantiate(model, "model")
    if sharded:
        make_room_for_adapters(network, torch_device)
    # The bank marks what is trainable before weights come in, so that none of the base is.
    bank = AdapterBank(network)
    if enable_activation_checkpointing:
        _recompute_layers(network)
    if sharded:
        _load_sharded(network, checkpointer, torch_device)
    else:
        _load_weights(network, checkpointer)
    chat = load_tokenizer(tokenizer, network)
    if compile:
        # A layer runs on whole rows, prefixes and branches, first and other lengths, with and without a gradient of
        # its input: ten variants. torch gives up at 8 by default, and runs the rest uncompiled.
        torch._dynamo.config.recompile_limit = max(_COMPILED_VARIANTS, torch._dynamo.config.recompile_limit)
        training.compile_model(network, verbose=False)
    return BaseModel(
        model=network,
        bank=bank,
        tokenizer=chat,
        model_type=str(checkpointer.get("model_type", "")),
        checkpoint_dir=Path(checkpointer["checkpoint_dir"]),
    )


def is_too_large(model: Mapping[str, Any], device: str, dtype: str) -> bool:
    """Whether a base's weights would fill most of this process's GPU; on a CPU none does.

    Raises:
        ConfigError: If the model builder doesn't take its arguments.
    """
    if torch.device(device).type != "cuda" or not torch.cuda.is_available():
        return False
    room = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return size_of_base(model, dtype) > LARGEST_SHARE * room


def is_to_be_sharded(parallel: str, n_processes: int, model: Mapping[str, Any], device: str, dtype: str) -> bool:
    """Whether several processes shall each hold a part of a base: told to, or it is too large for this one's GPU."""
    if n_processes == 1 or parallel not in ("auto", "fsdp"):
        return False
    return parallel == "fsdp" or is_too_large(model, device, dtype)


def size_of_base(model: Mapping[str, Any], dtype: str) -> int:
    """Bytes of a base's weights on a device; nothing is loaded."""
    return size_of_weights(build_on_meta(model, dtype))


def build_on_meta(model: Mapping[str, Any], dtype: str, *, enable_activation_checkpointing: bool = False) -> nn.Module:
    """A base's network without weights: names, shapes and types of all of them, on the meta device.

    Raises:
        ConfigError: If the model builder doesn't take its arguments.
    """
    with training.set_default_dtype(training.get_dtype(dtype, device=torch.device("cpu"))), torch.device("meta"):
        network: nn.Module = _instantiate(model, "model")
    _give_positions_shapes(network)
    if enable_activation_checkpointing:
        _recompute_layers(network)
    return network


def _give_positions_shapes(network: nn.Module) -> None:
    """Tables of positions that torchtune fills from real numbers only (Llama 3.2's): made, and then let go of."""
    for module in network.modules():
        if getattr(module, "is_cache_built", True) is False:
            module.rope_init()  # type: ignore[operator]
            module.to("meta")


def _recompute_layers(network: nn.Module) -> None:
    from torchtune.modules import TransformerSelfAttentionLayer

    training.set_activation_checkpointing(network, auto_wrap_policy={TransformerSelfAttentionLayer})


def size_of_weights(network: nn.Module) -> int:
    """Bytes of a network's frozen weights, adapters left out."""
    adapters = get_adapter_params(network)
    return sum(_n_bytes(weight) for name, weight in network.named_parameters() if name not in adapters)


def _n_bytes(weight: Tensor) -> int:
    if isinstance(weight, NF4Tensor):  # half a byte each, and a factor per block
        return sum(int(getattr(weight, part).nbytes) for part in weight.__tensor_flatten__()[0])
    return weight.numel() * weight.element_size()


def missing_base_files(
    model: Mapping[str, Any], tokenizer: Mapping[str, Any], checkpointer: Mapping[str, Any]
) -> list[PersonasTuneError]:
    """What of a base's files isn't there, each with the command that gets it."""
    folder = _checkpoint_dir(checkpointer)
    command = download_command(str(model.get("_component_", "")), folder)
    keys = ["checkpointer.checkpoint_dir", *(f"tokenizer.{key}" for key in TOKENIZER_FILES if tokenizer.get(key))]
    remedy = f"get it with `{command}`, or set {' and '.join(keys)} to your copy"
    missing = [file for file in _base_files(tokenizer, checkpointer) if not file.is_file()]
    if folder.is_dir():
        return [MissingInputError("file not found", where=str(file), remedy=remedy) for file in missing]
    elsewhere = [file for file in missing if folder not in file.parents]
    return [
        MissingInputError("checkpoint folder not found", where=str(folder), remedy=remedy),
        *(MissingInputError("file not found", where=str(file), remedy=remedy) for file in elsewhere),
    ]


def checkpoint_inputs(
    model: Mapping[str, Any], tokenizer: Mapping[str, Any], checkpointer: Mapping[str, Any]
) -> list[Path]:
    """The files that a base is made of, for a stage's up-to-date check.

    Raises:
        MissingInputError: For one file that isn't there.
        SeveralErrors: For several.
    """
    raise_together(missing_base_files(model, tokenizer, checkpointer))
    return _base_files(tokenizer, checkpointer)


def download_command(component: str, folder: Path) -> str:
    """The ``tune download`` command for a model builder's checkpoint."""
    builder = component.rpartition(".")[2].removeprefix("qlora_").removeprefix("lora_")
    repository = HUB_NAMES.get(builder, "REPOSITORY")
    flags = DOWNLOAD_FLAGS.get(repository.partition("/")[0], "")
    return f"tune download {repository} --output-dir {shlex.quote(str(folder))}{flags}"


def _base_files(tokenizer: Mapping[str, Any], checkpointer: Mapping[str, Any]) -> list[Path]:
    names = _checkpoint_files(checkpointer)
    if "HF" in str(checkpointer.get("_component_")):  # the other formats have no config.json
        names = ["config.json", *names]
    texts = [tokenizer[key] for key in TOKENIZER_FILES if tokenizer.get(key) is not None]
    return [*(_checkpoint_dir(checkpointer) / name for name in names), *(Path(str(text)) for text in texts)]


def _checkpoint_dir(checkpointer: Mapping[str, Any]) -> Path:
    folder = checkpointer.get("checkpoint_dir")
    if not isinstance(folder, str):
        raise ConfigError(
            f"checkpoint_dir is {folder!r}", where="checkpointer", remedy="set it to the folder of the base's weights"
        )
    return Path(folder)


def _checkpoint_files(checkpointer: Mapping[str, Any]) -> list[str]:
    files = checkpointer.get("checkpoint_files", [])
    if files is None or isinstance(files, list):
        return [str(name) for name in files or []]
    try:  # torchtune's form for many shards: a pattern and the last number
        pattern, last = str(files["filename_format"]), str(files["max_filename"])
        return [pattern.format(str(i + 1).zfill(len(last)), last) for i in range(int(last))]
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise ConfigError(
            f"neither a list of files nor a pattern with its last number ({_reason(error)})",
            where="checkpointer.checkpoint_files",
            remedy="write [model.safetensors], or {filename_format: model-{}-of-{}.safetensors, max_filename: '00002'}",
        ) from error


def _instantiate(component: Mapping[str, Any], where: str) -> Any:
    try:
        return torchtune_config.instantiate(OmegaConf.create(dict(component)))
    except Exception as error:  # whatever a component raises, its values are the user's
        raise ConfigError(
            f"{component.get('_component_')} failed ({_reason(error)})",
            where=where,
            remedy="check this section's values",
        ) from error


def _load_weights(network: nn.Module, checkpointer: Mapping[str, Any]) -> None:
    folder = _checkpoint_dir(checkpointer)
    _fill(network, _read_weights(checkpointer, folder), folder)


def _load_sharded(network: nn.Module, checkpointer: Mapping[str, Any], device: torch.device) -> None:
    folder = _checkpoint_dir(checkpointer)

    def read() -> dict[str, Tensor]:
        weights = _read_weights(checkpointer, folder)
        _fill(network, {name: weight.to("meta") for name, weight in weights.items()}, folder)  # do they fit?
        return weights

    shard(network, on_first_process(read) or {}, device)


def _fill(network: nn.Module, weights: Mapping[str, Tensor], folder: Path) -> None:
    try:
        missing, unexpected = network.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise _misfit(folder, _flat(error).split("size mismatch for ")[-1]) from error
    missing = [key for key in missing if "lora" not in key and "magnitude" not in key]
    if missing or unexpected:
        lack = f"it lacks {missing[0]}" if missing else f"it has {unexpected[0]}, which the model has not"
        raise _misfit(folder, lack)
    _check_heads(network, folder)


def _read_weights(checkpointer: Mapping[str, Any], folder: Path) -> dict[str, Tensor]:
    arguments = dict(checkpointer)
    with TemporaryDirectory() as scratch:  # checkpointers make their output_dir, into which we don't write
        if "output_dir" in inspect.signature(_component_of(arguments)).parameters:
            arguments["output_dir"] = scratch
        reader = _instantiate(arguments, "checkpointer")
        try:
            weights: dict[str, Tensor] = reader.load_checkpoint()[training.MODEL_KEY]
        except Exception as error:  # torchtune raises plain Exception for another architecture's names
            cause = f": {_reason(error.__cause__)}" if error.__cause__ else ""
            raise CheckpointError(
                f"checkpoint can't be read ({_reason(error)}{cause})",
                where=str(folder),
                remedy="download or make it again, and check checkpointer.model_type",
            ) from error
    return weights


def _check_heads(network: nn.Module, folder: Path) -> None:
    """Heads of another size fit the same weights, and compute something else."""
    attention = next((module for module in network.modules() if isinstance(module, MultiHeadAttention)), None)
    try:
        described = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("num_attention_heads")
    except (OSError, ValueError, AttributeError):  # other formats than Hugging Face's have none
        return
    if attention is not None and described is not None and described != attention.num_heads:
        raise _misfit(folder, f"num_attention_heads {described}, model.num_heads {attention.num_heads}")


def load_tokenizer(tokenizer: Mapping[str, Any], network: nn.Module) -> ChatTokenizer:
    """The tokenizer, its budget of tokens bounded by the model's.

    Raises:
        ConfigError: If the component doesn't take its arguments, or writes no chats.
        CheckpointError: If it writes tokens that the network doesn't know.
    """
    with read_afresh():
        loaded = _instantiate(tokenizer, "tokenizer")
    longest = int(network.max_seq_len)  # type: ignore[arg-type]
    try:
        chat = ChatTokenizer(loaded)
        chat.max_seq_len = longest if chat.max_seq_len is None else min(chat.max_seq_len, longest)
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{tokenizer.get('_component_')} is no usable chat tokenizer ({_reason(error)})",
            where="tokenizer",
            remedy="use the base's own torchtune tokenizer, with a whole number as max_seq_len",
        ) from error
    _check_vocabulary(network, chat, tokenizer)
    return chat


def _check_vocabulary(network: nn.Module, chat: ChatTokenizer, tokenizer: Mapping[str, Any]) -> None:
    embeddings = getattr(network, "tok_embeddings", None)
    if isinstance(embeddings, nn.Embedding) and chat.largest_token >= embeddings.num_embeddings:
        raise CheckpointError(
            f"the tokenizer writes token {chat.largest_token}, the model knows {embeddings.num_embeddings} tokens",
            where=str(tokenizer.get("path", "tokenizer")),
            remedy="set tokenizer.path and special_tokens_path to the base's own files",
        )


def _misfit(folder: Path, how: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint does not fit the model ({how})", where=str(folder), remedy="match the model section to config.json"
    )


def _component_of(arguments: Mapping[str, Any]) -> Any:
    from torchtune.config._utils import _get_component_from_path

    return _get_component_from_path(arguments["_component_"])


def _reason(error: BaseException) -> str:
    return f"no {error}" if isinstance(error, KeyError) else _flat(error)


def _flat(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(". ") or type(error).__name__
