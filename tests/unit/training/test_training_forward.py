"""Shared prefixes: the same logits and gradients as each row on its own."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from personas_tune.datasets import TokenRow
from personas_tune.training.forward import answer_logits, plain_batch, shared_batch


def random_groups(seed: int) -> list[list[list[TokenRow]]]:
    """Three prefixes of different lengths, branches of different lengths, one to three answers each."""
    rng = np.random.default_rng(seed)
    groups = []
    for _ in range(3):
        prefix = rng.integers(0, 20, int(rng.integers(1, 9))).tolist()
        branches = []
        for _ in range(int(rng.integers(1, 4))):
            prompt = prefix + rng.integers(0, 20, int(rng.integers(1, 6))).tolist()
            answers = [rng.integers(0, 20, int(rng.integers(1, 4))).tolist() for _ in range(int(rng.integers(1, 4)))]
            branches.append([TokenRow(prompt + answer, len(prompt)) for answer in answers])
        groups.append(branches)
    return groups


def build(seed: int, kv_heads: int, **lora) -> nn.Module:
    from torchtune.models.phi3 import lora_phi3

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 20,
        "num_layers": 3,
        "num_heads": 4,
        "embed_dim": 16,
        "intermediate_dim": 32,
        "max_seq_len": 64,
    }
    model = lora_phi3(["q_proj", "k_proj"], num_kv_heads=kv_heads, lora_rank=2, lora_alpha=4, **sizes, **lora)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3)
    return model


def gradients(model: nn.Module, batch, n: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    logits = answer_logits(model, batch)
    nn.functional.cross_entropy(logits, batch.targets).backward()
    return logits.detach(), {name: weight.grad.clone() for name, weight in model.named_parameters()}


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([2, 4]))
def test_sharing_changes_neither_logits_nor_gradients(seed: int, kv_heads: int) -> None:
    model = build(seed, kv_heads)
    groups = random_groups(seed)
    rows = [row for group in groups for branch in group for row in branch]
    plain, plain_gradients = gradients(model, plain_batch(rows, 0), len(rows))
    shared, shared_gradients = gradients(model, shared_batch(groups, 0), len(rows))
    torch.testing.assert_close(shared, plain, rtol=1e-4, atol=1e-4)
    for name, gradient in plain_gradients.items():
        scale = gradient.abs().max().item() + 1e-6
        torch.testing.assert_close(shared_gradients[name] / scale, gradient / scale, rtol=0, atol=1e-4, msg=name)


def test_dropout_with_a_shared_prefix_has_the_expected_gradient_of_plain_rows() -> None:
    prefix = list(range(8))
    rows = [TokenRow([*prefix, 9, 10 + i, 1], 10) for i in range(3)]
    model = build(0, 4, lora_dropout=0.3)
    weight = model.layers[0].attn.q_proj.lora_a.weight

    def mean_gradient(batch, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(seed)
        draws = []
        for _ in range(400):
            model.zero_grad()
            nn.functional.cross_entropy(answer_logits(model, batch), batch.targets).backward()
            draws.append(weight.grad.clone())
        stacked = torch.stack(draws)
        return stacked.mean(0), stacked.std(0) / 20

    plain, error = mean_gradient(plain_batch(rows, 0), 1)
    shared, shared_error = mean_gradient(shared_batch([[[row] for row in rows]], 0), 2)
    z = ((plain - shared) / (error**2 + shared_error**2).sqrt()).flatten()
    assert z.pow(2).mean().item() == pytest.approx(1.0, abs=0.6)


def test_the_model_is_left_as_it_was() -> None:
    model = build(0, 4)
    answer_logits(model, shared_batch(random_groups(0), 0))
    assert not model.caches_are_enabled()
    tokens = torch.arange(6).unsqueeze(0)
    assert model(tokens).shape == (1, 6, 20)
