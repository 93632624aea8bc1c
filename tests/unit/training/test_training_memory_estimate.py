"""Memory that is foretold without numbers, beside what torch's own CPU allocator is asked for in the same passes."""

import gc
import importlib.util
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from personas_tune.adapters.bank import AdapterBank
from personas_tune.adapters.base_model import build_on_meta, size_of_weights
from personas_tune.training import live_bytes
from personas_tune.training.batches import plan_prompts
from personas_tune.training.live_bytes import LiveBytes, peak_of
from personas_tune.training.memory_estimate import (
    evaluation_groups,
    evaluation_passes,
    gathered_bytes,
    held_memory,
    optimizer_state_bytes,
    optimizer_step_bytes,
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
    "llama3_2": {"_component_": "torchtune.models.llama3_2.lora_llama3_2"},
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


def test_weights_of_one_shape_are_dequantised_once_and_count_each_time(monkeypatch):
    model = {**section(num_kv_heads=4, lora_dropout=0.0), "quantize_base": True}
    passes = {"batch_size": 2, "rows_per_user": 4, "n_tokens": 64, "share": True, "loss_fn": LOSS}
    quickly = training_passes(build_on_meta(model, "bf16"), **passes)
    monkeypatch.setattr(live_bytes, "_dequantised_once", nullcontext)
    monkeypatch.setattr(live_bytes, "_ELEMENTWISE", ())
    assert training_passes(build_on_meta(model, "bf16"), **passes) == quickly


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


@pytest.mark.parametrize(
    "make",
    [
        partial(torch.optim.AdamW, foreach=True),
        partial(torch.optim.AdamW, foreach=False),
        partial(torch.optim.AdamW, foreach=True, amsgrad=True, weight_decay=0.1),
        partial(torch.optim.SGD, foreach=True, lr=1, momentum=0.9),
    ],
)
def test_an_optimizers_step_holds_what_is_foretold(make):
    real, meta = real_and_meta(section(apply_lora_to_mlp=True))
    weights = [nn.Parameter(weight.detach().clone()) for weight in real.parameters() if weight.requires_grad]
    optimizer = make(weights)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    foretold = optimizer_step_bytes(meta, make, on_gpu=True)
    assert foretold == pytest.approx(allocated_by(optimizer.step), rel=0.03, abs=2000)


def test_on_a_gpu_an_optimizer_steps_on_all_weights_at_once():
    _, meta = real_and_meta(section(apply_lora_to_mlp=True))
    at_once = optimizer_step_bytes(meta, torch.optim.AdamW, on_gpu=True)
    assert at_once == optimizer_step_bytes(meta, partial(torch.optim.AdamW, foreach=True), on_gpu=False)
    assert at_once > 4 * optimizer_step_bytes(meta, torch.optim.AdamW, on_gpu=False)
    assert at_once >= 4 * AdapterBank(meta).n_parameters


def test_what_is_gathered_of_a_base_is_two_layers_and_what_lies_outside():
    network = build_on_meta(section(), "bf16")
    of_layers = [n_bytes(w for name, w in layer.named_parameters() if "lora" not in name) for layer in network.layers]
    outside = n_bytes([network.tok_embeddings.weight, network.output.weight, network.norm.scale])
    assert gathered_bytes(network) == sum(of_layers) + outside == size_of_weights(network)  # it has two layers
    deeper = build_on_meta(section(num_layers=5), "bf16")
    assert gathered_bytes(deeper) == gathered_bytes(network)


def test_prompts_are_read_as_the_evaluation_reads_them():
    for groups, per_pass in evaluation_groups(900, 96, ANSWERS):
        prompts = [rows[0].prompt for group in groups for rows in group]
        ((planned, n),) = plan_prompts(prompts, sum(map(len, ANSWERS)), 900)
        assert n == per_pass
        assert sorted(map(len, planned)) == sorted(map(len, groups))


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


def test_the_benchmark_that_predicts_memory_counts_as_the_estimate_does(monkeypatch, capsys):
    path = Path(__file__).parents[3] / "benchmarks" / "predicted.py"
    spec = importlib.util.spec_from_file_location("predicted", path)
    predicted = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "predicted", predicted)
    spec.loader.exec_module(predicted)
    small = "--dim 128 --layers 2 --ffn 256 --vocab 400 --heads 4 --rank 16 --prefix 72 --branch 24 --dtype fp32"
    monkeypatch.setattr(sys, "argv", ["predicted.py", *small.split(), "--rows-per-user", "4", "--gpus", "1"])
    predicted.main()
    _, recomputed, kept = capsys.readouterr().out.splitlines()
    meta = build_on_meta(section(num_kv_heads=4, lora_dropout=0.0, max_seq_len=4096), "fp32")
    passes = training_passes(meta, batch_size=2, rows_per_user=4, n_tokens=96, share=True, loss_fn=LOSS)
    assert kept.split()[6] == f"{passes / 1e6:.0f}"
    assert int(recomputed.split()[6]) <= int(kept.split()[6])
