"""Who trains what: adapters placed on processes, and processes that share an adapter's rows.

A team is one process with adapters of its own, or several that train the same adapters, each on its
share of every step's rows. Their gradients are summed in the team's first process, the leader, which
takes the optimizer's step and sends the new weights to the others: as many bytes as an all-reduce of
the gradients takes, one optimizer state instead of one each, and weights that can't drift apart.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn

from personas_tune.processes import Processes

Row = TypeVar("Row")


@dataclass(frozen=True)
class Place:
    """What a team is made of.

    Args:
        ranks: Its processes, the leader first.
        adapters: Indices of the adapters that they train.
    """

    ranks: tuple[int, ...]
    adapters: tuple[int, ...]


def place_adapters(n_rows: Sequence[int], n_processes: int, parallel: str) -> list[Place]:
    """Share adapters out among processes, largest first.

    Args:
        n_rows: Of each adapter.
        n_processes: How many there are.
        parallel: ``persona`` puts each adapter on one process, always on the one that has the fewest rows so
            far (the rule of Graham, SIAM J. Appl. Math. 17, 1969: at most 4/3 of the best time). ``data`` and
            ``fsdp`` let all processes share the rows of every adapter. ``auto`` is ``persona``; where there are
            more processes than adapters, those left over go, one by one, to the adapter with the most rows
            per process.

    Returns:
        A team for each process, or for several of them; a process without work is in a team without adapters.

    Example:
        >>> [(place.ranks, place.adapters) for place in place_adapters([9, 5, 4], 2, "auto")]
        [((0,), (0,)), ((1,), (1, 2))]
        >>> [(place.ranks, place.adapters) for place in place_adapters([9, 3], 4, "auto")]
        [((0, 1, 2), (0,)), ((3,), (1,))]
    """
    largest_first = sorted(range(len(n_rows)), key=lambda index: (-n_rows[index], index))
    if parallel in ("data", "fsdp"):
        return [Place(tuple(range(n_processes)), tuple(largest_first))]
    if parallel == "auto" and n_processes > len(n_rows):
        return _share_processes(n_rows, largest_first, n_processes)
    loads = [0] * n_processes
    adapters: list[list[int]] = [[] for _ in loads]
    for index in largest_first:
        lightest = loads.index(min(loads))
        loads[lightest] += n_rows[index]
        adapters[lightest].append(index)
    return [Place((rank,), tuple(mine)) for rank, mine in enumerate(adapters)]


def _share_processes(n_rows: Sequence[int], largest_first: Sequence[int], n_processes: int) -> list[Place]:
    sizes = dict.fromkeys(largest_first, 1)
    for _ in range(n_processes - len(sizes)):
        sizes[max(sizes, key=lambda index: n_rows[index] / sizes[index])] += 1
    starts = [sum(list(sizes.values())[:place]) for place in range(len(sizes))]
    return [
        Place(tuple(range(start, start + size)), (index,))
        for start, (index, size) in zip(starts, sizes.items(), strict=True)
    ]


def shared_adapters(places: Sequence[Place], names: Sequence[str], *, in_step: bool) -> dict[str, str]:
    """Which adapters several processes train together, in words by name: ``2``, or ``2 in step``.

    Args:
        places: From :func:`place_adapters`.
        names: Of all adapters.
        in_step: Whether the processes share the base's layers.
    """
    return {
        names[index]: f"{len(place.ranks)} in step" if in_step else str(len(place.ranks))
        for place in places
        for index in place.adapters
        if len(place.ranks) > 1
    }


class Team:
    """A team, as one of its processes sees it; alone by default.

    Its methods wait for all of its processes, and raise RuntimeError if one is gone.

    Args:
        ranks: Its processes, the leader first.
        rank: This one.
        group: Their process group; None if this one is alone.
        in_step: Whether all of its processes must run the same passes, since they share the base's layers.
    """

    def __init__(
        self,
        ranks: Sequence[int] = (0,),
        rank: int = 0,
        group: distributed.ProcessGroup | None = None,
        *,
        in_step: bool = False,
    ) -> None:
        self.ranks = tuple(ranks)
        self.index = self.ranks.index(rank)
        self._group = group
        self._in_step = in_step and len(self.ranks) > 1

    @property
    def leads(self) -> bool:
        """Whether this process takes the optimizer's steps."""
        return self.index == 0

    @property
    def size(self) -> int:
        """How many processes it has."""
        return len(self.ranks)

    def share(self, rows: Sequence[Row]) -> Sequence[Row]:
        """This process's part of a step's rows: neighbours, as many as the others have, or one more or less."""
        size = len(self.ranks)
        return rows[len(rows) * self.index // size : len(rows) * (self.index + 1) // size]

    @property
    def agree(self) -> Callable[[list[int]], list[int]] | None:
        """Largest of all processes' shapes of passes, where they must run the same ones (see ``backward_rows``)."""
        return self._largest if self._in_step else None

    def add_up(self, weights: Iterable[nn.Parameter], total: float) -> float:
        """Sum the processes' gradients into the leader's ``grad``, and a number beside them.

        Returns:
            The sum of ``total``, in every process.
        """
        if self._group is None:
            return total
        for weight in weights:
            if weight.grad is None:  # a share without rows
                weight.grad = torch.zeros_like(weight)
            distributed.reduce(weight.grad, self.ranks[0], group=self._group)
        return self.sums([total])[0]

    def sums(self, numbers: Sequence[float]) -> list[float]:
        """The sum of each number over the processes, fp64."""
        if self._group is None:
            return list(numbers)
        tensor = torch.tensor(numbers, dtype=torch.float64)
        distributed.all_reduce(tensor, group=self._group)
        return list(tensor.tolist())

    def spread(self, weights: Iterable[Tensor]) -> None:
        """Send the leader's weights to the others."""
        if self._group is None:
            return
        for weight in weights:
            distributed.broadcast(weight.data, self.ranks[0], group=self._group)

    def follow_leader(self, number: int | None) -> int | None:
        """What the leader says, in every process; not negative."""
        if self._group is None:
            return number
        said = torch.tensor(-1 if number is None else number)
        distributed.broadcast(said, self.ranks[0], group=self._group)
        return None if said.item() < 0 else int(said.item())

    def _largest(self, shape: list[int]) -> list[int]:
        length = torch.tensor(len(shape))
        distributed.all_reduce(length, distributed.ReduceOp.MAX, group=self._group)
        shapes = torch.tensor(shape + [0] * (int(length) - len(shape)))
        distributed.all_reduce(shapes, distributed.ReduceOp.MAX, group=self._group)
        return list(shapes.tolist())


def form_team(places: Sequence[Place], processes: Processes, *, in_step: bool = False) -> tuple[Team, Place]:
    """This process's team and place; every process calls it.

    Args:
        places: From :func:`place_adapters`, the same in all processes.
        processes: All of them.
        in_step: Whether the processes share the base's layers.
    """
    mine = next(place for place in places if processes.rank in place.ranks)
    group = None
    for place in places:
        if len(place.ranks) > 1:
            made = distributed.new_group(list(place.ranks))
            group = made if place is mine else group
    return Team(mine.ranks, processes.rank, group, in_step=in_step), mine
