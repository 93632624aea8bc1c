"""Which adapter takes the next step, and where the others wait."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer


@dataclass(frozen=True)
class Progress:
    """How far an adapter's training is, in optimizer steps."""

    steps_done: int
    n_steps: int
    steps_per_epoch: int


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


def checkpoint_turns(teams: Sequence[Sequence[Progress]], schedule: str, every: int | None) -> set[int]:
    """After which turns of a run a checkpoint is due; in a turn every team takes one step, if it has one left.

    Every process finds the same without asking the others.

    Args:
        teams: The adapters of each team, largest first.
        schedule: As for :func:`next_in_turn`.
        every: A checkpoint each time that so many steps have been taken, over all teams. None: whenever no
            adapter of the team with the most steps left is in the middle of an epoch.

    Returns:
        Turns, from 1 on; never the last one.
    """
    lengths = [sum(each.n_steps - each.steps_done for each in team) for team in teams]
    if every is not None:
        n_before = sum(each.steps_done for team in teams for each in team)
        taken = [n_before + sum(min(turn, length) for length in lengths) for turn in range(max(lengths, default=0))]
        return {turn for turn in range(1, len(taken)) if taken[turn] // every > taken[turn - 1] // every}
    longest = teams[lengths.index(max(lengths))] if teams else []
    return set(_between_epochs(longest, schedule))


def _between_epochs(adapters: Sequence[Progress], schedule: str) -> Iterator[int]:
    done = [each.steps_done for each in adapters]
    n_steps = [each.n_steps for each in adapters]
    turn = 0
    while (index := next_in_turn(done, n_steps, schedule)) is not None:
        done[index] += 1
        turn += 1
        if done != n_steps and all(n % each.steps_per_epoch == 0 for n, each in zip(done, adapters, strict=True)):
            yield turn


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
