"""Steps of several adapters: whichever order they take, each is trained as if alone."""

import gc
from dataclasses import replace

import pytest
import torch
from small_training import N_ROWS, N_STEPS, SETTINGS, small_job, small_model, small_training
from test_training_state import assert_same
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from personas_tune.adapters.bank import AdapterBank
from personas_tune.training import fit
from personas_tune.training.fit import TrainingSettings, check_first_group, put_to_wait, settle_sharing, train_steps
from personas_tune.training.schedule import Progress
from personas_tune.training.self_check import SharingCheck

ORDERS = {
    "one_by_one": ["set/0"] * 8 + ["set/1"] * 4,
    "interleaved": ["set/0", "set/1", "set/0"] * 4,
}


@pytest.mark.parametrize("schedule", ORDERS)
def test_a_bank_ends_as_each_of_its_adapters_alone_whatever_the_schedule(schedule):
    settings = replace(SETTINGS, schedule=schedule)
    training = small_training(settings)
    assert [report.adapter for report in training.steps()] == ORDERS[schedule]
    for name, state in training.state().items():
        assert_same(small_training(names=(name,)).to_the_end()[name], state)


def test_an_optimizer_that_draws_random_numbers_doesnt_mix_up_the_adapters():
    from test_training_state import Noisy

    together = small_training(replace(SETTINGS, schedule="interleaved"), optimizer=Noisy).to_the_end()
    torch.rand(5)
    assert_same(small_training(names=("set/1",), optimizer=Noisy).to_the_end()["set/1"], together["set/1"])


def test_the_largest_adapter_comes_first():
    assert next(iter(small_training(names=("set/1", "set/0")).steps())).adapter == "set/0"


@pytest.mark.parametrize("schedule", ORDERS)
def test_waiting_in_cpu_memory_changes_no_bit(schedule):
    settings = replace(SETTINGS, schedule=schedule)
    training = small_training(replace(settings, offload_waiting=True))
    for job in training.jobs:
        put_to_wait(training.bank, job)
    assert_same(training.to_the_end(), small_training(settings).to_the_end())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("schedule", ORDERS)
def test_only_the_adapter_at_work_lies_on_the_gpu(schedule):
    settings = replace(SETTINGS, schedule=schedule)
    expected = small_training(settings, model=small_model().cuda()).to_the_end()
    training = small_training(replace(settings, offload_waiting=True), model=small_model().cuda())
    for job in training.jobs:
        put_to_wait(training.bank, job)
    for report in training.steps():
        lies_on = {name: next(iter(training.bank[name].masters.values())).device.type for name in N_ROWS}
        assert lies_on == {name: "cuda" if name == report.adapter else "cpu" for name in N_ROWS}
    for name, state in training.state().items():
        for key, weight in state["weights"].items():
            assert torch.equal(weight.cpu(), expected[name]["weights"][key].cpu()), key


def test_a_step_changes_every_weight_of_its_adapter_and_no_bit_of_the_others():
    training = small_training(replace(SETTINGS, schedule="interleaved"))
    before = {name: training.bank[name].state_dict() for name in N_ROWS}
    for number, report in enumerate(training.steps()):
        for name in N_ROWS:
            for key, weight in training.bank[name].state_dict().items():
                # B begins at zero: A has no gradient before the second step; the warm-up begins at a rate of zero.
                if name != report.adapter or report.learning_rate == 0:
                    assert torch.equal(weight, before[name][key]), (number, name, key)
                elif "lora_b" in key or report.step > 2:
                    assert not torch.equal(weight, before[name][key]), (number, name, key)
            before[name] = training.bank[name].state_dict()
    assert number == N_STEPS - 1


def test_looking_whether_prefixes_may_be_shared_changes_no_bit_and_finds_the_same_later():
    training = small_training()
    found = check_first_group(training.model, training.bank, training.jobs, nn.CrossEntropyLoss(), SETTINGS, 0)
    assert found.n_rows > 0
    assert found.problem is None
    assert_same(training.to_the_end(), small_training().to_the_end())
    again = small_training()
    assert check_first_group(again.model, again.bank, again.jobs, nn.CrossEntropyLoss(), SETTINGS, 0) == found


