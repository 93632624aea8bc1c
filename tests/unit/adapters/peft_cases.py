"""Tiny models with adapters of a large effect, and the same bases in transformers for PEFT to adapt."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from families import FAMILIES, VOCAB, checkpointer_section, model_section
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor, nn
from torchtune import config

from personas_tune.adapters.bank import AdapterBank
from personas_tune.adapters.files import LoraShape, lora_shape
from personas_tune.adapters.layouts import Layout, read_layout

TOKENS = torch.randint(3, VOCAB, (2, 30), generator=torch.Generator().manual_seed(7))


@dataclass
class Case:
    """A torchtune model with one adapter, random and large.

    Args:
        checkpoint: The base's folder.
        model: The model.
        layout: Of the base.
        fresh: An untrained adapter.
        weights: The adapter.
    """

    checkpoint: Path
    model: nn.Module
    bank: AdapterBank
    layout: Layout
    fresh: dict[str, Tensor]
    weights: dict[str, Tensor]

    @property
    def shape(self) -> LoraShape:
        return lora_shape(self.model)

    def base_weight(self, name: str) -> Tensor:
        return load_file(self.checkpoint / "model.safetensors")[name]

    def logits(self, weights: dict[str, Tensor]) -> Tensor:
        """What the model says with an adapter."""
        self.bank.add_loaded("asked", weights, where="the test")
        try:
            with torch.no_grad(), self.bank.use("asked"):
                return self.model.eval()(TOKENS).float()
        finally:
            self.bank.remove("asked")


def build(name: str, checkpoint: Path, targets: str = "q_k", *, std: float = 0.1, **changes: Any) -> Case:
    """A family's tiny model with a random adapter."""
    model = config.instantiate(OmegaConf.create(model_section(name, targets, **changes)))
    bank = AdapterBank(model)
    model.load_state_dict(_base_weights(name, checkpoint), strict=False)
    fresh = bank.add_new("fresh", seed=3).state_dict()
    return Case(
        checkpoint, model, bank, read_layout(FAMILIES[name].model_type, checkpoint), fresh, random_adapter(fresh, std)
    )


@cache
def _base_weights(name: str, checkpoint: Path) -> dict[str, Tensor]:
    reader = config.instantiate(OmegaConf.create(checkpointer_section(name, checkpoint)))
    weights: dict[str, Tensor] = reader.load_checkpoint()["model"]
    return weights


def random_adapter(fresh: dict[str, Tensor], std: float, seed: int = 1) -> dict[str, Tensor]:
    """Random A and B, and magnitudes half to one and a half as large as the base's."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: weight * (0.5 + torch.rand(weight.shape, generator=generator))
        if "magnitude" in key
        else std * torch.randn(weight.shape, generator=generator)
        for key, weight in fresh.items()
    }


@cache
def hf_model(checkpoint: Path) -> Any:
    """The base in transformers, fp32; whoever puts an adapter in takes it out again."""
    return transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()


@contextmanager
def taken_out_after(adapted: Any) -> Iterator[Any]:
    """A model of PEFT for the length of a block; then its base is as it was."""
    try:
        yield adapted
    finally:
        del adapted.unload().peft_config


def hf_logits(model: Callable[..., Any]) -> Tensor:
    """What a model of transformers or PEFT says."""
    with torch.no_grad():
        logits: Tensor = model(TOKENS).logits
    return logits
