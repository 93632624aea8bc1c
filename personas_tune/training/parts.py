"""The parts that a process has in a checkpoint: the state of each adapter that it trains, and its own."""

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from personas_tune.adapters.bank import AdapterBank
from personas_tune.training.checkpoints import Checkpoint, Part
from personas_tune.training.fit import AdapterJob
from personas_tune.training.state import job_state, process_state, restore_job, restore_process
from personas_tune.training.teams import Team


def parts_of(bank: AdapterBank, jobs: Sequence[AdapterJob], team: Team, rank: int) -> list[Part]:
    """What one process keeps. An adapter is kept by its team's leader; the others have only a random stream of it.

    Args:
        bank: Holds the adapters that the jobs name.
        jobs: Of this process.
        team: The processes that train these adapters together.
        rank: This process's.
    """
    parts = [Part(_name_of_process(rank), process_state)]
    for job in jobs:
        state = partial(job_state, bank, job) if team.leads else partial(_stream, bank, job)
        parts.append(Part(_name(job, team.index), state, job.steps_done))
    return parts


def restore_parts(bank: AdapterBank, jobs: Sequence[AdapterJob], team: Team, rank: int, start: Checkpoint) -> None:
    """Put jobs, adapters and this process into the state of a checkpoint; arguments as of :func:`parts_of`.

    Raises:
        CheckpointError: If one of the parts can't be read.
    """
    for job in jobs:
        restore_job(bank, job, start.read(_name(job, 0)), leads=team.leads)
        if not team.leads:
            bank[job.name].rng = start.read(_name(job, team.index))
    if _name_of_process(rank) in start.parts:  # a checkpoint of fewer processes has fewer of them
        restore_process(start.read(_name_of_process(rank)))


def _name(job: AdapterJob, stream: int) -> str:
    return f"adapter_{job.adapter}" + (f"_stream_{stream}" if stream else "")


def _name_of_process(rank: int) -> str:
    return f"process_{rank}"


def _stream(bank: AdapterBank, job: AdapterJob) -> dict[str, Tensor]:
    return bank[job.name].rng
