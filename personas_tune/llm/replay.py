"""Runs a chain on the answers that are already there, up to the first call that has none."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol

from personas_tune.llm.calls import Call, Chain, Rejected, Result


class Answers(Protocol):
    """Where delivered answers are kept."""

    def answers(self, request: str) -> Sequence[str]:
        """Bodies of the delivered answers to the request of that sha256, oldest first."""


@dataclass(frozen=True)
class Finished(Generic[Result]):
    """A chain of which every call has a usable answer."""

    result: Result


@dataclass(frozen=True)
class Waiting:
    """A chain that can't go on.

    Args:
        call: The first call without a usable answer.
        complaints: What was wrong with each answer that it has, oldest first.
    """

    call: Call
    complaints: tuple[str, ...]


def replay(chain: Chain[Result], answers: Answers) -> Finished[Result] | Waiting:
    """Run a chain on journalled answers alone.

    The first usable answer to a call counts, so that a chain takes the same way every time.
    """
    try:
        call = next(chain)
        while True:
            usable, read, complaints = read_first_usable(call, answers.answers(call.request.sha256))
            if not usable:
                chain.close()
                return Waiting(call, tuple(complaints))
            call = chain.send(read)
    except StopIteration as stop:
        return Finished(stop.value)


def read_first_usable(call: Call, bodies: Iterable[str]) -> tuple[bool, object, list[str]]:
    """Whether one of the answers is usable, what was read from it, and the complaints about those before it."""
    complaints: list[str] = []
    for body in bodies:
        try:
            return True, call.read(body), complaints
        except Rejected as rejected:
            complaints.append(str(rejected))
    return False, None, complaints


def finished_chains(
    chains: Iterable[tuple[str, Chain[Result]]], answers: Answers, *, leave_out: Iterable[str] = ()
) -> Iterator[Result]:
    """The results of chains that are all answered, in their order, those of the names left out passed over.

    Raises:
        AssertionError: If a chain has an unanswered call: its caller should have seen to that.
    """
    left_out = set(leave_out)
    for name, chain in chains:
        if name in left_out:
            chain.close()
            continue
        outcome = replay(chain, answers)
        assert isinstance(outcome, Finished), f"{name} is not finished"
        yield outcome.result
