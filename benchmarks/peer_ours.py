"""personas_tune's training step, prefixes shared or not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from peer_model import (
    N_ADAPTERS,
    Gradients,
    Machine,
    ModelSize,
    Weights,
    adamw,
    empty_model,
    restore,
    taken_gradients,
)
from rows import PAD_ID
from torch import nn
from torch.optim import Optimizer
from torchtune import training
from torchtune.modules import TransformerSelfAttentionLayer

from personas_tune.adapters.bank import AdapterBank
from personas_tune.datasets import TokenRow
from personas_tune.training.fit import AdapterJob, TrainingSettings, train_steps
from personas_tune.training.shared_prefix import backward_rows

LOSS = nn.CrossEntropyLoss()
NAMES = [f"set/{index}" for index in range(N_ADAPTERS)]


@dataclass(frozen=True)
class Trainee:
    """A base with a bank of adapters and their optimizers, as ``persona_lora`` prepares them."""

    model: nn.Module
    bank: AdapterBank
    optimizers: Mapping[str, Optimizer]
    weights: Weights


def build_trainee(
    size: ModelSize, machine: Machine, weights: Weights, *, checkpointing: bool, compile: bool
) -> Trainee:
    model = empty_model(size, machine)
    bank = AdapterBank(model)
    if checkpointing:
        training.set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})
    model.load_state_dict(weights.base, strict=False)
    if compile:
        training.compile_model(model, verbose=False)
    adapters = {name: bank.add_loaded(name, weights.adapter, where="") for name in NAMES}
    optimizers = {name: adamw(adapter.masters.values()) for name, adapter in adapters.items()}
    return Trainee(model, bank, optimizers, weights)


class Ours:
    """``train_steps`` on adapters that take turns.

    Args:
        trainee: What is trained; several may train the same.
        machine: Where it lies.
        rows: What every adapter trains on.
        rows_per_step: Rows of an optimizer step.
        n_together: How many neighbours of ``rows`` count as one user's rows of a step.
        pass_size: Rows or branches of one forward pass.
        sharing: ``off`` is the plain path.
    """

    def __init__(
        self,
        trainee: Trainee,
        machine: Machine,
        rows: Sequence[TokenRow],
        rows_per_step: int,
        *,
        n_together: int,
        pass_size: int,
        sharing: Literal["auto", "off"],
    ) -> None:
        self.trainee, self.machine, self.n_together = trainee, machine, n_together
        self.settings = TrainingSettings(
            epochs=10**6,
            batch_size=pass_size,
            gradient_accumulation_steps=rows_per_step // pass_size,
            rows_per_user=n_together,
            prefix_sharing=sharing,
            schedule="interleaved",
        )
        jobs = [AdapterJob(name, rows, self._users(rows), trainee.optimizers[name]) for name in NAMES]
        self.steps = train_steps(trainee.model, trainee.bank, jobs, LOSS, self.settings, PAD_ID)

    def _users(self, rows: Sequence[TokenRow]) -> list[str]:
        return [f"{row.tokens[:4]} {index // self.n_together}" for index, row in enumerate(rows)]

    def gradients(self, rows: Sequence[TokenRow]) -> tuple[float, Gradients]:
        n_tokens = sum(len(row.answer) for row in rows)
        self.trainee.model.train()
        restore(self.trainee.bank[NAMES[0]].masters, self.trainee.weights)
        with self.trainee.bank.use(NAMES[0]) as adapter:
            total = backward_rows(
                self.trainee.model, rows, self._users(rows), LOSS, pad_id=PAD_ID, sharing=self.settings.prefix_sharing,
                branches_per_pass=self.settings.batch_size,
                on_gradients=lambda: self.trainee.bank.take_gradients(1 / n_tokens),
            )  # fmt: skip
        return total / n_tokens, taken_gradients(adapter.masters)

    def step(self) -> float:
        start = self.machine.clock()
        next(self.steps)
        return self.machine.clock() - start
