"""The Batch API of a server, a method for each of its endpoints."""

import hashlib
from pathlib import Path

from openai.types import Batch, FileObject

from personas_tune.errors import ServerError
from personas_tune.llm.batch_ledger import Shard
from personas_tune.llm.batch_line import Line, Unsure
from personas_tune.llm.batch_stop import Stop
from personas_tune.llm.shutdown import shutdown_warning

LOOK_AT_MODEL_S = 10.0
_CHUNK_BYTES = 1 << 18


class BatchServer:
    """A server's Batch API.

    Args:
        line: The connection to it.
        stop: Breaks calls off.
    """

    def __init__(self, line: Line, stop: Stop) -> None:
        self.line, self._stop = line, stop

    def made_with(self, job: str) -> str:
        """Its address, and a mark by which the job tells keys apart."""
        secret = f"{job} {self.line.access.api_key} {self.line.access.basic}"
        return f"{self.line.where} {hashlib.sha256(secret.encode()).hexdigest()[:16]}"

    def shutdown_warning(self, model: str) -> str | None:
        """What the user should know of a model that is about to go; whatever else is wrong shows later."""
        look, headers = self.line.api.models.with_raw_response.retrieve, self.line.headers
        try:
            with self._stop.allowed():
                told = self.line.once(
                    lambda: look(model, timeout=LOOK_AT_MODEL_S, extra_headers=headers).http_response.text, str
                )
        except (Unsure, ServerError):
            return None
        return shutdown_warning(model, told)

    def batches_of(self, job: str) -> dict[tuple[str, int], str]:
        """Ids of the job's batches by their input's sha256 and their number."""
        found = {}
        listed = self.line.all_of(lambda: self.line.api.batches.list(limit=100, extra_headers=self.line.headers))
        for batch in listed:
            key = _key_in(batch.metadata or {}, job)
            if key is not None:
                found[key] = batch.id
        return found

    def input_files(self) -> dict[tuple[str, int], str]:
        """Ids of the uploaded input files by name and size."""
        listed = self.line.all_of(
            lambda: self.line.api.files.list(purpose="batch", limit=10_000, extra_headers=self.line.headers)
        )
        return {(file.filename, file.bytes): file.id for file in listed if file.status != "error"}

    def upload(self, file: Path) -> str:
        """Upload an input file under its own name; returns its id.

        Raises:
            Unsure: If it may be there, or may be taken later.
            ServerError: If it never will be.
        """
        with file.open("rb") as stream, self._stop.allowed():
            form = (file.name, stream, "application/jsonl")
            return self.line.once(
                lambda: self.line.api.files.create(file=form, purpose="batch", extra_headers=self.line.headers),
                FileObject,
            ).id

    def create(self, shard: Shard, file_id: str, job: str) -> str:
        """Have a batch made of an uploaded file; returns its id. Not to be broken off: a lost id costs a search.

        Raises:
            Unsure: If it may have been made, or may be made later.
            ServerError: If it never will be.
        """
        return self.line.once(
            lambda: self.line.api.batches.create(
                input_file_id=file_id,
                endpoint=f"/v1{shard.path}",  # type: ignore[arg-type]  # theirs is a list of literals
                completion_window="24h",  # there is no other
                metadata=_metadata(shard, job),
                extra_headers=self.line.headers,
            ),
            Batch,
        ).id

    def batch(self, shard: Shard, job: str) -> Batch | None:
        """How far the shard's batch has come; None if there is no such batch of the job."""
        batch_id, look = shard.batch_id or "", self.line.api.batches.retrieve
        found = self.line.find(lambda: look(batch_id, extra_headers=self.line.headers), Batch)
        return found if found and _key_in(found.metadata or {}, job) == (shard.sha256, shard.number) else None

    def check_gone(self, shard: Shard, job: str) -> None:
        """Make sure that a batch that isn't found is gone, and not one of another server or account.

        Raises:
            ServerError: If it may be somewhere.
        """
        listed, made_with = self.batches_of(job), shard.made_with or ""
        is_known = made_with == self.made_with(job) or (listed and made_with.startswith(f"{self.line.where} "))
        if not is_known or (shard.sha256, shard.number) in listed:
            made_at = made_with.partition(" ")[0] or "an unknown address"
            what = f"has no batch {shard.batch_id or '(its id was lost)'} of this job, which was made at {made_at}"
            raise ServerError(what, where=self.line.where, remedy="use the base_url and key that it was made with")

    def download(self, file_id: str, path: Path) -> bool:
        """Write a file of the server's to ``path``; returns whether it is there."""

        def fetch() -> Path:
            content = self.line.api.files.with_streaming_response.content(file_id, extra_headers=self.line.headers)
            with content as answer, path.open("wb") as stream:
                for chunk in answer.iter_bytes(_CHUNK_BYTES):
                    stream.write(chunk)
            return path

        return self.line.find(fetch, Path) is not None


def _metadata(shard: Shard, job: str) -> dict[str, str]:
    return {
        "personas_tune_job": job,
        "personas_tune_shard": shard.sha256,
        "personas_tune_try": str(shard.number),
    }


def _key_in(metadata: dict[str, str], job: str) -> tuple[str, int] | None:
    number = str(metadata.get("personas_tune_try"))
    if metadata.get("personas_tune_job") != job or not number.isdecimal():
        return None
    return metadata.get("personas_tune_shard", ""), int(number)
