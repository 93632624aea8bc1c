"""What a checkpoint holds, read from its files' headers: no weight is loaded, no pickle is opened."""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torchtune.modules.peft import get_adapter_params

from personas_tune.errors import CheckpointError

SUFFIX = ".safetensors"
INDEX = "model.safetensors.index.json"
# Which of a checkpointer's model types reads a Hugging Face architecture.
MODEL_TYPES = {
    "Phi3ForCausalLM": ("PHI3_MINI", "PHI4"),
    "LlamaForCausalLM": ("LLAMA3", "LLAMA3_2", "LLAMA2"),
    "Qwen2ForCausalLM": ("QWEN2",),
    "MistralForCausalLM": ("MISTRAL",),
    "GemmaForCausalLM": ("GEMMA",),
    "Gemma2ForCausalLM": ("GEMMA2",),
}
_CONVERTED = {name for names in MODEL_TYPES.values() for name in names} - {"GEMMA2"}


@dataclass(frozen=True)
class Headers:
    """What a checkpoint's files say that they hold.

    Args:
        weights: By name in the files, on the meta device.
        dtypes: How many weights are stored as what, such as ``BF16``.
        n_bytes: Of all files.
    """

    weights: dict[str, Tensor]
    dtypes: Counter[str]
    n_bytes: int


def read_headers(files: list[Path]) -> Headers:
    """Names, shapes and types of the weights in safetensors files.

    Raises:
        CheckpointError: If a file is no whole safetensors file, or a weight lies in two of them.
    """
    weights: dict[str, Tensor] = {}
    dtypes: Counter[str] = Counter()
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no mapping
                    part = opened.get_slice(name)
                    if name in weights:
                        raise _unusable(file, f"weight {name[:100]!r} is in another file, too")
                    weights[name] = torch.empty(part.get_shape(), device="meta")
                    dtypes[str(part.get_dtype())] += 1
        except (SafetensorError, OSError, ValueError, RuntimeError, OverflowError) as error:
            raise _unusable(file, f"no whole safetensors file ({reason_of(error)})") from error
    return Headers(weights, dtypes, sum(file.stat().st_size for file in files))


def check_index(folder: Path, files: list[Path], headers: Headers) -> str | None:
    """Whether the checkpoint's index, if it has one, names nothing that isn't in the files; what it says.

    Raises:
        CheckpointError: If it does, or can't be read.
    """
    index = folder / INDEX
    if not index.is_file():
        return None
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise _unusable(index, "no weight_map from names to files")
    unread = sorted(set(places.values()) - {file.name for file in files})
    if unread:
        raise CheckpointError(
            f"{unread[0]} is not among checkpointer.checkpoint_files",
            where=str(index),
            remedy="list every shard in checkpointer.checkpoint_files",
        )
    lost = sorted(places.keys() - headers.weights.keys())
    if lost:
        raise _unusable(index, f"weight {lost[0][:100]!r} is in none of the files")
    return f"{len(places)} weights in {len(set(places.values()))} files"


def read_object(file: Path) -> dict[str, Any]:
    """A checkpoint's JSON file that holds one object.

    Raises:
        CheckpointError: If it doesn't.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _unusable(file, f"no JSON ({reason_of(error)})") from error
    if not isinstance(found, dict):
        raise _unusable(file, f"a JSON {type(found).__name__}, not an object")
    return found


def misfits(network: nn.Module, headers: Headers, described: Mapping[str, Any], model_type: str) -> list[str] | None:
    """How a checkpoint's weights and a network differ, worst first; None if that can't be told for this model type.

    Args:
        network: On the meta device.
        headers: The checkpoint's.
        described: Its ``config.json``.
        model_type: The checkpointer's.

    Raises:
        CheckpointError: If the weights have other names than this model type's, or sizes that config.json hasn't.
    """
    if model_type not in _CONVERTED:
        return None
    try:
        held = _converter(model_type, described)(dict(headers.weights))
    except Exception as error:  # whatever names, shapes and config.json lead to
        raise CheckpointError(
            f"weights don't have the names or shapes of {model_type} ({reason_of(error)})",
            where="checkpointer",
            remedy="check checkpointer.model_type and the folder's config.json",
        ) from error
    adapters = get_adapter_params(network)
    wanted = {name: tuple(weight.shape) for name, weight in network.named_parameters() if name not in adapters}
    found = {name: tuple(weight.shape) for name, weight in held.items()}
    return [
        *(
            f"{name}: checkpoint {found[name]}, model {wanted[name]}"
            for name in wanted
            if name in found and found[name] != wanted[name]
        ),
        *(f"it lacks {name}" for name in wanted if name not in found),
        *(f"it has {name}, which the model has not" for name in found if name not in wanted),
    ]


def _converter(model_type: str, described: Mapping[str, Any]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """What torchtune's checkpointer does to the names and shapes of a model type's weights."""
    n_heads, dim = int(described["num_attention_heads"]), int(described["hidden_size"])
    n_kv_heads = int(described.get("num_key_value_heads", n_heads))
    heads = {"num_heads": n_heads, "num_kv_heads": n_kv_heads, "dim": dim}
    if model_type in ("PHI3_MINI", "PHI4"):
        from torchtune.models.phi3._convert_weights import phi3_hf_to_tune

        fused_evenly = n_heads == n_kv_heads  # then it wants no sizes
        return partial(phi3_hf_to_tune, **(dict.fromkeys(heads) if fused_evenly else heads))
    if model_type == "QWEN2":
        from torchtune.models.qwen2._convert_weights import qwen2_hf_to_tune

        return partial(qwen2_hf_to_tune, **heads, tie_word_embeddings=bool(described.get("tie_word_embeddings")))
    from torchtune.models.convert_weights import hf_to_tune

    return partial(hf_to_tune, **heads, head_dim=described.get("head_dim"))


def _unusable(file: Path, what: str) -> CheckpointError:
    return CheckpointError(what, where=str(file), remedy="download or make it again")


def reason_of(error: BaseException) -> str:
    """A library's error as a short text without control characters: it may quote the file that it is about."""
    text = "".join(letter if letter.isprintable() else " " for letter in str(error))
    return " ".join(text.split())[:200] or type(error).__name__
