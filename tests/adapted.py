"""Tiny models of each family with an adapter of large effect, and their adapter as training leaves it on disk."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from families import VOCAB, checkpointer_section, model_section, write_checkpoint
from omegaconf import OmegaConf
from torch import Tensor, nn
from torchtune import config
from torchtune.modules.peft import DoRALinear, get_adapter_params

from personas_tune.adapters.files import NATIVE_FILE, save_native
from personas_tune.adapters.layouts import Layout, read_layout

TOKENS = torch.randint(3, VOCAB, (2, 40), generator=torch.Generator().manual_seed(0))
RANK, ALPHA = 4, 16


@dataclass(frozen=True)
class Adapted:
    """A base on disk, its torchtune model with the adapter, and the adapter's folder."""

    base: Path
    adapter: Path
    model: nn.Module
    layout: Layout

    @property
    def base_files(self) -> list[Path]:
        return sorted([*self.base.glob("*.safetensors"), *self.base.glob("*.bin")])

    def logits(self) -> Tensor:
        return logits_of(self.model)


def adapt(name: str, root: Path, targets: str = "q_k", *, shard_size: str = "5GB", **model: Any) -> Adapted:
    """Write a family's checkpoint and an adapter on it, as far from zero as its base's weights are."""
    base = write_checkpoint(name, root / "base", shard_size=shard_size)
    section = checkpointer_section(name, base)
    network = config.instantiate(OmegaConf.create(model_section(name, targets, **model)))
    reader = config.instantiate(OmegaConf.create(section))
    network.load_state_dict(reader.load_checkpoint()["model"], strict=False)
    torch.manual_seed(1)
    for module in network.modules():
        if isinstance(module, DoRALinear):
            module.initialize_dora_magnitude()
    with torch.no_grad():
        for key, weight in get_adapter_params(network).items():
            if "magnitude" in key:
                weight.mul_(1 + 0.3 * torch.rand_like(weight))
            else:
                weight.normal_(std=0.1)
    adapter = root / "adapters" / "persona" / "0"
    adapter.mkdir(parents=True)
    weights = {key: weight.detach() for key, weight in get_adapter_params(network).items()}
    save_native(adapter / NATIVE_FILE, weights, {"rank": RANK, "alpha": ALPHA, "dropout": 0.1})
    return Adapted(base, adapter, network.eval(), read_layout(section["model_type"], base))


def logits_of(model: nn.Module) -> Tensor:
    """Logits on fixed tokens, whichever library's model it is."""
    with torch.no_grad():
        out = model.eval()(TOKENS)
    return getattr(out, "logits", out)


def assert_same_logits(theirs: Tensor, ours: Tensor) -> None:
    """Equal to 1e-5 of the largest logit."""
    torch.testing.assert_close(theirs, ours, atol=1e-5 * ours.abs().max().item(), rtol=0)
