"""Gets each shard to the server once: adopts its batch if it is there, else uploads its file and has one made."""

import time
from collections.abc import Callable
from pathlib import Path

from personas_tune.errors import MissingInputError, ServerError
from personas_tune.llm.batch_ledger import Ledger, Shard
from personas_tune.llm.batch_line import Unsure
from personas_tune.llm.batch_server import BatchServer
from personas_tune.llm.batch_stop import Stop


class Launcher:
    """Gets shards to the server.

    What is there is listed once, and again whenever an answer was lost.

    Args:
        ledger: Notes every step before and after it.
        server: Where they go.
        folder: Where the input files lie.
    """

    def __init__(self, ledger: Ledger, server: BatchServer, folder: Path) -> None:
        self._ledger, self._server, self._folder = ledger, server, folder
        self._batches: dict[tuple[str, int], str] | None = None
        self._files: dict[tuple[str, int], str] | None = None

    def resume(self, poll_s: float, stop: Stop, note: Callable[[str], None]) -> None:
        """Adopt the batches that an earlier run had made without learning so, and drop the shards that have none.

        What was under way when that run ended gets ``poll_s`` to arrive.

        Raises:
            ServerError: If the batch that was being made may be at another server.
        """
        under_way = self._ledger.shards("uploading", "creating")
        if under_way:
            wait_s = min(poll_s, max(shard.changed for shard in under_way) + poll_s - time.time())
            note(f"the last run was broken off: {max(0.0, wait_s):.0f} s until what it had sent is looked for")
            stop.sleep(wait_s)
        for shard in self._ledger.shards("intended", "uploading", "uploaded", "creating"):
            if self.adopt(shard):
                continue
            if shard.state == "creating":
                self._server.check_gone(shard, self._ledger.job)
            self.drop(shard)
        self._batches = None

    def adopt(self, shard: Shard) -> bool:
        """Whether the shard's batch is at the server already; then it is looked after from now on."""
        if self._batches is None:
            self._batches = self._server.batches_of(self._ledger.job)
        batch_id = self._batches.get((shard.sha256, shard.number))
        if batch_id is None:
            return False
        self._ledger.created(shard, batch_id, self._server.made_with(self._ledger.job))
        return True

    def launch(self, shard: Shard) -> None:
        """Have the batch made of a shard that has none.

        Raises:
            Unsure: If it may have been made, or may be made later.
            ServerError: If the server won't make it.
        """
        file_id = shard.file_id or self._find_file(shard) or self._upload(shard)
        self._ledger.creating(shard, self._server.made_with(self._ledger.job))
        try:
            batch_id = self._server.create(shard, file_id, self._ledger.job)
        except Unsure:
            self._batches = None
            raise
        except ServerError:
            self._ledger.uploaded(shard, file_id)
            raise
        self._ledger.created(shard, batch_id, self._server.made_with(self._ledger.job))

    def give_up(self, shard: Shard) -> None:
        """Close a shard whose batch was turned away; its requests are free for another."""
        self._ledger.turned_away(shard)
        (self._folder / shard.file_name).unlink(missing_ok=True)

    def drop(self, shard: Shard) -> None:
        """Forget a shard of which nothing is asked; its requests are free for another."""
        self._ledger.forget(shard)
        (self._folder / shard.file_name).unlink(missing_ok=True)

    def _find_file(self, shard: Shard) -> str | None:
        if self._files is None:
            self._files = self._server.input_files()
        file_id = self._files.get((shard.file_name, shard.n_bytes))
        if file_id is not None:
            self._ledger.uploaded(shard, file_id)
        return file_id

    def _upload(self, shard: Shard) -> str:
        file = self._folder / shard.file_name
        if not file.is_file():
            raise MissingInputError(
                "not there any more", where=str(file), remedy="run the same command to make it anew"
            )
        self._ledger.uploading(shard)
        try:
            file_id = self._server.upload(file)
        except Unsure:
            self._files = None
            raise
        self._ledger.uploaded(shard, file_id)
        return file_id
