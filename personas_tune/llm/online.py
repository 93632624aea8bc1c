"""Runs chains of calls against a server: side by side, each in its order, so that no paid answer is lost."""

import asyncio
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from personas_tune.errors import Interrupted, ServerError
from personas_tune.llm.asking import Asker, Incomplete, Refused, Spoilt
from personas_tune.llm.budget import Budget
from personas_tune.llm.calls import Call, Chain
from personas_tune.llm.journal import Journal
from personas_tune.llm.limits import Closed, Gate
from personas_tune.llm.progress import Progress
from personas_tune.llm.replay import read_first_usable
from personas_tune.llm.settings import ServerSettings

REFUSALS_OF_A_WRONG_SETTING = 3  # before any answer
MOST_SPOILT = 10  # users whose answers were all rejected, before any usable one; a user is some paid answers
LOOK_EVERY_S = 0.05


def run_online(
    chains: Iterable[tuple[str, Chain[object]]],
    *,
    journal: Journal,
    server: ServerSettings,
    max_tries: int,
    n_calls: int | None,
    what: str,
) -> dict[str, str]:
    """Get every call of every chain answered.

    Answers in the journal are used and never asked for again. SIGINT and SIGTERM let the calls in flight
    come back first; a second one stops at once.

    Args:
        chains: By the names of their users. Pulled one by one as there is room.
        journal: Keeps every attempt.
        server: Who is asked.
        max_tries: How many answers to one call may be asked for in this run.
        n_calls: How many calls there are, if that is known; for the progress bar alone.
        what: Names the work on the progress bar.

    Returns:
        Why a chain is unfinished, by its name; in their order.

    Raises:
        ServerError: If the server can't be used at all.
        BudgetError: If the budget is spent.
        Interrupted: If a signal came.
    """
    before = journal.totals(server.model)
    budget = Budget(server.prices, server.max_usd, server.max_tokens, before, server.section)
    with Progress(what, n_calls, budget) as progress:
        return asyncio.run(_run_all(chains, journal, server, max_tries, budget, progress))


async def _run_all(
    chains: Iterable[tuple[str, Chain[object]]],
    journal: Journal,
    server: ServerSettings,
    max_tries: int,
    budget: Budget,
    progress: Progress,
) -> dict[str, str]:
    gate = Gate(server, budget, kept_in=str(journal.path))
    asker = Asker(server, journal, gate, progress)
    run = Run(enumerate(chains), journal, gate, asker, max_tries, progress)
    try:
        with _signals_to(run.on_signal):
            await run.work_off(server.concurrency)
            await journal.settle()
    finally:
        await asker.close()
        if isinstance(chains, Generator):
            chains.close()
    return run.outcome()


