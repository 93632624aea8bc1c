"""The forward pass: the same logits with and without shared prefixes, the head where it is needed only."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_rows import LORA, SIZES, backward, rows_of_users, small_phi3, with_adapter
from torch import nn
from torchtune.models.qwen2 import lora_qwen2
from torchtune.modules.loss import CEWithChunkedOutputLoss

from personas_tune.datasets import TokenRow
from personas_tune.training.batches import plain_batch
from personas_tune.training.forward import answer_logits, answer_loss, fp32_head
from personas_tune.training.shared_prefix import shared_logits


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


def gradients(model: nn.Module, logits: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    nn.functional.cross_entropy(logits, targets).backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([2, 4]))
def test_one_graph_of_prefixes_and_trees_changes_neither_logits_nor_gradients(seed: int, kv_heads: int) -> None:
    model = small_phi3(num_kv_heads=kv_heads, num_layers=3).requires_grad_()
    groups = random_groups(seed)
    batch = plain_batch([row for group in groups for branch in group for row in branch], 0)
    plain = answer_logits(model, batch)
    shared, targets = shared_logits(model, groups, 0)
    assert torch.equal(targets, batch.targets)
    torch.testing.assert_close(shared, plain, rtol=1e-4, atol=1e-4)
    found = gradients(model, shared, targets)
    for name, gradient in gradients(model, plain, targets).items():
        scale = gradient.abs().max().item() + 1e-6
        torch.testing.assert_close(found[name] / scale, gradient / scale, rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_are_those_of_torchtune_s_own_forward(dropout: float) -> None:
    """With dropout, too: the last layer is cut short where no random number is drawn."""
    model = small_phi3(lora_dropout=dropout).requires_grad_()
    batch = plain_batch(rows_of_users(n_users=2)[0], 0)
    torch.manual_seed(0)
    found = gradients(model, answer_logits(model, batch), batch.targets)
    torch.manual_seed(0)
    whole = model(batch.tokens)[batch.batch_index, batch.source][batch.place]
    for name, gradient in gradients(model, whole, batch.targets).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(("dropout", "queries"), [(0.0, 8), (0.5, 44)])
def test_the_last_layer_runs_at_the_answers_but_for_keys_values_and_what_draws(dropout: float, queries: int) -> None:
    model = small_phi3(lora_dropout=dropout)
    layer = model.layers[-1]
    n_tokens = {}
    for name in ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.output_proj", "mlp.w1"):
        layer.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name: n_tokens.update({name: output.shape[:-1].numel()})
        )
    batch = plain_batch([TokenRow(list(range(11)), 9)] * 4, 0)
    answer_logits(model, batch)
    assert n_tokens == {
        "attn.q_proj": queries, "attn.k_proj": 44, "attn.v_proj": 44, "attn.output_proj": 8, "mlp.w1": 8,
    }  # fmt: skip


def test_logits_are_those_of_torchtune_s_own_forward() -> None:
    model = small_phi3()
    rows, _ = rows_of_users(n_users=1)
    logits = answer_logits(model, plain_batch(rows, 0))
    expected = [model(torch.tensor([row.tokens]))[0, row.answer_start - 1 : -1] for row in rows]
    torch.testing.assert_close(logits, torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_dropout_with_a_shared_prefix_has_the_expected_gradient_of_plain_rows() -> None:
    prefix = list(range(8))
    rows = [TokenRow([*prefix, 9, 10 + i, 1], 10) for i in range(3)]
    model = small_phi3(lora_dropout=0.3)
    name = "layers.0.attn.q_proj.lora_a.weight"

    def mean_gradient(sharing: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(seed)
        stacked = torch.stack([backward(model, rows, ["u"] * 3, sharing)[1][name] for _ in range(100)])
        return stacked.mean(0), stacked.std(0) / 10

    plain, error = mean_gradient("off", 1)
    shared, shared_error = mean_gradient("auto", 2)
    z = ((plain - shared) / (error**2 + shared_error**2).sqrt()).flatten()
    assert z.pow(2).mean().item() == pytest.approx(1.0, abs=0.6)


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_the_head_can_run_in_fp32_on_a_bf16_model(tied: bool) -> None:
    if tied:
        model = with_adapter(lora_qwen2(["q_proj"], **SIZES, **LORA, intermediate_dim=64, tie_word_embeddings=True))
    else:
        model = small_phi3(apply_lora_to_output=True)
    model = model.bfloat16()
    batch = plain_batch(rows_of_users(n_users=1)[0], 0)
    hidden = []
    handle = model.norm.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
    rounded = answer_logits(model, batch)
    handle.remove()
    with fp32_head(model):
        logits = answer_logits(model, batch)
    assert torch.equal(answer_logits(model, batch), rounded)  # the weights are back
    assert all(weight.dtype == torch.bfloat16 for weight in model.parameters())
    exact = model.float().unembed(hidden[0].float()).squeeze(0)
    torch.testing.assert_close(logits, exact, rtol=1e-5, atol=1e-5)
    assert (rounded - exact).abs().max() > 1e-3


def test_a_chunked_loss_is_the_mean_over_all_tokens() -> None:
    logits, targets = torch.randn(7, 5), torch.randint(0, 5, (7,))
    expected = nn.functional.cross_entropy(logits, targets)
    torch.testing.assert_close(answer_loss(CEWithChunkedOutputLoss(3), logits, targets), expected)
