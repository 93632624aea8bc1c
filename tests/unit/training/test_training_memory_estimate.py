"""Memory that is foretold without numbers, beside what torch's own CPU allocator is asked for in the same passes."""

import gc
from functools import partial

import pytest
import torch
from torch import nn

from personas_tune.adapters.bank import AdapterBank
from personas_tune.adapters.base_model import build_on_meta, size_of_weights
from personas_tune.training.live_bytes import LiveBytes, peak_of
from personas_tune.training.memory_estimate import (
    evaluation_groups,
    evaluation_passes,
    held_memory,
    optimizer_state_bytes,
    predict_once,
    train_once,
    training_passes,
    training_plans,
)

SIZES = {
    "vocab_size": 400, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 128, "intermediate_dim": 256,
    "max_seq_len": 512,
}  # fmt: skip
LORA = {
    "lora_attn_modules": ["q_proj", "k_proj"], "apply_lora_to_mlp": False, "lora_rank": 16, "lora_alpha": 32,
    "lora_dropout": 0.05,
}  # fmt: skip
KINDS = {
    "phi3": {},
    "phi3 dora on all": {"use_dora": True, "apply_lora_to_mlp": True},
    "llama3": {"_component_": "torchtune.models.llama3.lora_llama3"},
    "qwen2 tied": {"_component_": "torchtune.models.qwen2.lora_qwen2", "tie_word_embeddings": True},
}
ANSWERS = [[n, 9] for n in range(5)]
LOSS = nn.CrossEntropyLoss()


def section(**changes):
    return {"_component_": "torchtune.models.phi3.lora_phi3", **SIZES, **LORA, **changes}


def real_and_meta(model, recompute=False):
    from omegaconf import OmegaConf
    from torchtune import config, training
    from torchtune.modules import TransformerSelfAttentionLayer

    real = config.instantiate(OmegaConf.create(model))
    if recompute:
        training.set_activation_checkpointing(real, auto_wrap_policy={TransformerSelfAttentionLayer})
    meta = build_on_meta(model, "fp32", enable_activation_checkpointing=recompute)
    AdapterBank(real), AdapterBank(meta)
    return real, meta


def allocated_by(run):
    """The most bytes that a run holds at a time, as torch's profiler hears from the allocator."""
    run()  # what is only made once
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_passes_of_training_hold_what_is_foretold(kind, recompute):
    real, meta = real_and_meta(section(**KINDS[kind]), recompute)
    for plan in training_plans(batch_size=3, rows_per_user=6, n_tokens=96, share=True):
        foretold = peak_of(meta, partial(train_once, meta, plan, LOSS))
        assert foretold == pytest.approx(allocated_by(partial(train_once, real, plan, LOSS)), rel=0.03)


@pytest.mark.parametrize("kind", KINDS)
def test_passes_of_evaluation_hold_what_is_foretold(kind):
    real, meta = real_and_meta(section(**KINDS[kind]))
    for groups, n_rows in evaluation_groups(900, 96, ANSWERS):
        foretold = peak_of(meta, partial(predict_once, meta, groups, n_rows))
        assert foretold == pytest.approx(allocated_by(partial(predict_once, real, groups, n_rows)), rel=0.05)


def test_activations_are_what_autograd_saves():
    real, meta = real_and_meta(section(lora_dropout=0.0))
    (plan,) = training_plans(batch_size=3, rows_per_user=1, n_tokens=96, share=True)
    weights = {weight.untyped_storage().data_ptr() for weight in (*real.parameters(), *real.buffers())}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage  # alive, so that no two have one address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        train_once(real, plan, LOSS)
    n_saved = sum(storage.nbytes() for storage in saved.values())
    foretold = peak_of(meta, partial(train_once, meta, plan, LOSS))
    assert n_saved < foretold < 1.25 * n_saved  # the rest are gradients and what an operation is at work on


