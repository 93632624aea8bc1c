"""The Batch API's files: requests on the way in, answers on the way out, a line of JSON each."""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from personas_tune.llm.batch_ledger import Contents, Shard
from personas_tune.llm.budget import estimated_usage, usage_in
from personas_tune.llm.calls import Call
from personas_tune.llm.failures import Reply
from personas_tune.llm.journal import Attempt, Usage

_PASSED_OVER = ("batch_expired", "batch_cancelled")  # errors of requests whose batch ended before their turn


@dataclass(frozen=True)
class Bounds:
    """How large an input file may be, though a single request always has a place.

    Args:
        max_requests: Most requests.
        max_bytes: Most bytes.
        max_tokens: Most input tokens, by our own count.
        allows: Whether the budget does; what it allows goes into files of its own, ahead of the rest.
    """

    max_requests: int
    max_bytes: int
    max_tokens: int = sys.maxsize
    allows: Callable[[Usage], bool] = lambda _: True


class DamagedFileError(Exception):
    """A downloaded file in which a line is no answer."""


def write_input_files(questions: Iterable[tuple[Call, str | None]], folder: Path, bounds: Bounds) -> Iterator[Contents]:
    """Write requests into as few input files as the bounds allow, each named after the sha256 of its bytes.

    A file is whole and on the disk before it is yielded. One request of a name is enough, should several have it.

    Args:
        questions: Calls with the complaint about the last answer to each, or None.
        folder: Where the files go.
        bounds: How large a file may be.
    """
    file: _OpenFile | None = None
    total = Usage()
    try:
        for call, complaint in questions:
            if file is not None and call.request.sha256 in file.requests:
                continue
            body = call.request.body_after(complaint)
            line, estimate = _line_of(call, body), estimated_usage(body, call.expected_output_tokens)
            was_allowed, total = bounds.allows(total), total + estimate
            is_too_dear = was_allowed and not bounds.allows(total)
            if file is not None and (is_too_dear or not file.has_room_for(call, len(line), estimate, bounds)):
                yield file.finish()
                file = None
            if file is None:
                file = _OpenFile(folder, call)
            file.add(call, line, estimate)
        if file is not None:
            yield file.finish()
    finally:
        if file is not None:
            file.stream.close()


def _line_of(call: Call, body: dict[str, Any]) -> bytes:
    line = {"custom_id": call.request.sha256, "method": "POST", "url": f"/v1{call.request.path}", "body": body}
    return json.dumps(line, separators=(",", ":"), allow_nan=False).encode() + b"\n"


class _OpenFile:
    """An input file that is being written."""

    def __init__(self, folder: Path, first: Call) -> None:
        self._path, self._model = first.request.path, first.request.body["model"]
        self._folder = folder
        self._part = folder / "input.part"
        descriptor = os.open(self._part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        self.stream = os.fdopen(descriptor, "wb")
        self._digest = hashlib.sha256()
        self._n_bytes = 0
        self._estimate = Usage()
        self.requests: set[str] = set()

    def has_room_for(self, call: Call, n_bytes: int, estimate: Usage, bounds: Bounds) -> bool:
        """Whether the call may go into this file; all of its calls have one endpoint and one model."""
        return (
            (call.request.path, call.request.body["model"]) == (self._path, self._model)
            and len(self.requests) < bounds.max_requests
            and self._n_bytes + n_bytes <= bounds.max_bytes
            and self._estimate.input_tokens + estimate.input_tokens <= bounds.max_tokens
        )

    def add(self, call: Call, line: bytes, estimate: Usage) -> None:
        self.stream.write(line)
        self._digest.update(line)
        self._n_bytes += len(line)
        self.requests.add(call.request.sha256)
        self._estimate += estimate

    def finish(self) -> Contents:
        self.stream.flush()
        os.fsync(self.stream.fileno())
        self.stream.close()
        sha256 = self._digest.hexdigest()
        os.replace(self._part, self._folder / f"{sha256}.jsonl")
        return Contents(sha256, self._path, self._model, self._n_bytes, self.requests, self._estimate)


@dataclass(frozen=True)
class Answer:
    """A line of an output or error file.

    Args:
        request: The custom id, which is the request's sha256.
        http_status: None if the model's endpoint never saw the request.
        body: What the endpoint answered, as JSON text; else the batch's own words.
        request_id: The server's name for it.
    """

    request: str
    http_status: int | None
    body: str
    request_id: str | None = None


def was_passed_over(reply: Reply) -> bool:
    """Whether a batch ended before a request's turn came, so that it costs nothing and may be asked again."""
    return reply.http_status is None and reply.text.partition(":")[0] in _PASSED_OVER


def read_answers(path: Path) -> Iterator[Answer]:
    """The lines of a downloaded file, one at a time.

    Raises:
        DamagedFileError: At a line that is no answer.
    """
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                if line.strip():
                    yield _answer_of(json.loads(line))
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                raise DamagedFileError(f"line {number} is no answer") from error


def _answer_of(line: dict[str, Any]) -> Answer:
    response, error = line.get("response"), line.get("error")
    if response is None:
        words = f"{error['code']}: {error['message']}" if error else "neither an answer nor an error"
        return Answer(str(line["custom_id"]), None, words, line.get("id"))
    request_id = response.get("request_id") or line.get("id")
    return Answer(str(line["custom_id"]), int(response["status_code"]), json.dumps(response["body"]), request_id)


def attempt_of(answer: Answer, shard: Shard, ended: float) -> Attempt:
    """What goes into the journal about an answer."""
    is_good = answer.http_status == 200
    return Attempt(
        request=answer.request,
        status="answered" if is_good else "failed",
        http_status=answer.http_status,
        response=answer.body,
        usage=(is_good and usage_in(answer.body)) or Usage(),
        request_id=answer.request_id,
        model=shard.model,
        via="batch",
        started=shard.changed,
        ended=ended,
    )
