"""Which adapter takes the next step, and where the others wait."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer


def next_in_turn(steps_done: Sequence[int], n_steps: Sequence[int], schedule: str) -> int | None:
    """Index of the adapter that takes the next step; None when all are done.

    It depends on the numbers of steps alone, so a resumed training goes on as an unbroken one would.

    Args:
        steps_done: How many steps each adapter has taken.
        n_steps: How many it takes in all.
        schedule: ``one_by_one`` trains an adapter to its end, then the next. ``interleaved`` takes the one
            that has done the smallest share of its steps, so that all come to their ends together;
            of equal ones the first.

    Example:
        >>> next_in_turn([3, 1], [6, 2], "interleaved"), next_in_turn([3, 0], [6, 2], "interleaved")
        (0, 1)
    """
    waiting = [index for index, (done, total) in enumerate(zip(steps_done, n_steps, strict=True)) if done < total]
    if schedule == "one_by_one":
        return min(waiting, default=None)
    return min(waiting, key=lambda index: (steps_done[index] / n_steps[index], index), default=None)


def move_training_state(weights: Iterable[Tensor], optimizer: Optimizer, device: torch.device) -> None:
    """Move an adapter's weights and its optimizer's state; the parameters keep their identity.

    Single numbers, such as a count of steps, stay where they are: they take no room, and optimizers
    are particular about where theirs lie.
    """
    for weight in weights:
        weight.data = weight.data.to(device)
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.dim() > 0:
                state[name] = value.to(device)