@dataclass
class Run:
    """The workers and what they share.

    Args:
        chains: Numbered, by the names of their users.
        journal: Has the answers.
        gate: To be closed when the run is to stop.
        asker: Gets new answers.
        max_tries: How many answers to one call may be asked for.
        progress: Counts calls.
    """

    chains: Iterator[tuple[int, tuple[str, Chain[object]]]]
    journal: Journal
    gate: Gate
    asker: Asker
    max_tries: int
    progress: Progress
    _workers: list[asyncio.Task[None]] = field(default_factory=list)
    _under_way: dict[str, asyncio.Event] = field(default_factory=dict)
    _incomplete: dict[int, tuple[str, str]] = field(default_factory=dict)
    _refusals: list[Refused] = field(default_factory=list)
    _n_spoilt: int = 0
    _most_spoilt: int = MOST_SPOILT
    _stopped_by: Exception | int | None = None
    _n_signals: int = 0

    async def work_off(self, n_workers: int) -> None:
        """Run all chains, so many at a time, until they are done or the run is stopped."""
        self._most_spoilt = max(3, min(MOST_SPOILT, n_workers))
        self._workers = [asyncio.create_task(self._work()) for _ in range(n_workers)]
        await asyncio.wait(self._workers)

    def on_signal(self, number: int) -> None:
        """Send nothing more; after the second signal, don't wait for what was sent either."""
        self._n_signals += 1
        self._stop(number)
        if self._n_signals > 1:
            for worker in self._workers:
                worker.cancel()

    def outcome(self) -> dict[str, str]:
        """Why chains are unfinished, in their order.

        Raises:
            Exception: Whatever stopped the run.
        """
        if isinstance(self._stopped_by, int):
            raise Interrupted(self._stopped_by, f"{self.progress.share} done, their answers are in {self.journal.path}")
        if self._stopped_by is not None:
            raise self._stopped_by
        if self._refusals and not self._has_answers:
            raise self._refusals[0].error
        return dict(self._incomplete[number] for number in sorted(self._incomplete))

    @property
    def _has_answers(self) -> bool:
        return self.progress.n_done > 0 or self.asker.n_answered > 0

    def _stop(self, reason: Exception | int) -> None:
        if self._stopped_by is None:
            self._stopped_by = reason
            if self.gate.in_flight:
                self.progress.note(f"waiting for {self.gate.in_flight} calls in flight; a second signal stops at once")
        self.gate.close()

    async def _work(self) -> None:
        try:
            while not self.gate.is_closed:
                number, (name, chain) = next(self.chains, _NO_MORE)
                if chain is None:
                    return
                await self._run_chain(number, name, chain)
                await asyncio.sleep(0)  # lets others have a turn, though all answers may have been in the journal
        except Closed:
            return
        except Exception as error:
            self._stop(error)

    async def _run_chain(self, number: int, name: str, chain: Chain[object]) -> None:
        try:
            call = next(chain)
            while True:
                call = chain.send(await self._answer(call))
        except StopIteration:
            return
        except Incomplete as gap:
            self._incomplete[number] = (name, str(gap))
            if isinstance(gap, Refused) and not self._has_answers:
                await self._blame(gap)
            if isinstance(gap, Spoilt):
                self._brake(gap)
        finally:
            chain.close()

    async def _blame(self, refused: Refused) -> None:
        """Find out whether the user or a setting is to blame for a refusal that came before any answer."""
        self._refusals.append(refused)
        while not self._has_answers and self.gate.in_flight:
            await self.gate.nap(LOOK_EVERY_S)
        if not self._has_answers and len(self._refusals) >= REFUSALS_OF_A_WRONG_SETTING:
            raise refused.error

    def _brake(self, spoilt: Spoilt) -> None:
        """Pay for no more answers when it is plain that none can be used."""
        self._n_spoilt += 1
        if self._n_spoilt >= self._most_spoilt and self.progress.n_done == 0:
            what = f"no answer can be used, the last rejection: {spoilt.complaint}"
            remedy = "check the model, max_output_tokens and response_format"
            raise ServerError(what, where=self.asker.where, remedy=remedy)

    async def _answer(self, call: Call) -> object:
        """What the call's ``read`` makes of the first usable answer; users may share a call."""
        name = call.request.sha256
        while name in self._under_way:
            await self._under_way[name].wait()
        over = self._under_way[name] = asyncio.Event()
        try:
            return await self._first_usable(call)
        finally:
            del self._under_way[name]
            over.set()

    async def _first_usable(self, call: Call) -> object:
        usable, answer, complaints = read_first_usable(call, self.journal.answers(call.request.sha256))
        for _ in range(self.max_tries):
            if usable:
                break
            body = await self.asker.ask(call, complaints[-1] if complaints else None)
            usable, answer, complaint = read_first_usable(call, [body])
            complaints += complaint
        if not usable:
            raise Spoilt(len(complaints), complaints[-1])
        self.progress.call_done()
        return answer


_NO_MORE: tuple[int, tuple[str, Chain[object] | None]] = (0, ("", None))


@contextmanager
def _signals_to(handle: Callable[[int], None]) -> Iterator[None]:
    """Hand SIGINT and SIGTERM over, unless they are ignored; in another thread than the main one none arrives."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    taken = {number: old for number, old in before.items() if old not in (signal.SIG_IGN, None)}
    for number in taken:
        loop.add_signal_handler(number, handle, int(number))
    try:
        yield
    finally:
        for number, old in taken.items():
            loop.remove_signal_handler(number)
            signal.signal(number, old)
