"""Brings a batch's answers into the journal."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
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
        objection: What the server says that it won't answer any more, or that it won't take such requests at all.
    """

    usage: Usage = field(default_factory=Usage)
    n_answered: int = 0
    objection: Reply | None = None

    def count(self, attempt: Attempt) -> None:
        """Take one more answer or failure into account."""
        self.usage += attempt.usage
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

    Raises:
        ServerError: If a file isn't there any more, or isn't one of answers.
    """
    ids = {"output": batch.output_file_id, "errors": batch.error_file_id}
    paths = {folder / f"{shard.sha256}.{kind}": file_id for kind, file_id in ids.items() if file_id}
    for tries in range(1, MOST_DOWNLOADS + 1):
        for path, file_id in paths.items():
            server.download(file_id, path)
        try:
            gain = _keep(shard, batch, list(paths), ledger, journal, stop)
        except DamagedFileError as error:
            if tries == MOST_DOWNLOADS:
                raise ServerError(f"the output of batch {batch.id}: {error}", where=server.where) from error
        else:
            break
    for path in (*paths, folder / shard.file_name):
        path.unlink(missing_ok=True)
    return gain


def _keep(shard: Shard, batch: Batch, paths: Sequence[Path], ledger: Ledger, journal: Journal, stop: Stop) -> Gain:
    gain = Gain()
    with journal.transaction():
        for attempt in _attempts(shard, batch, paths, ledger):
            stop.check()
            gain.count(attempt)
            journal.record_all([attempt])
        ledger.collected(shard)
    return gain


def _attempts(shard: Shard, batch: Batch, paths: Sequence[Path], ledger: Ledger) -> Iterator[Attempt]:
    ended = time.time()
    for answer in (answer for path in paths for answer in read_answers(path)):
        parts = ledger.take(shard, answer.request)
        if parts is not None:
            yield attempt_of(answer, shard, parts, ended)
    if batch.status == "completed":
        for request in ledger.unanswered(shard):
            yield attempt_of(Answer(request, None, f"batch {batch.id} has no line for it"), shard, (), ended)