def settled(settings, training):
    return settle_sharing(training.model, training.bank, training.jobs, nn.CrossEntropyLoss(), settings, 0)


def test_sharing_stays_on_only_where_it_gives_the_same_gradients(monkeypatch):
    assert settled(SETTINGS, small_training()) == SETTINGS
    monkeypatch.setattr(fit, "check_first_group", lambda *_: SharingCheck(4, difference=0.5, tolerance=0.1))
    with pytest.warns(UserWarning, match=r"4 rows differ .*; training goes on without sharing"):
        assert settled(SETTINGS, small_training()) == replace(SETTINGS, prefix_sharing="off")
    off = replace(SETTINGS, prefix_sharing="off")
    assert settled(off, small_training()) is off


def test_a_finished_job_says_what_it_was_trained_on():
    training = small_training()
    training.to_the_end()
    first = training.jobs[0]
    assert first.adapter == "0"
    assert first.record == {"rows": 14, "steps": 8, "validation_losses": first.validation_losses}
    assert len(first.validation_losses) == 2
    assert SETTINGS.progress(14, 8) == Progress(steps_done=8, n_steps=8, steps_per_epoch=4)


def test_reports_count_steps_epochs_and_rows_and_carry_the_validation_loss():
    training = small_training()
    reports = [report for report in training.steps() if report.adapter == "set/1"]
    assert [(report.step, report.epoch, report.n_rows) for report in reports] == [
        (1, 0, 4), (2, 0, 3), (3, 1, 4), (4, 1, 3),
    ]  # fmt: skip
    measured = [report.validation_loss for report in reports]
    assert [measured[1], measured[3]] == training.jobs[1].validation_losses
    assert measured[0] is measured[2] is None
    assert all(report.seconds > 0 for report in reports)


# Many adapters


def many_adapters(n, optimizer=torch.optim.AdamW):
    settings = TrainingSettings(epochs=1, batch_size=4, gradient_accumulation_steps=1, schedule="interleaved")
    model = small_model(lora_rank=16)
    bank = AdapterBank(model)
    jobs = [small_job(bank, f"set/{index}", settings, optimizer, n_rows=4) for index in range(n)]
    return model, bank, jobs, settings


def bytes_in_tensors():
    """Of all tensors that live in this process, each memory counted once."""
    gc.collect()
    storages = {}
    for each in gc.get_objects():
        # Compiling, which an earlier test did, leaves tensors without memory.
        if issubclass(type(each), torch.Tensor) and each.untyped_storage().device.type != "meta":
            storages[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
    return sum(storages.values())


def test_64_adapters_take_the_base_and_64_times_weights_and_optimizer_state():
    empty = bytes_in_tensors()
    model, bank, jobs, settings = many_adapters(64)
    base = sum(weight.numel() * 4 for weight in model.parameters()) + sum(b.numel() * 4 for b in model.buffers())
    for _ in train_steps(model, bank, jobs, nn.CrossEntropyLoss(), settings, pad_id=0):
        pass
    each = bank.n_parameters * 4 * 3  # weights and AdamW's two moments
    small = 6000 * 64  # random state: 5 kB; counts of steps
    taken = bytes_in_tensors() - empty
    assert base + 64 * each <= taken <= base + 64 * each + small + base // 10
    assert 64 * each > 2 * base  # else this would say nothing


class CountedOperations(TorchDispatchMode):
    """Counts every operation on tensors."""

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += 1
        return func(*args, **(kwargs or {}))


def test_a_row_takes_as_many_operations_among_64_adapters_as_among_4():
    per_row = []
    for n in (4, 64):
        model, bank, jobs, settings = many_adapters(n)
        with CountedOperations() as counted:
            rows = sum(r.n_rows for r in train_steps(model, bank, jobs, nn.CrossEntropyLoss(), settings, pad_id=0))
        assert rows == 4 * n
        per_row.append(counted.n / rows)
    assert per_row[0] == pytest.approx(per_row[1], rel=1e-3)