def test_what_lies_on_the_device_between_passes_is_counted_exactly():
    real, meta = real_and_meta(section(use_dora=True))
    bank = AdapterBank(real)
    adapters = [bank.add_new(name, 0) for name in ("a", "b", "c")]
    for adapter in adapters:
        optimizer = torch.optim.AdamW(adapter.masters.values())
        for weight in adapter.masters.values():
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        adapter.state = [value for each in optimizer.state.values() for value in each.values() if value.numel() > 1]
    memory = held_memory(meta, n_adapters=3, state_bytes=8.0, trains=True)
    masters = [weight for adapter in adapters for weight in adapter.masters.values()]
    working = [weight for weight in real.parameters() if weight.requires_grad]
    frozen = [weight for weight in real.parameters() if not weight.requires_grad]
    assert memory.base == n_bytes(frozen) + n_bytes(real.buffers())
    assert memory.adapters == n_bytes(masters)
    assert memory.optimizer == sum(n_bytes(adapter.state) for adapter in adapters)
    assert memory.working == n_bytes(working) + n_bytes(weight.grad for weight in adapters[0].masters.values())
    assert memory.total == memory.base + memory.adapters + memory.optimizer + memory.working
    used = held_memory(meta, n_adapters=3, state_bytes=8.0, trains=False)
    assert (used.optimizer, used.working) == (0, n_bytes(working))


def n_bytes(tensors):
    return sum(tensor.nbytes for tensor in tensors)


def test_a_quantised_base_is_counted_with_its_factors():
    plain = section(num_kv_heads=4, lora_dropout=0.0)  # NF4 takes weights of a multiple of 16,384 numbers
    model = {**plain, "quantize_base": True}
    from omegaconf import OmegaConf
    from torchtune import config, training

    with training.set_default_dtype(torch.bfloat16):
        real = config.instantiate(OmegaConf.create(model))
    AdapterBank(real)
    real_bytes = 0
    for weight in real.parameters():
        if not weight.requires_grad:
            parts = weight.__tensor_flatten__()[0] if hasattr(weight, "__tensor_flatten__") else []
            real_bytes += n_bytes(getattr(weight, part) for part in parts) if parts else weight.nbytes
    meta = build_on_meta(model, "bf16")
    assert size_of_weights(meta) == real_bytes
    assert size_of_weights(meta) < size_of_weights(build_on_meta(plain, "bf16"))
    passes = {"batch_size": 2, "rows_per_user": 4, "n_tokens": 64, "share": True, "loss_fn": LOSS}
    assert training_passes(meta, **passes) > training_passes(build_on_meta(plain, "bf16"), **passes)


@pytest.mark.parametrize(
    ("optimizer", "n_bytes_a_weight"),
    [
        (lambda weights: torch.optim.AdamW(weights), 8),
        (lambda weights: torch.optim.AdamW(weights, amsgrad=True), 12),
        (lambda weights: torch.optim.SGD(weights, lr=1), 0),
        (lambda weights: torch.optim.SGD(weights, lr=1, momentum=0.9), 4),
    ],
)
def test_an_optimizers_state_is_found_by_a_step(optimizer, n_bytes_a_weight):
    assert optimizer_state_bytes(optimizer) == n_bytes_a_weight


def test_more_rows_and_more_tokens_take_more_and_recomputing_less():
    meta = build_on_meta(section(), "fp32")
    recomputed = build_on_meta(section(), "fp32", enable_activation_checkpointing=True)
    usual = {"batch_size": 4, "rows_per_user": 2, "n_tokens": 128, "share": True, "loss_fn": LOSS}
    passes = training_passes(meta, **usual)
    assert training_passes(meta, **{**usual, "batch_size": 1}) < 0.5 * passes
    assert training_passes(meta, **{**usual, "n_tokens": 64}) < 0.6 * passes
    assert training_passes(recomputed, **usual) < 0.9 * passes  # of two layers, one is kept
    few = evaluation_passes(meta, max_tokens=500, n_tokens=128, answers=ANSWERS)
    assert few < 0.4 * evaluation_passes(meta, max_tokens=2000, n_tokens=128, answers=ANSWERS)


def test_a_storage_counts_once_and_until_it_is_let_go():
    known = torch.zeros(100, device="meta")
    with LiveBytes([known], torch.device("meta")) as live:
        known.add_(1)
        one = torch.ones(10, device="meta")
        view = one.view(2, 5)
        assert live.now == 40
        two = one + 1
        assert (live.now, live.peak) == (80, 80)
        del one, two
        assert live.now == 40  # the view holds its storage
        del view
        assert (live.now, live.peak) == (0, 80)
        torch.zeros(5)  # elsewhere
        assert live.peak == 80
