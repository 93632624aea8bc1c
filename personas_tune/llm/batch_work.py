"""Looks after all shards of a job until they are collected."""

import time
from collections.abc import Callable
from pathlib import Path

from openai.types import Batch

from personas_tune.errors import PersonasTuneError, ServerError
from personas_tune.llm.batch_collect import Gain, collect, write_off
from personas_tune.llm.batch_launch import Launcher
from personas_tune.llm.batch_ledger import Ledger, Shard
from personas_tune.llm.batch_line import Unsure
from personas_tune.llm.batch_server import BatchServer
from personas_tune.llm.batch_status import codes_of, is_over, limit_in, n_answered, words_in
from personas_tune.llm.batch_stop import Stop
from personas_tune.llm.budget import Budget
from personas_tune.llm.failures import remedy_for, verdict_on, words_of
from personas_tune.llm.journal import Journal, Usage

OVER_LIMIT = "token_limit_exceeded"
LONGEST_WAIT = 32  # in polls, for room among the enqueued tokens


class Work:
    """The shards of a job, on their way through the Batch API.

    Args:
        ledger: Says how far each has come.
        journal: Takes the answers.
        server: Gives them.
        budget: What the job may spend.
        folder: Where the files lie.
        poll_s: Time between two looks at the batches under way.
        stop: Ends waits.
        note: Tells the user what goes on.

    Attributes:
        most_tokens: How many input tokens a shard may have; no bound is known if None.
    """

    def __init__(
        self, ledger: Ledger, journal: Journal, server: BatchServer, budget: Budget, folder: Path, poll_s: float,
        stop: Stop, note: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.most_tokens: int | None = None
        self._ledger, self._journal, self._server, self._budget = ledger, journal, server, budget
        self._folder, self._poll_s, self._stop, self._note = folder, poll_s, stop, note
        self._launcher = Launcher(ledger, server, folder)
        self._end: PersonasTuneError | None = None
        self._n_unsure = 0  # launches in a row
        self._n_full = 0  # batches in a row for which there was no room
        self._next_launch = 0.0  # monotonic seconds
        self._counts: dict[int, tuple[int, int]] = {}  # of each shard: answered, in all
        self._told = ""

    def resume(self) -> None:
        """Come back to what earlier runs had sent."""
        self._launcher.resume(self._poll_s, self._stop, self._note)
        for shard in self._ledger.shards("created"):
            self._budget.reserve(shard.estimate)

    @property
    def is_left(self) -> bool:
        """Whether there is any shard to look after."""
        return bool(self._waiting() or self._ledger.shards("created"))

    def warn_of_shutdown(self, model: str) -> None:
        """Tell the user if the model is about to go."""
        warning = self._server.shutdown_warning(model)
        if warning is not None:
            self._note(warning)

    def work_off(self) -> None:
        """Look after all shards until they are collected, or until some have to be made smaller.

        Raises:
            ServerError: If the server turns batches away, or says that it won't answer.
            BudgetError: If the budget is spent; all that was under way is collected then.
        """
        most_tokens = self.most_tokens
        self._counts = {}
        while True:
            self._launch()
            under_way = self._ledger.shards("created")
            if not under_way and (self._end is not None or not self._waiting()):
                break
            self._stop.sleep(self._poll_s)
            self._look_at(self._ledger.shards("created"))
            if self.most_tokens != most_tokens:
                self._drop_what_is_too_large()
                return
        if self._end is not None:
            raise self._end

    def _waiting(self) -> list[Shard]:
        return self._ledger.shards("intended", "uploading", "uploaded", "creating")

    def _launch(self) -> None:
        """Launch what may be launched; one at a time where there was no room for all."""
        if self._end is not None:
            return
        for shard in self._waiting():
            if time.monotonic() < self._next_launch or not self._get_there(shard):
                return
            self._counts[shard.id] = (0, shard.n_requests)
            if self._n_full:
                self._next_launch = time.monotonic() + self._poll_s

    def _get_there(self, shard: Shard) -> bool:
        """Whether the shard's batch is at the server now; else it has to wait for money or for the server."""
        try:
            if not self._launcher.adopt(shard):
                if not self._is_affordable(shard):
                    return False
                self._launcher.launch(shard)
        except Unsure as failure:
            self._try_later(failure)
            return False
        self._n_unsure = 0
        self._budget.reserve(shard.estimate)
        return True

    def _is_affordable(self, shard: Shard) -> bool:
        if self._budget.allows(shard.estimate, "batch"):
            return True
        if not self._ledger.shards("created"):
            batch = f"batch of {shard.n_requests} requests"
            raise self._budget.error(shard.estimate, str(self._journal.path), "batch", batch)
        return False

    def _try_later(self, failure: Unsure) -> None:
        self._n_unsure += 1
        self._server.line.give_up_after(self._n_unsure, failure)
        self._note(f"{failure}; looking whether it was done, then trying again")
        self._next_launch = time.monotonic() + max(self._poll_s, failure.wait_s or 0.0)

    def _look_at(self, shards: list[Shard]) -> None:
        looks = [(shard, batch) for shard in shards if (batch := self._batch_of(shard)) is not None]
        self._counts |= {shard.id: (n_answered(batch), shard.n_requests) for shard, batch in looks}
        over = [look for look in looks if is_over(look[1])]
        failed = [look for look in looks if look[1].status == "failed"]
        for shard, batch in over:
            self._collect(shard, batch)
        for shard, _ in failed:
            self._budget.settle(shard.estimate, Usage(), "batch")
            del self._counts[shard.id]
        too_much = [look for look in failed if OVER_LIMIT in codes_of(look[1])]
        self._wait_for_room(too_much, is_room=bool(over))
        self._tell()
        self._give_up([look for look in failed if OVER_LIMIT not in codes_of(look[1])])

    def _batch_of(self, shard: Shard) -> Batch | None:
        """The shard's batch; None if it is gone, which is written off then."""
        batch = self._server.batch(shard, self._ledger.job)
        if batch is None:
            self._server.check_gone(shard, self._ledger.job)
            self._settle(shard, write_off(shard, ledger=self._ledger, journal=self._journal, stop=self._stop))
        return batch

    def _settle(self, shard: Shard, gain: Gain) -> None:
        self._budget.settle(shard.estimate, gain.usage, "batch")
        self._counts[shard.id] = (gain.n_answered, shard.n_requests)
        if gain.n_lost:
            what = f"batch {shard.batch_id}, or a file of its answers, is not at this server any more"
            self._note(f"{what}; {gain.n_lost} of its {shard.n_requests} requests are asked again")

    def _collect(self, shard: Shard, batch: Batch) -> None:
        gain = collect(
            shard, batch, server=self._server, ledger=self._ledger, journal=self._journal, folder=self._folder,
            stop=self._stop,
        )  # fmt: skip
        self._settle(shard, gain)
        self._end = self._end or self._reason_to_end(shard, batch, gain)

    def _reason_to_end(self, shard: Shard, batch: Batch, gain: Gain) -> ServerError | None:
        reply = gain.objection
        if reply is not None and (verdict_on(reply) == "stop" or not self._has_answers(shard)):
            return ServerError(words_of(reply), where=self._server.line.where, remedy=remedy_for(reply))
        if batch.status == "cancelled":
            remedy = "its answers are kept; run the same command to ask for the rest"
            return ServerError("cancelled at the server", where=f"batch {batch.id}", remedy=remedy)
        return None

    def _has_answers(self, shard: Shard) -> bool:
        return any(total.status == "answered" for total in self._journal.totals(shard.model))

    def _give_up(self, refused: list[tuple[Shard, Batch]]) -> None:
        for shard, _ in refused:
            self._launcher.give_up(shard)
        for _, batch in refused:
            remedy = "mend it, then run the same command"
            raise ServerError(words_in(batch), where=f"batch {batch.id} failed", remedy=remedy)

    def _wait_for_room(self, too_much: list[tuple[Shard, Batch]], *, is_room: bool) -> None:
        """Ask again for the batches that were too much, when others are over or after a while that grows.

        Those that would never fit are given up, to be made smaller.
        """
        is_idle = len(self._ledger.shards("created")) == len(too_much)
        for shard, batch in too_much:
            limit = limit_in(words_in(batch))
            if shard.n_requests == 1 or shard.estimate.input_tokens <= (limit // 2 if is_idle else limit):
                self._ledger.ask_anew(shard)
            else:
                self._launcher.give_up(shard)
                self.most_tokens = max(1, limit // 2)
        if too_much:
            self._note(f"{words_in(too_much[0][1])} (waiting for room)")
            self._n_full = 1 if is_room else self._n_full + 1
            self._next_launch = time.monotonic() + self._poll_s * min(2**self._n_full, LONGEST_WAIT)
        if is_room:
            self._n_full, self._next_launch = min(self._n_full, 1), 0.0

    def _drop_what_is_too_large(self) -> None:
        for shard in self._ledger.shards("intended", "uploaded"):
            if shard.n_requests > 1 and shard.estimate.input_tokens > (self.most_tokens or 0):
                self._launcher.drop(shard)

    def _tell(self) -> None:
        """Say how far all are, if that is news."""
        n_left = len(self._ledger.shards("intended", "uploading", "uploaded", "creating", "created"))
        done, asked = (sum(count[place] for count in self._counts.values()) for place in (0, 1))
        words = (
            f"wave {self._ledger.wave}: {done} of {asked} requests sent are answered, batches left: {n_left}, "
            f"{self._budget}"
        )
        if words != self._told:
            self._told = words
            self._note(words)
