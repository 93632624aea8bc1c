"""A training of two small adapters that takes twelve steps in a moment, and what it has come to."""

from dataclasses import dataclass

import torch
from torch import nn
from torchtune.models.phi3 import lora_phi3
from torchtune.training.lr_schedulers import get_cosine_schedule_with_warmup

from personas_tune.adapters.bank import AdapterBank
from personas_tune.datasets import TokenRow
from personas_tune.training.fit import AdapterJob, TrainingSettings, train_steps
from personas_tune.training.state import job_state

# Two epochs of 4 and 2 steps.
SETTINGS = TrainingSettings(
    epochs=2, batch_size=2, gradient_accumulation_steps=2, rows_per_user=2, prefix_sharing="auto", seed=5
)
N_ROWS = {"set/0": 14, "set/1": 7}
N_STEPS = 12


def small_model(**lora):
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 32, "max_seq_len": 64}
    lora = {"lora_rank": 2, "lora_alpha": 4, "lora_dropout": 0.1, **lora}
    return lora_phi3(["q_proj", "k_proj"], **sizes, **lora, intermediate_dim=64)


def some_rows(n, seed):
    """Rows of users u0 to u3 in turn; those of one begin alike."""
    generator = torch.Generator().manual_seed(seed)
    prefixes = [torch.randint(4, 40, (12,), generator=generator).tolist() for _ in range(4)]
    branches = [torch.randint(4, 40, (4 + index % 3,), generator=generator).tolist() for index in range(n)]
    return [TokenRow([*prefixes[i % 4], *branch], 12 + len(branch) - 2) for i, branch in enumerate(branches)]


@dataclass
class SmallTraining:
    """A bank with jobs, ready to be trained."""

    model: nn.Module
    bank: AdapterBank
    jobs: list[AdapterJob]
    settings: TrainingSettings

    def steps(self):
        return train_steps(self.model, self.bank, self.jobs, nn.CrossEntropyLoss(), self.settings, pad_id=0)

    def to_the_end(self):
        for _ in self.steps():
            pass
        return self.state()

    def state(self):
        return {job.name: job_state(self.bank, job) for job in self.jobs}


def small_training(settings=SETTINGS, names=tuple(N_ROWS), model=None, optimizer=torch.optim.AdamW):
    model = model or small_model()
    bank = AdapterBank(model)
    return SmallTraining(model, bank, [small_job(bank, name, settings, optimizer) for name in names], settings)


def small_job(bank, name, settings=SETTINGS, optimizer=torch.optim.AdamW, n_rows=None):
    number = int(name.rpartition("/")[2])
    rows = some_rows(n_rows or N_ROWS[name], seed=number)
    made = optimizer(bank.add_new(name, seed=3).masters.values(), lr=1e-2)
    return AdapterJob(
        name=name,
        rows=rows,
        prefixes=[f"u{index % 4}" for index in range(len(rows))],
        optimizer=made,
        lr_scheduler=get_cosine_schedule_with_warmup(made, 2, settings.n_steps(len(rows))),
        validation_rows=some_rows(3, seed=100 + number),
    )
