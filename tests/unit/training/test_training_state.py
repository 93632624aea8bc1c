"""Whatever optimizers and schedulers hold goes through tensors and JSON and comes back the same."""

import json
import random
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
import torchao.optim
from torch import nn
from torch.optim import lr_scheduler
from torchtune.training.lr_schedulers import get_cosine_schedule_with_warmup

from personas_tune.adapters.bank import AdapterBank
from personas_tune.training.fit import AdapterJob
from personas_tune.training.state import (
    flatten_state,
    job_state,
    process_state,
    restore_job,
    restore_process,
    unflatten_state,
)

STATE = {
    "text": "é", "none": None, "yes": True, "betas": (0.9, 0.1 + 0.2), "nested": [{"a": (1, [2])}, {}],
    3: {"counter": Counter({4: 2})}, "large": float("inf"), "count": torch.tensor(7.0),
    "half": torch.tensor([1.5, 2.5], dtype=torch.bfloat16), "codes": torch.tensor([1, 255], dtype=torch.uint8),
}  # fmt: skip


def through_json(state):
    tensors = {}
    plain = json.loads(json.dumps(flatten_state(state, "state", tensors)))
    return unflatten_state(plain, tensors)


def assert_same(one, other):
    """Equal in values, types, order of keys and every bit of the tensors."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        if hasattr(one, "__tensor_flatten__"):
            for part in one.__tensor_flatten__()[0]:
                assert_same(getattr(one, part), getattr(other, part))
        else:
            assert (one.dtype, one.device) == (other.dtype, other.device)
            assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    else:
        assert one == other


def test_a_state_comes_back_with_its_types():
    assert_same(through_json(STATE), STATE)


def test_tensors_are_copies():
    """The training goes on while they are written."""
    tensor = torch.ones(2)
    tensors = {}
    flatten_state({"a": tensor}, "state", tensors)
    tensor.zero_()
    assert tensors["state/a"].tolist() == [1, 1]


@pytest.mark.parametrize("value", [{1, 2}, object(), {(1, 2): 3}, lambda: None, np.float32(1)])
def test_what_is_neither_tensor_nor_plain_is_named(value):
    with pytest.raises(TypeError, match=r"^state/b/0 is a "):
        flatten_state({"b": [value]}, "state", {})


def test_a_file_cannot_name_just_any_type():
    with pytest.raises(TypeError, match=r"os\.system is no known tensor type"):
        unflatten_state({"made_of": {}, "about": [], "type": "os.system"}, {})


class HalfMomentum(torch.optim.Optimizer):
    """Keeps its state in another dtype than the weights, which torch's own loading would change."""

    def __init__(self, weights, lr):
        super().__init__(weights, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for weight in self.param_groups[0]["params"]:
            momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight, dtype=torch.bfloat16))
            momentum.mul_(0.9).add_(weight.grad.bfloat16())
            weight.add_(momentum.float(), alpha=-self.param_groups[0]["lr"])


class Noisy(torch.optim.SGD):
    """Draws random numbers in its steps, as stochastic rounding does."""

    @torch.no_grad()
    def step(self, closure=None):
        for weight in self.param_groups[0]["params"]:
            weight.add_(torch.randn_like(weight), alpha=1e-3)
        return super().step(closure)


OPTIMIZERS = {
    "AdamW": torch.optim.AdamW,
    "AdamW fused": partial(torch.optim.AdamW, fused=True),
    "AMSGrad": partial(torch.optim.Adam, amsgrad=True),
    "SGD": torch.optim.SGD,
    "SGD with momentum": partial(torch.optim.SGD, momentum=0.9),
    "Adafactor": torch.optim.Adafactor,
    "RMSprop": partial(torch.optim.RMSprop, centered=True),
    "another dtype": HalfMomentum,
    "noisy": Noisy,
    "8 bit": torchao.optim.AdamW8bit,
    "4 bit": torchao.optim.AdamW4bit,
}
SCHEDULERS = {
    "none": lambda optimizer: None,
    "torchtune's cosine": partial(get_cosine_schedule_with_warmup, num_warmup_steps=3, num_training_steps=8),
    "one cycle": partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=9, cycle_momentum=False),
    "milestones": partial(lr_scheduler.MultiStepLR, milestones=[2, 2, 5]),
    "one after another": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.ConstantLR(optimizer), lr_scheduler.CosineAnnealingLR(optimizer, 5)],
        milestones=[4],
    ),
}
PAIRS = [(name, "torchtune's cosine") for name in OPTIMIZERS] + [("AdamW", name) for name in SCHEDULERS]


class LargeAdapter(nn.Module):
    """Enough weights for 8-bit states."""

    def __init__(self):
        super().__init__()
        from torchtune.modules.peft import LoRALinear

        self.lora = LoRALinear(256, 64, rank=16, alpha=16)


def fresh(optimizer, scheduler):
    bank = AdapterBank(LargeAdapter())
    adapter = bank.add_new("a", seed=0)
    made = OPTIMIZERS[optimizer](adapter.masters.values(), lr=1e-2)
    return bank, AdapterJob("a", [], [], made, SCHEDULERS[scheduler](made))


def take_steps(bank, job, steps):
    """Steps on gradients that depend on the step alone."""
    for step in steps:
        with bank.use("a") as adapter:
            for weight in adapter.masters.values():
                weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))
            job.optimizer.step()
        job.optimizer.zero_grad()
        if job.lr_scheduler is not None:
            job.lr_scheduler.step()
        job.steps_done += 1


@pytest.mark.parametrize(("optimizer", "scheduler"), PAIRS)
def test_a_restored_job_goes_on_to_the_bit(optimizer, scheduler):
    torch.compiler.set_stance("force_eager")  # torchao's optimizers compile their steps
    try:
        bank, job = fresh(optimizer, scheduler)
        take_steps(bank, job, range(3))
        saved = through_json(job_state(bank, job))
        take_steps(bank, job, range(3, 7))

        again, restored = fresh(optimizer, scheduler)
        restore_job(again, restored, saved)
        assert_same(job_state(again, restored), saved)
        take_steps(again, restored, range(3, 7))
        assert_same(job_state(again, restored), job_state(bank, job))
    finally:
        torch.compiler.set_stance("default")


def test_random_generators_go_on_where_they_were():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    draw()
    saved = through_json(process_state())
    expected = draw()
    draw()
    restore_process(saved)
    assert draw() == expected
