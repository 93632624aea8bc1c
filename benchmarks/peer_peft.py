"""HF PEFT: several adapters resident on one base, the one of a microbatch named by ``set_adapter``.

The base is a LlamaForCausalLM. HF's Phi-3 has one fused projection for q, k and v, on which PEFT can't train q and k
alone; torchtune's Phi-3 with its separate projections is a Llama of the same sizes, and takes the same weights. So
PEFT needs no doubled rank with half of it zero, which would slow it down.
"""

import warnings
from collections.abc import Sequence
from itertools import cycle

import torch
from peer_model import N_ADAPTERS, Gradients, Machine, ModelSize, Weights, adamw, restore, taken_gradients
from peft import LoraConfig, PeftModel, get_peft_model
from rows import PAD_ID
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchtune import training
from transformers import LlamaConfig, LlamaForCausalLM

from personas_tune.datasets import TokenRow
from personas_tune.training.batches import padded

NAMES = [f"adapter_{index}" for index in range(N_ADAPTERS)]
PARTS = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "output.weight": "lm_head.weight",
    "layers.": "model.layers.",
    ".attn.": ".self_attn.",
    ".output_proj.": ".o_proj.",
    ".mlp.w1.": ".mlp.gate_proj.",
    ".mlp.w2.": ".mlp.down_proj.",
    ".mlp.w3.": ".mlp.up_proj.",
    ".sa_norm.scale": ".input_layernorm.weight",
    ".mlp_norm.scale": ".post_attention_layernorm.weight",
    "norm.scale": "model.norm.weight",
}


class Peft:
    """Microbatches of padded rows; no gradient checkpointing, logits at the answers' places only.

    Rows are padded on the right and no mask is given: nothing that is read comes after an answer, so attention takes
    its fastest path. ``logits_to_keep`` are the places from which any row of the batch predicts an answer token.

    Args:
        base: What is trained; several may train the same.
        machine: Where it lies.
        rows: What every adapter trains on.
        rows_per_step: Rows of an optimizer step.
        batch_size: Rows of a microbatch.
    """

    def __init__(
        self, base: "PeftBase", machine: Machine, rows: Sequence[TokenRow], rows_per_step: int, *, batch_size: int
    ) -> None:
        self.base, self.machine, self.rows, self.batch_size = base, machine, rows, batch_size
        starts = range(0, len(rows) - rows_per_step + 1, rows_per_step)
        self.turns = cycle((start, start + rows_per_step, name) for start in starts for name in NAMES)

    def gradients(self, rows: Sequence[TokenRow]) -> tuple[float, Gradients]:
        adapter = self.base.adapters[NAMES[0]]
        restore(adapter, self.base.weights)
        return self._backward(rows, NAMES[0]), taken_gradients(adapter)

    def step(self) -> float:
        start = self.machine.clock()
        begin, end, name = next(self.turns)
        self._backward(self.rows[begin:end], name)
        self.base.optimizers[name].step()
        self.base.optimizers[name].zero_grad()
        return self.machine.clock() - start

    def _backward(self, rows: Sequence[TokenRow], name: str) -> float:
        n_tokens = sum(len(row.answer) for row in rows)
        total = torch.zeros((), device=self.machine.device)
        for start in range(0, len(rows), self.batch_size):
            self.base.model.set_adapter(name)
            loss = self._summed_loss(rows[start : start + self.batch_size]) / n_tokens
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total.item()

    def _summed_loss(self, rows: Sequence[TokenRow]) -> Tensor:
        tokens = padded([row.tokens for row in rows], PAD_ID)
        spots = [(b, t - 1) for b, row in enumerate(rows) for t in range(row.answer_start, len(row.tokens))]
        batch_index, source = torch.tensor(spots).unbind(1)
        kept, place = source.unique(return_inverse=True)
        device = self.machine.device
        logits = self.base.model(input_ids=tokens.to(device), logits_to_keep=kept.to(device), use_cache=False).logits
        targets = tokens[batch_index, source + 1].to(device)
        return cross_entropy(logits[batch_index, place].float(), targets, reduction="sum")


class PeftBase:
    """The base with its adapters and their optimizers."""

    def __init__(self, size: ModelSize, machine: Machine, weights: Weights) -> None:
        config = LlamaConfig(
            vocab_size=size.vocab_size, hidden_size=size.embed_dim, intermediate_size=size.intermediate_dim,
            num_hidden_layers=size.num_layers, num_attention_heads=size.num_heads, num_key_value_heads=size.num_heads,
            max_position_embeddings=4096, rms_norm_eps=1e-5, attn_implementation="sdpa", tie_word_embeddings=False,
        )  # fmt: skip
        with training.set_default_dtype(machine.dtype), machine.device:
            base = LlamaForCausalLM(config)
        base.load_state_dict({_in_llama(name): weight for name, weight in weights.base.items()})
        lora = LoraConfig(r=size.rank, lora_alpha=size.rank, target_modules=["q_proj", "k_proj"], lora_dropout=0.0)
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of PEFT's, on transformers' names
            self.model: PeftModel = get_peft_model(base, lora, NAMES[0], autocast_adapter_dtype=False)
            for name in NAMES[1:]:
                self.model.add_adapter(name, lora)
        parameters = dict(self.model.named_parameters())
        self.adapters: dict[str, dict[str, nn.Parameter]] = {
            adapter: {name: parameters[_in_peft(name, adapter)] for name in weights.adapter} for adapter in NAMES
        }
        self.optimizers = {name: adamw(adapter.values()) for name, adapter in self.adapters.items()}
        for adapter in self.adapters.values():
            restore(adapter, weights)
        self.weights = weights


def _in_llama(name: str) -> str:
    for ours, theirs in PARTS.items():
        name = name.replace(ours, theirs)
    return name


def _in_peft(name: str, adapter: str) -> str:
    matrix = {".lora_a.": f".lora_A.{adapter}.", ".lora_b.": f".lora_B.{adapter}."}
    for ours, theirs in matrix.items():
        name = name.replace(ours, theirs)
    return f"base_model.model.{_in_llama(name)}"
