"""Brings a batch's answers into the journal."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from openai.types import Batch

from personas_tune.errors import ServerError
from personas_tune.llm.batch_files import Answer, DamagedFileError, attempt_of, read_answers
from personas_tune.llm.batch_ledger import Ledger, Shard
from personas_tune.llm.batch_server import BatchServer
from personas_tune.llm.batch_stop import Stop
from personas_tune.llm.failures import Reply, verdict_on
from personas_tune.llm.journal import Attempt, Journal, Usage

MOST_DOWNLOADS = 5  # of a file that arrives damaged


@dataclass
class Gain:
    """What a batch came to.

    Args:
        usage: What its answers took.
        n_answered: How many there are.
        n_lost: How many may have been billed and are not to be had.
        objection: What the server says that it won't answer any more, or that it won't take such requests at all.
    """

    usage: Usage = field(default_factory=Usage)
    n_answered: int = 0
    n_lost: int = 0
    objection: Reply | None = None

    def count(self, attempt: Attempt) -> None:
        """Take one more answer or failure into account."""
        self.usage += attempt.usage
        self.n_lost += attempt.status == "lost"
        if attempt.status == "answered":
            self.n_answered += 1
        else:
            reply = Reply(attempt.status, attempt.http_status, attempt.response or "")
            if verdict_on(reply) in ("stop", "refused") and not self._stops:
                self.objection = reply

    @property
    def _stops(self) -> bool:
        return self.objection is not None and verdict_on(self.objection) == "stop"


def collect(
    shard: Shard, batch: Batch, *, server: BatchServer, ledger: Ledger, journal: Journal, folder: Path, stop: Stop
) -> Gain:
    """Keep all that a batch that is over answered, in one transaction with the ledger's note that it was kept.

    Should a file not be there any more, the rest is kept, and what is missing counts as lost.

    Raises:
        ServerError: If a file isn't one of answers.
    """
    ids = {"output": batch.output_file_id, "errors": batch.error_file_id}
    paths = {folder / f"{shard.sha256}.{kind}": file_id for kind, file_id in ids.items() if file_id}
    for tries in range(1, MOST_DOWNLOADS + 1):
        there = [path for path, file_id in paths.items() if server.download(file_id, path)]
        try:
            attempts = _attempts(shard, batch, there, ledger, is_whole=len(there) == len(paths))
            gain = _keep(shard, attempts, ledger, journal, stop)
        except DamagedFileError as error:
            if tries == MOST_DOWNLOADS:
                raise ServerError(f"the output of batch {batch.id}: {error}", where=server.line.where) from error
        else:
            break
    for path in (*paths, folder / shard.file_name):
        path.unlink(missing_ok=True)
    return gain


def write_off(shard: Shard, *, ledger: Ledger, journal: Journal, stop: Stop) -> Gain:
    """Note that a batch is gone: all that it was asked may have been billed, and is free to be asked again."""
    return _keep(shard, _lost(shard, ledger), ledger, journal, stop)


def _keep(shard: Shard, attempts: Iterator[Attempt], ledger: Ledger, journal: Journal, stop: Stop) -> Gain:
    gain = Gain()
    with journal.transaction():
        for attempt in attempts:
            stop.check()
            gain.count(attempt)
            journal.record_all([attempt])
        if gain.n_lost:
            ledger.gone(shard)
        else:
            ledger.collected(shard)
    return gain


def _lost(shard: Shard, ledger: Ledger) -> Iterator[Attempt]:
    ended, estimate = time.time(), shard.estimate
    share = Usage(estimate.input_tokens // shard.n_requests, 0, estimate.output_tokens // shard.n_requests)
    words = f"batch {shard.batch_id}, or a file of its answers, is not at the server any more"
    for request in ledger.unanswered(shard):
        yield replace(attempt_of(Answer(request, None, words), shard, ended), status="lost", usage=share)


def _attempts(
    shard: Shard, batch: Batch, paths: Sequence[Path], ledger: Ledger, *, is_whole: bool
) -> Iterator[Attempt]:
    ended = time.time()
    for answer in (answer for path in paths for answer in read_answers(path)):
        if ledger.take(shard, answer.request):
            yield attempt_of(answer, shard, ended)
    if not is_whole:
        yield from _lost(shard, ledger)
    elif batch.status == "completed":
        for request in ledger.unanswered(shard):
            yield attempt_of(Answer(request, None, f"batch {batch.id} has no line for it"), shard, ended)
