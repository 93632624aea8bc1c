"""How much memory training and evaluation take, found by running them without numbers.

On torch's meta device tensors have shapes and types but no data. Passes of the training's and the evaluation's own
code run there in a second, whatever the model, its adapters or the checkpointing, and every storage that they make is
counted from its making until it is let go (``live_bytes.py``); so does a step of the optimizer. Weights and optimizer
states are counted from shapes.

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
from personas_tune.training.batches import Plan, plan_passes, plan_prompts, plan_tree_round
from personas_tune.training.forward import fp32_head
from personas_tune.training.live_bytes import LiveBytes, peak_of
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
        passes: The most that a pass holds beside these: activations, keys and values of prefixes, logits, gradients;
            or what the optimizer's step does, if that is more.
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
        n_tokens: Of a prompt.
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


def optimizer_step_bytes(
    network: nn.Module, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], *, on_gpu: bool
) -> int:
    """The most bytes that a step holds beside an adapter's weights, their gradients and the optimizer's state.

    Args:
        network: From :func:`~personas_tune.adapters.base_model.build_on_meta`, its base frozen.
        make: Makes the optimizer for some weights.
        on_gpu: There torch's optimizers step on all weights at once, unless they are told not to.
    """
    shapes = [weight.shape for weight in network.parameters() if weight.requires_grad]
    weights = [nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
    optimizer = make(weights)
    for group in optimizer.param_groups:
        if on_gpu and group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True
    for weight in weights:
        weight.grad = torch.empty_like(weight)
    optimizer.step()  # makes the state
    state = [value for value in tree_leaves(dict(optimizer.state)) if isinstance(value, Tensor)]
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    with LiveBytes([*weights, *gradients, *state], torch.device("meta")) as live:
        optimizer.step()
    return int(live.peak)


def gathered_bytes(network: nn.Module) -> int:
    """The most that FSDP has of a base whole at a time: what lies outside its layers, a layer, and the next one.

    Args:
        network: Not quantised; its layers are the units of :func:`~personas_tune.adapters.sharding.shard`.
    """
    layers = [size_of_weights(layer) for layer in network.get_submodule("layers").children()]
    return size_of_weights(network) - sum(layers) + 2 * max(layers)


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
        n_tokens: Of a prompt.
        answers: The labels' answers.

    Returns:
        Groups, each a list of prompts, each a list of a row for each answer; and how many prompts a pass has.
    """
    n_prefix = round(PREFIX_SHARE * n_tokens)
    n_users = max_tokens // n_tokens + 1
    n_prompts = max_tokens // (n_tokens - n_prefix) + 1
    of_users = [[user + 1] * n_tokens for user in range(n_users)]
    of_one = [[0] * n_prefix + [n + 1] * (n_tokens - n_prefix) for n in range(n_prompts)]
    return [_first_read(prompts, max_tokens, answers) for prompts in (of_users, of_one)]


def _first_read(
    prompts: Sequence[list[int]], max_tokens: int, answers: Sequence[Sequence[int]]
) -> tuple[list[list[list[TokenRow]]], int]:
    """What is read first of prompts, up to the first pass of a group."""
    groups, per_pass = next(plan_prompts(prompts, sum(len(answer) for answer in answers), max_tokens))
    chosen = [[prompts[index] for index in group[:per_pass]] for group in groups]
    return [
        [[TokenRow([*prompt, *answer], len(prompt)) for answer in answers] for prompt in group] for group in chosen
    ], per_pass


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


def _row(branch: int, n_tokens: int) -> TokenRow:
    """A row whose prefix all rows have, and whose branch begins with a token of its own; its answer has two."""
    n_prefix = round(PREFIX_SHARE * n_tokens)
    return TokenRow([0] * n_prefix + [branch + 1] * (n_tokens - n_prefix - 2) + [1, 2], n_tokens - 2)
