"""Runs chains of calls through OpenAI's Batch API, for half the price and within a day a step.

All first calls make a wave, all second calls the next one, and so on. A wave goes in files of at most
50,000 requests and 200 MB (*shards*). Input and output files are left at the server, which lets the input expire.
"""

import sys
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

from personas_tune.errors import Interrupted
from personas_tune.llm.batch_files import Bounds, was_passed_over, write_input_files
from personas_tune.llm.batch_ledger import Ledger, refuse_open_batches
from personas_tune.llm.batch_line import Line
from personas_tune.llm.batch_server import BatchServer
from personas_tune.llm.batch_stop import Stop, Stopped
from personas_tune.llm.batch_work import Work
from personas_tune.llm.budget import Budget
from personas_tune.llm.calls import Call, Chain
from personas_tune.llm.failures import Reply, verdict_on, words_of
from personas_tune.llm.journal import Journal
from personas_tune.llm.replay import Finished, Waiting, replay
from personas_tune.llm.settings import ServerSettings

__all__ = ["refuse_open_batches", "run_batches"]

MOST_REQUESTS, MOST_BYTES = 50_000, 200_000_000  # that OpenAI takes in a file
MOST_FAILURES = 3  # of one call in a run
MOST_PASSED_OVER = 10  # batches in a run that end before a call's turn comes

MakeChains: TypeAlias = Callable[[], Iterable[tuple[str, Chain[object]]]]


def run_batches(
    make_chains: MakeChains,
    *,
    journal: Journal,
    server: ServerSettings,
    max_tries: int,
    folder: Path,
    poll_s: float,
    max_requests: int = MOST_REQUESTS,
    max_bytes: int = MOST_BYTES,
) -> dict[str, str]:
    """Get every call of every chain answered, in waves.

    May be ended at any moment, by whatever means: the next run comes back to the batches that go on at the
    server, and none is made twice. SIGINT and SIGTERM end it without delay.

    Args:
        make_chains: Gives all chains by the names of their users, anew for each wave. Pulled one by one.
        journal: Keeps every answer, and what was sent.
        server: Who is asked. Its bounds on calls in flight and per minute mean nothing here.
        max_tries: How many answers to one call may be asked for in this run.
        folder: Keeps input files until their batches are over.
        poll_s: Time between two looks at the batches under way.
        max_requests: Most requests in a file.
        max_bytes: Most bytes in a file.

    Returns:
        Why a chain is unfinished, by its name; in their order.

    Raises:
        ServerError: If the server turns a batch away or can't be used at all.
        BudgetError: If the budget is spent, once all that is under way was collected.
        Interrupted: If a signal came.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    ledger = Ledger(journal)
    budget = Budget(server.prices, server.max_usd, server.max_tokens, journal.totals(server.model), server.section)
    with Stop() as stop, closing(Line(server, poll_s, stop, _note)) as line:
        waves = Waves(make_chains, journal, ledger, stop, folder, max_tries)
        work = Work(ledger, journal, BatchServer(line, stop), budget, folder, poll_s, stop, _note)
        try:
            bounds = Bounds(max_requests, max_bytes, allows=partial(budget.allows, via="batch"))
            return _run_waves(waves, work, bounds, server.model)
        except Stopped as stopped:
            n_open = len(ledger.shards("creating", "created"))
            raise Interrupted(stopped.signal_number, f"batches that go on at the server: {n_open}") from None


def _note(text: str) -> None:
    print(f"batches: {text}", file=sys.stderr, flush=True)


def _run_waves(waves: "Waves", work: Work, bounds: Bounds, model: str) -> dict[str, str]:
    work.resume()
    incomplete = waves.write_next(bounds)
    if work.is_left:
        work.warn_of_shutdown(model)
    while work.is_left:
        work.work_off()
        incomplete = waves.write_next(replace(bounds, max_tokens=work.most_tokens or bounds.max_tokens))
    return incomplete


class Waves:
    """Finds out what is to be asked next.

    Args:
        make_chains: Gives all chains.
        journal: Has the answers.
        ledger: Takes what is to be asked.
        stop: Ends it.
        folder: Takes the input files.
        max_tries: How many answers to one call may be asked for.
    """

    def __init__(
        self, make_chains: MakeChains, journal: Journal, ledger: Ledger, stop: Stop, folder: Path, max_tries: int
    ) -> None:
        self._make_chains, self._journal, self._ledger = make_chains, journal, ledger
        self._stop, self._folder, self._max_tries = stop, folder, max_tries
        self._newest_before = int(journal.execute("SELECT coalesce(max(id), 0) FROM attempts")[0][0])

    def write_next(self, bounds: Bounds) -> dict[str, str]:
        """Intend the next wave: what each chain waits for, unless it is on its way already.

        Returns:
            Why chains go no further, by their names.
        """
        given_up: dict[str, str] = {}
        wave = self._ledger.wave + 1
        with closing(self._questions(given_up)) as questions:
            for contents in write_input_files(questions, self._folder, bounds):
                self._ledger.add(wave, contents)
        return given_up

    def _questions(self, given_up: dict[str, str]) -> Generator[tuple[Call, str | None], None, None]:
        for name, chain in self._make_chains():
            self._stop.check()
            outcome = replay(chain, self._journal)
            if isinstance(outcome, Finished) or self._ledger.holds(outcome.call.request.sha256):
                continue
            why = self._why_given_up(outcome)
            if why is None:
                yield outcome.call, outcome.complaints[-1] if outcome.complaints else None
            else:
                given_up[name] = why

    def _why_given_up(self, waiting: Waiting) -> str | None:
        """Why this run asks no more for an answer that it waits for; None if it does."""
        replies = self._replies_in_this_run(waiting.call.request.sha256)
        n_answered = sum(reply.status == "answered" for reply in replies)
        if n_answered >= self._max_tries:
            return f"{len(waiting.complaints)} answers rejected, the last: {waiting.complaints[-1]}"
        failures = [reply for reply in replies if reply.status != "answered"]
        if not failures:
            return None
        if verdict_on(failures[-1]) in ("unfit", "refused"):
            return words_of(failures[-1])
        n_passed_over = sum(map(was_passed_over, failures))
        if len(failures) - n_passed_over < MOST_FAILURES and n_passed_over < MOST_PASSED_OVER:
            return None
        return f"no answer in {len(failures)} attempts, the last: {words_of(failures[-1])}"

    def _replies_in_this_run(self, request: str) -> list[Reply]:
        rows = self._journal.execute(
            "SELECT status, http_status, coalesce(response, '') FROM attempts WHERE request = ? AND id > ? ORDER BY id",
            (request, self._newest_before),
        )
        return [Reply(*row) for row in rows]
