"""How much memory training and evaluation take, found by running them without numbers.

On torch's meta device tensors have shapes and types but no data. Passes of the training's and the evaluation's own
code run there in a second, whatever the model, its adapters or the checkpointing, and every storage that they make is
counted from its making until it is let go (``live_bytes.py``). Weights and optimizer states are counted from shapes.

What is left out: what the device's own library takes (:data:`CUDA_BYTES`), kernels' scratch memory, and what the
allocator loses in between.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from personas_tune.adapters.bank import AdapterBank
from personas_tune.adapters.base_model import size_of_weights
from personas_tune.datasets.tokens import TokenRow
from personas_tune.training.batches import Plan, plan_passes, plan_tree_round
from personas_tune.training.forward import fp32_head
from personas_tune.training.live_bytes import peak_of
from personas_tune.training.shared_prefix import PrefixReader, obstacle, run_passes

CUDA_BYTES = 1_000_000_000  # of a GPU, for CUDA's context, cuBLAS and what the allocator loses: assumed, not counted
PREFIX_SHARE = 0.75  # of a row: 600 of 800 tokens in the paper's shape
MASTER_BYTES = 4  # fp32


@dataclass(frozen=True)
class Memory:
    """Bytes on the device that a base runs on.

    Args:
        base: Its frozen weights and tables of positions.
        adapters: fp32 weights of all adapters that lie there.
        optimizer: Their optimizers' states.
        working: The copy that the model runs with, and the fp32 gradient of the adapter at work.
        passes: The most that a pass holds beside these: activations, keys and values of prefixes, logits, gradients.
    """

    base: int
    adapters: int
    optimizer: int
    working: int
    passes: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.base + self.adapters + self.optimizer + self.working + self.passes


def held_memory(network: nn.Module, *, n_adapters: int, state_bytes: float, trains: bool) -> Memory:
    """What lies on the device between passes.

    Args:
        network: From :func:`~personas_tune.adapters.base_model.build_on_meta`.
        n_adapters: That lie on the device: all of a set, or one where the others wait in CPU memory.
        state_bytes: Of the optimizer, for a weight; AdamW's two moments are 8.
        trains: Whether adapters are trained, or only used.
    """
    n_weights = AdapterBank(network).n_parameters
    working = sum(weight.nbytes for weight in network.parameters() if weight.requires_grad)
    return Memory(
        base=size_of_weights(network) + sum(buffer.nbytes for buffer in network.buffers()),
        adapters=MASTER_BYTES * n_weights * n_adapters,
        optimizer=round(state_bytes * n_weights * n_adapters) if trains else 0,
        working=working + (MASTER_BYTES * n_weights if trains else 0),
        passes=0,
    )


def training_passes(
    network: nn.Module, *, batch_size: int, rows_per_user: int, n_tokens: int, share: bool, loss_fn: nn.Module
) -> int:
    """The most bytes that a training pass holds beside what :func:`held_memory` counts.

    Args:
        network: From :func:`~personas_tune.adapters.base_model.build_on_meta`.
        batch_size: Rows of a pass.
        rows_per_user: Of a step, which may share a prefix.
        n_tokens: Of a row.
        share: Whether prefixes are shared where they can be.
        loss_fn: The training's.
    """
    AdapterBank(network)  # freezes the rest
    plans = training_plans(batch_size, rows_per_user, n_tokens, share=share and obstacle(network) is None)
    return max(peak_of(network, partial(train_once, network, plan, loss_fn)) for plan in plans)


def evaluation_passes(network: nn.Module, *, max_tokens: int, n_tokens: int, answers: Sequence[Sequence[int]]) -> int:
    """The most bytes that an evaluation pass holds beside what :func:`held_memory` counts.

    Args:
        network: From :func:`~personas_tune.adapters.base_model.build_on_meta`.
        max_tokens: Of prefixes and one pass of what follows them (``evaluation.max_tokens_per_forward``).
        n_tokens: Of a row.
        answers: The labels' answers in tokens.
    """
    groups = evaluation_groups(max_tokens, n_tokens, answers)
    return max(peak_of(network, partial(predict_once, network, group, n_rows)) for group, n_rows in groups)


def optimizer_state_bytes(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> float:
    """Bytes of state that an optimizer keeps for a weight, found by letting it step on a small matrix.

    Args:
        make: Makes the optimizer for some weights.
    """
    weight = nn.Parameter(torch.zeros(64, 64))
    optimizer = make([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    state = [value for value in tree_leaves(dict(optimizer.state[weight])) if isinstance(value, Tensor)]
    return sum(value.nbytes for value in state if value.numel() > 1) / weight.numel()


def training_plans(batch_size: int, rows_per_user: int, n_tokens: int, *, share: bool) -> list[Plan]:
    """The passes that may be the largest of a step: whole rows of users that have one each, and rows that share.

    Args:
        batch_size: Rows of a pass.
        rows_per_user: Rows that share a prefix.
        n_tokens: Of a row.
        share: Whether they do.
    """
    plan = partial(plan_passes, pad_id=0, rows_per_pass=batch_size)
    alone = plan([_row(0, n_tokens) for _ in range(batch_size)], [str(n) for n in range(batch_size)], share=False)
    if not share or rows_per_user == 1:
        return [alone]
    n_users, of_user = max(1, batch_size // rows_per_user), min(rows_per_user, 2 * batch_size)
    rows = [_row(n, n_tokens) for _ in range(n_users) for n in range(of_user)]
    return [alone, plan(rows, [str(user) for user in range(n_users) for _ in range(of_user)], share=True)]


def evaluation_groups(
    max_tokens: int, n_tokens: int, answers: Sequence[Sequence[int]]
) -> list[tuple[list[list[list[TokenRow]]], int]]:
    """The groups of prompts that may take the most: many users with a prompt each, and one with many prompts.

    Args:
        max_tokens: As for :func:`evaluation_passes`, as are the others.
        n_tokens: Of a row.
        answers: The labels' answers.

    Returns:
        Groups, each a list of prompts, each a list of a row for each answer; and how many prompts a pass has.
    """
    n_answer = sum(len(answer) for answer in answers)
    n_users = max(1, max_tokens // (n_tokens + n_answer))
    width = round(n_tokens * (1 - PREFIX_SHARE)) + n_answer
    n_prompts = max(1, (max_tokens - round(n_tokens * PREFIX_SHARE)) // width)
    single = [[_rows_of_prompt(user, n_tokens, answers)] for user in range(n_users)]
    return [(single, n_users), ([[_rows_of_prompt(n, n_tokens, answers) for n in range(n_prompts)]], n_prompts)]


def train_once(network: nn.Module, plan: Plan, loss_fn: nn.Module) -> None:
    """Run passes of a step, forward and backward."""
    network.train()
    run_passes(network, plan, loss_fn, partial(_forget_gradients, network))


@torch.no_grad()
def predict_once(network: nn.Module, groups: Sequence[Sequence[Sequence[TokenRow]]], rows_per_pass: int) -> None:
    """Read prefixes, and what follows them."""
    network.eval()
    with PrefixReader(network) as reader, fp32_head(network):
        part = plan_tree_round(groups, rows_per_pass, 0)
        reader.read(part.prefixes)
        for batch in part.batches:
            reader.place_logits(batch).logsumexp(-1)


def _forget_gradients(network: nn.Module) -> None:
    for weight in network.parameters():
        weight.grad = None


def _row(branch: int, n_tokens: int, answer: Sequence[int] = (1, 2)) -> TokenRow:
    """A row whose prefix all rows have, and whose branch begins with a token of its own."""
    n_prefix = round(PREFIX_SHARE * n_tokens)
    tokens = [0] * n_prefix + [branch + 1] * (n_tokens - n_prefix - len(answer)) + list(answer)
    return TokenRow(tokens, len(tokens) - len(answer))


def _rows_of_prompt(branch: int, n_tokens: int, answers: Sequence[Sequence[int]]) -> list[TokenRow]:
    prompt = _row(branch, n_tokens).prompt
    return [TokenRow([*prompt, *answer], len(prompt)) for answer in answers]
