"""Training a bank of adapters: each as if alone, the others and the base untouched."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from personas_tune.adapters.bank import AdapterBank
from personas_tune.datasets import RatingDataset, RatingSource
from personas_tune.errors import AdapterError
from personas_tune.training.batches import plain_batch
from personas_tune.training.fit import AdapterJob, TrainingSettings, train_steps, validation_loss
from personas_tune.training.forward import answer_logits, answer_loss
from personas_tune.training.order import epoch_order

SETTINGS = TrainingSettings(epochs=2, batch_size=2, gradient_accumulation_steps=2, seed=5)


def train(base, dataset, names, settings=SETTINGS):
    jobs = []
    for name in names:
        adapter = base.bank.add_new(name, seed=3)
        rows = [i for i, sample in enumerate(dataset.samples) if str(sample.persona) == name[-1]]
        jobs.append(
            AdapterJob(
                name,
                [dataset.rows[i] for i in rows],
                [dataset.samples[i].user_id for i in rows],
                torch.optim.AdamW(adapter.masters.values(), lr=1e-2),
            )
        )
    for _ in train_steps(base.model, base.bank, jobs, nn.CrossEntropyLoss(), settings, base.tokenizer.pad_id):
        pass
    return {name: base.bank[name].state_dict() for name in names}


def rating_dataset(base, experiment):
    source = RatingSource(experiment.root)
    return RatingDataset(base.tokenizer, source, source.samples("train"), "both")


@pytest.mark.parametrize(("dropout", "schedule"), [(0.0, "one_by_one"), (0.1, "interleaved")])
def test_training_the_bank_equals_training_each_adapter_alone(load_tiny, experiment, dropout, schedule) -> None:
    together = load_tiny(lora_dropout=dropout)
    dataset = rating_dataset(together, experiment)
    bank = train(together, dataset, ["persona/0", "persona/1"], replace(SETTINGS, schedule=schedule))
    for name in bank:
        alone = train(load_tiny(lora_dropout=dropout), dataset, [name])[name]
        for key, weight in alone.items():
            assert torch.equal(weight, bank[name][key]), key


def test_sharing_prefixes_trains_the_same_adapters(load_tiny, experiment) -> None:
    plain = load_tiny()
    dataset = rating_dataset(plain, experiment)
    in_runs = replace(SETTINGS, batch_size=4, rows_per_user=4)
    expected = train(plain, dataset, ["persona/0"], in_runs)["persona/0"]
    shared = train(load_tiny(), dataset, ["persona/0"], replace(in_runs, prefix_sharing="auto"))["persona/0"]
    for key, weight in expected.items():
        torch.testing.assert_close(shared[key], weight, rtol=1e-3, atol=1e-4, msg=key)


def test_a_loss_that_is_not_finite_stops_the_step_and_keeps_nothing_of_it(load_tiny, experiment) -> None:
    base = load_tiny()
    rows = rating_dataset(base, experiment).rows[:4]
    adapter = base.bank.add_new("a", seed=0)
    job = AdapterJob("a", rows, ["u"] * 4, torch.optim.AdamW(adapter.masters.values(), lr=1e-2))
    before = adapter.state_dict()

    class Broken(nn.CrossEntropyLoss):
        def forward(self, logits, targets):
            return super().forward(logits, targets) * float("nan")

    with pytest.raises(AdapterError, match=r"adapter a: loss is nan at step 1; lower optimizer\.lr"):
        list(train_steps(base.model, base.bank, [job], Broken(), SETTINGS, base.tokenizer.pad_id))
    assert all(torch.equal(before[key], weight) for key, weight in adapter.state_dict().items())
    assert all(weight.grad is None for weight in adapter.masters.values())


def test_every_adapter_moves_and_the_base_does_not(load_tiny, experiment) -> None:
    base = load_tiny()
    dataset = rating_dataset(base, experiment)
    before = {k: v.clone() for k, v in base.model.state_dict().items() if "lora" not in k}
    fresh = {name: base.bank.add_new(f"fresh/{name}", seed=3).state_dict() for name in "01"}
    trained = train(base, dataset, ["persona/0", "persona/1"])
    for name in "01":
        for key, weight in trained[f"persona/{name}"].items():
            assert not torch.equal(weight, fresh[name][key]), key
            assert torch.equal(base.bank[f"fresh/{name}"].state_dict()[key], fresh[name][key])
    after = base.model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_accumulated_microbatches_give_the_gradient_of_the_whole_step(load_tiny, experiment) -> None:
    base = load_tiny()
    dataset = rating_dataset(base, experiment)
    rows = dataset.rows[:7]  # answers of equal and unequal length, a last microbatch of one row
    base.bank.add_new("a", seed=0)
    with base.bank.use("a") as adapter:
        with torch.no_grad():  # B starts at zero, and with it half of the gradients
            for weight in base.bank._working.values():
                weight.add_(0.1)
        batch = plain_batch(rows, base.tokenizer.pad_id)
        nn.functional.cross_entropy(answer_logits(base.model, batch), batch.targets).backward()
        base.bank.take_gradients(1.0)
        whole = {k: v.grad for k, v in adapter.masters.items()}
        for weight in adapter.masters.values():
            weight.grad = None
        n = len(batch.targets)
        for start in range(0, 7, 2):
            part = plain_batch(rows[start : start + 2], base.tokenizer.pad_id)
            loss = answer_loss(nn.CrossEntropyLoss(), answer_logits(base.model, part), part.targets)
            (loss * len(part.targets)).backward()
            base.bank.take_gradients(1 / n)
    for key, gradient in whole.items():
        torch.testing.assert_close(adapter.masters[key].grad, gradient, rtol=1e-4, atol=1e-7)


def test_gradients_of_a_bf16_base_are_summed_in_fp32(tiny_checkpoint) -> None:
    from tiny import base_sections

    from personas_tune.adapters.base_model import load_base

    bank = load_base(**base_sections(tiny_checkpoint), device="cpu", dtype="bf16").bank
    bank.add_new("a", seed=0)
    with bank.use("a") as adapter:
        for value in (256.0, 1.0, 1.0):  # bf16 has 8 binary digits: 256 + 1 would be 256 again
            for weight in bank._working.values():
                weight.grad = torch.full_like(weight, value)
            bank.take_gradients(0.5)
    assert all((weight.grad == 129).all() for weight in adapter.masters.values())
    assert all(weight.grad is None for weight in bank._working.values())


def test_label_only_logits_equal_those_of_the_stock_forward(load_tiny, experiment) -> None:
    base = load_tiny()
    rows = rating_dataset(base, experiment).rows[:5]
    batch = plain_batch(rows, base.tokenizer.pad_id)
    stock = base.model(batch.tokens)[batch.batch_index, batch.source]
    torch.testing.assert_close(answer_logits(base.model, batch), stock)


def test_torchtune_s_chunked_loss_equals_cross_entropy() -> None:
    from torchtune.modules.loss import CEWithChunkedOutputLoss

    logits, targets = torch.randn(13, 30), torch.randint(0, 30, (13,))
    expected = nn.functional.cross_entropy(logits, targets)
    torch.testing.assert_close(answer_loss(CEWithChunkedOutputLoss(), logits, targets), expected)


def test_switching_adapters_before_backward_is_refused(load_tiny) -> None:
    base = load_tiny()
    base.bank.add_new("a", seed=0)
    base.bank.add_new("b", seed=0)
    with base.bank.use("a"), pytest.raises(AdapterError, match="'b' asked for while 'a' is in use"), base.bank.use("b"):
        pass


def test_a_fresh_adapter_does_nothing_and_its_seed_and_name_decide_its_weights(load_tiny, experiment) -> None:
    base = load_tiny()
    rows = rating_dataset(base, experiment).rows[:2]
    batch = plain_batch(rows, base.tokenizer.pad_id)
    base.bank.add_new("a", seed=0)
    base.bank.add_new("b", seed=0)
    again = load_tiny().bank.add_new("a", seed=0).state_dict()
    assert all(torch.equal(again[k], w) for k, w in base.bank["a"].state_dict().items())
    assert any(not torch.equal(w, base.bank["b"].state_dict()[k]) for k, w in again.items())
    from torchtune.modules.peft import disable_adapter

    with disable_adapter(base.model):
        plain = answer_logits(base.model, batch)
    with base.bank.use("a"):
        torch.testing.assert_close(answer_logits(base.model, batch), plain)


@pytest.mark.parametrize("broken", ["shape", "name", "nan"])
def test_a_foreign_adapter_is_refused(load_tiny, broken) -> None:
    base = load_tiny()
    weights = base.bank.add_new("a", seed=0).state_dict()
    key = next(iter(weights))
    if broken == "shape":
        weights[key] = weights[key][:, :-1]
    elif broken == "name":
        weights["layers.9.attn.q_proj.lora_a.weight"] = weights.pop(key)
    else:
        weights[key][0, 0] = float("nan")
    with pytest.raises(AdapterError, match=r"^adapter.safetensors: .*train (it|the adapter) again"):
        base.bank.add_loaded("b", weights, where="adapter.safetensors")


def test_a_model_without_lora_is_refused() -> None:
    from torchtune.models.phi3 import phi3

    with pytest.raises(AdapterError, match="use a lora_"):
        AdapterBank(phi3(20, 1, 2, 2, 16, 32, 64))


def test_masters_stay_fp32_over_a_bf16_base(tiny_checkpoint, experiment) -> None:
    from tiny import base_sections

    from personas_tune.adapters.base_model import load_base

    base = load_base(**base_sections(tiny_checkpoint), device="cpu", dtype="bf16")
    trained = train(base, rating_dataset(base, experiment), ["persona/0"])["persona/0"]
    assert all(weight.dtype == torch.float32 for weight in trained.values())
    assert next(base.model.parameters()).dtype == torch.bfloat16
    # A bf16 master could not hold these values.
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in trained.values())


@pytest.mark.parametrize("option", [{"enable_activation_checkpointing": True}, {"use_dora": True}])
def test_activation_checkpointing_and_dora_train(tiny_checkpoint, experiment, option) -> None:
    from tiny import base_sections

    from personas_tune.adapters.base_model import load_base

    model = {k: v for k, v in option.items() if k == "use_dora"}
    flags = {k: v for k, v in option.items() if k != "use_dora"}
    base = load_base(**base_sections(tiny_checkpoint, lora_dropout=0.1, **model), device="cpu", dtype="fp32", **flags)
    dataset = rating_dataset(base, experiment)
    trained = train(base, dataset, ["persona/0", "persona/1"])
    if not model:  # recomputing must not change the result
        plain = load_base(**base_sections(tiny_checkpoint, lora_dropout=0.1), device="cpu", dtype="fp32")
        expected = train(plain, dataset, ["persona/0", "persona/1"])
        for name, weights in expected.items():
            for key, weight in weights.items():
                torch.testing.assert_close(trained[name][key], weight)
    assert all(torch.isfinite(w).all() for weights in trained.values() for w in weights.values())


def test_validation_loss_is_measured_without_dropout(load_tiny, experiment) -> None:
    base = load_tiny(lora_dropout=0.5)
    rows = rating_dataset(base, experiment).rows[:6]
    adapter = base.bank.add_new("a", seed=0)
    with torch.no_grad():  # B starts at zero, and dropout would do nothing
        for weight in adapter.masters.values():
            weight.add_(0.1)
    job = AdapterJob("a", rows, [], torch.optim.SGD(adapter.masters.values(), lr=0.1), validation_rows=rows)
    batch = plain_batch(rows, base.tokenizer.pad_id)

    def loss() -> float:
        with base.bank.use("a"):
            return nn.functional.cross_entropy(answer_logits(base.model, batch), batch.targets).item()

    dropped = loss()
    base.model.eval()
    expected = loss()
    base.model.train()
    measured = validation_loss(base.model, base.bank, job, nn.CrossEntropyLoss(), 4, base.tokenizer.pad_id)
    assert measured == pytest.approx(expected, rel=1e-5)
    assert measured != pytest.approx(dropped, rel=1e-3)


def test_an_epoch_is_a_permutation_in_runs_of_one_user() -> None:
    users = [f"u{i % 5}" for i in range(40)]
    order = epoch_order(users, epoch=0, rows_per_user=4, seed=1, adapter="a")
    assert sorted(order) == list(range(40))
    assert all(len({users[i] for i in order[s : s + 4]}) == 1 for s in range(0, 40, 4))
    assert order == epoch_order(users, epoch=0, rows_per_user=4, seed=1, adapter="a")
    others = [
        epoch_order(users, epoch=1, rows_per_user=4, seed=1, adapter="a"),
        epoch_order(users, epoch=0, rows_per_user=4, seed=2, adapter="a"),
        epoch_order(users, epoch=0, rows_per_user=4, seed=1, adapter="b"),
    ]
    assert all(order != other for other in others)
    plain = epoch_order(users, epoch=0, rows_per_user=1, seed=1, adapter="a")
    assert np.mean([users[a] == users[b] for a, b in itertools.pairwise(plain)]) < 0.6


def test_max_steps_per_epoch_and_the_last_small_step_are_counted() -> None:
    settings = TrainingSettings(epochs=1, batch_size=2, gradient_accumulation_steps=4)
    assert settings.steps_per_epoch(17) == 3
    limited = TrainingSettings(epochs=1, batch_size=2, gradient_accumulation_steps=4, max_steps_per_epoch=2)
    assert limited.steps_per_epoch(17) == 2
