"""Loading a frozen base model and its tokenizer through torchtune's own components."""

import inspect
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torchtune import config as torchtune_config
from torchtune import training

from personas_tune.adapters.bank import AdapterBank
from personas_tune.datasets.tokens import ChatTokenizer
from personas_tune.errors import CheckpointError, ConfigError, MissingInputError, PersonasTuneError, raise_together

# Where `tune download` gets the checkpoint that a torchtune model builder is made for.
HUB_NAMES = {
    "phi3_mini": "microsoft/Phi-3-mini-4k-instruct",
    "llama3_8b": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama3_2_1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama3_2_3b": "meta-llama/Llama-3.2-3B-Instruct",
    "qwen2_5_0_5b": "Qwen/Qwen2.5-0.5B-Instruct",
}


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

    Raises:
        ConfigError: If a component doesn't take its arguments, or the device isn't there.
        MissingInputError: If checkpoint or tokenizer files aren't there; says how to get them.
        CheckpointError: If the checkpoint is damaged or doesn't fit the model.
    """
    raise_together(missing_base_files(model, tokenizer, checkpointer))
    torch_device = _find_device(device)
    torch_dtype = training.get_dtype(dtype, device=torch_device)
    with training.set_default_dtype(torch_dtype), torch_device:
        network = _instantiate(model, "model")
    # The bank marks what is trainable before weights come in, so that none of the base is.
    bank = AdapterBank(network)
    if enable_activation_checkpointing:
        from torchtune.modules import TransformerSelfAttentionLayer

        training.set_activation_checkpointing(network, auto_wrap_policy={TransformerSelfAttentionLayer})
    _load_weights(network, checkpointer)
    if compile:
        training.compile_model(network, verbose=False)
    return BaseModel(
        model=network,
        bank=bank,
        tokenizer=ChatTokenizer(_instantiate(tokenizer, "tokenizer")),
        model_type=str(checkpointer.get("model_type", "")),
        checkpoint_dir=Path(checkpointer["checkpoint_dir"]),
    )


def missing_base_files(
    model: Mapping[str, Any], tokenizer: Mapping[str, Any], checkpointer: Mapping[str, Any]
) -> list[PersonasTuneError]:
    """What of a base's files isn't there, each with the command that gets it."""
    folder = Path(checkpointer["checkpoint_dir"])
    command = download_command(str(model.get("_component_", "")), folder)
    files = _base_files(tokenizer, checkpointer)
    remedy = f"get it with `{command}`, or set checkpointer.checkpoint_dir and tokenizer.path to your copy"
    if not folder.is_dir() and str(files[-1]).startswith(str(folder)):
        return [MissingInputError("checkpoint folder not found", where=str(folder), remedy=remedy)]
    return [MissingInputError("file not found", where=str(file), remedy=remedy) for file in files if not file.is_file()]


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
    repository = next((hub for name, hub in HUB_NAMES.items() if builder.startswith(name)), "REPOSITORY")
    return f"tune download {repository} --output-dir {shlex.quote(str(folder))}"


def _base_files(tokenizer: Mapping[str, Any], checkpointer: Mapping[str, Any]) -> list[Path]:
    folder = Path(checkpointer["checkpoint_dir"])
    files = [folder / "config.json", *(folder / name for name in _checkpoint_files(checkpointer))]
    return [*files, Path(tokenizer["path"])] if "path" in tokenizer else files


def _checkpoint_files(checkpointer: Mapping[str, Any]) -> list[str]:
    files = checkpointer.get("checkpoint_files", [])
    if isinstance(files, Mapping):  # torchtune's form for many shards: a pattern and the last number
        try:
            pattern, last = str(files["filename_format"]), str(files["max_filename"])
        except KeyError as error:
            raise ConfigError(f"key {error} is missing", where="checkpointer.checkpoint_files") from error
        return [pattern.format(str(i + 1).zfill(len(last)), last) for i in range(int(last))]
    return [str(name) for name in files]


def _instantiate(component: Mapping[str, Any], where: str) -> Any:
    try:
        return torchtune_config.instantiate(OmegaConf.create(dict(component)))
    except (TypeError, ValueError, AssertionError, RuntimeError, OSError, KeyError) as error:
        raise ConfigError(
            f"{component.get('_component_')} failed ({_flat(error)})", where=where, remedy="check this section's values"
        ) from error


def _find_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {name!r}", where="device", remedy="use cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("no CUDA device on this machine", where="device", remedy="set device=cpu dtype=fp32")
    return device


def _load_weights(network: nn.Module, checkpointer: Mapping[str, Any]) -> None:
    folder = str(checkpointer["checkpoint_dir"])
    arguments = dict(checkpointer)
    signature = inspect.signature(_component_of(arguments))
    if "output_dir" in signature.parameters:
        arguments.setdefault("output_dir", str(Path(folder).parent))
    try:
        weights: dict[str, Tensor] = _instantiate(arguments, "checkpointer").load_checkpoint()[training.MODEL_KEY]
    except (ValueError, KeyError, RuntimeError, OSError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"checkpoint can't be read ({_flat(error)})", where=folder, remedy="download or make it again"
        ) from error
    try:
        missing, unexpected = network.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        mismatch = _flat(error).split("size mismatch for ")[-1]
        raise CheckpointError(
            f"checkpoint does not fit the model ({mismatch})",
            where=folder,
            remedy="match the model section to config.json",
        ) from error
    missing = [key for key in missing if "lora" not in key and "magnitude" not in key]
    if missing or unexpected:
        lacking = f"lacks {missing[0]}" if missing else f"has {unexpected[0]}, which the model has not"
        raise CheckpointError(
            f"checkpoint does not fit the model (it {lacking})",
            where=folder,
            remedy="match the model section to config.json",
        )


def _component_of(arguments: Mapping[str, Any]) -> Any:
    from torchtune.config._utils import _get_component_from_path

    return _get_component_from_path(arguments["_component_"])


def _flat(error: BaseException) -> str:
    return " ".join(str(error).split())
