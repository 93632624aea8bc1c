"""The Batch API: files of requests, worked off in states that take a while."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from loopback import models
from loopback.chance import uniform
from loopback.files import Files
from loopback.ledger import Ledger
from loopback.options import Options

Json = dict[str, Any]
MOST_LINES, MOST_BYTES = 50_000, 200_000_000
UNDER_WAY = ("validating", "in_progress", "finalizing")


@dataclass
class Batch:
    id: str
    endpoint: str
    input_file_id: str
    metadata: dict[str, str] | None
    window: str
    created: float  # seconds of the ledger's clock
    failure: str  # "ok": it doesn't fail
    created_at: int = field(default_factory=lambda: int(time.time()))
    status: str = "validating"
    lines: list[Json] = field(default_factory=list)
    tokens: int = 0
    errors: list[Json] = field(default_factory=list)
    output_file_id: str | None = None
    error_file_id: str | None = None
    counts: dict[str, int] = field(default_factory=lambda: {"total": 0, "completed": 0, "failed": 0})

    def as_json(self) -> Json:
        return {
            "id": self.id, "object": "batch", "endpoint": self.endpoint, "input_file_id": self.input_file_id,
            "completion_window": self.window, "status": self.status, "created_at": self.created_at,
            "expires_at": self.created_at + 86_400, "metadata": self.metadata, "request_counts": self.counts,
            "output_file_id": self.output_file_id, "error_file_id": self.error_file_id,
            "errors": {"object": "list", "data": self.errors} if self.errors else None,
        }  # fmt: skip


class Batches:
    """All batches; they go on when somebody looks, as far as the time that went by allows."""

    def __init__(self, files: Files, ledger: Ledger, options: Callable[[], Options]) -> None:
        self.by_id: dict[str, Batch] = {}
        self._files, self._ledger, self._options = files, ledger, options

    def create(self, body: Json) -> Batch:
        planned, number = self._options().batch_failures, len(self.by_id)
        batch = Batch(
            f"batch_{number + 1:06}", body["endpoint"], body["input_file_id"], body.get("metadata"),
            body["completion_window"], self._ledger.now(), planned[number] if number < len(planned) else "ok",
        )  # fmt: skip
        self.by_id[batch.id] = batch
        return batch

    def newest_first(self) -> list[Json]:
        self.advance()
        return [batch.as_json() for batch in reversed(self.by_id.values())]

    def cancel(self, batch: Batch) -> None:
        if batch.status in UNDER_WAY:
            batch.status = "cancelled"

    def advance(self) -> None:
        options, now = self._options(), self._ledger.now()
        for batch in self.by_id.values():
            age = now - batch.created
            if batch.status == "validating" and age >= options.validating_s:
                self._start(batch, options)
            if batch.status == "in_progress" and age >= options.validating_s + options.in_progress_s:
                self._answer(batch, options)
                batch.status = "finalizing"
            in_all = options.validating_s + options.in_progress_s + options.finalizing_s
            if batch.status == "finalizing" and age >= in_all:
                batch.status = "expired" if self._has_expired_lines(batch) else "completed"

    def _start(self, batch: Batch, options: Options) -> None:
        batch.lines, batch.errors = read_lines(self._files.by_id[batch.input_file_id].content, batch.endpoint)
        batch.tokens = sum(models.tokens_asked(line["body"]) for line in batch.lines)
        enqueued = sum(other.tokens for other in self.by_id.values() if other.status in ("in_progress", "finalizing"))
        over = options.enqueued_tokens is not None and enqueued + batch.tokens > options.enqueued_tokens
        if batch.failure != "ok" or over:
            batch.errors.append(failure("token_limit_exceeded" if over else batch.failure, options.enqueued_tokens))
        batch.status = "failed" if batch.errors else "in_progress"
        batch.counts["total"] = 0 if batch.errors else len(batch.lines)

    def _answer(self, batch: Batch, options: Options) -> None:
        good: list[str] = []
        bad: list[str] = []
        for number, line in enumerate(batch.lines):
            fate = _draw(f"{options.seed} {batch.id} {line['custom_id']}", options.line_faults)
            record = {"id": f"batch_req_{batch.id}_{number}", "custom_id": line["custom_id"]}
            record |= self._expired() if fate == "expired" else self._answered(batch, line, fate, options)
            is_good = record["response"] is not None and record["response"]["status_code"] == 200
            (good if is_good else bad).append(json.dumps(record, ensure_ascii=False))
        batch.counts |= {"completed": len(good), "failed": len(bad)}
        batch.output_file_id = self._write(batch, "output", good)
        batch.error_file_id = self._write(batch, "error", bad)

    def _answered(self, batch: Batch, line: Json, fate: str, options: Options) -> Json:
        path, body = batch.endpoint.removeprefix("/v1"), line["body"]
        if fate == "server_error":
            return _response(500, {"error": {"message": "The server had an error", "type": "server_error"}})
        request, whole = (models.sha256_of(part) for part in (models.without_complaints(path, body), body))
        answer = models.complete(path, body, fate, options, cached=False)
        self._ledger.bill(path, request, whole, fate, answer["usage"], batch.id)
        return _response(200, {"id": f"chatcmpl-{len(self._ledger.billed)}", "created": int(time.time()), **answer})

    def _expired(self) -> Json:
        words = "This request could not be executed before the completion window expired."
        return {"response": None, "error": {"code": "batch_expired", "message": words}}

    def _write(self, batch: Batch, kind: str, lines: list[str]) -> str | None:
        if not lines:
            return None
        content = "".join(f"{line}\n" for line in reversed(lines))  # the order of the answers is nobody's promise
        return self._files.add(f"{batch.id}_{kind}.jsonl", "batch_output", content.encode()).id

    def _has_expired_lines(self, batch: Batch) -> bool:
        return batch.error_file_id is not None and b'"batch_expired"' in self._files.by_id[batch.error_file_id].content


def _draw(name: str, faults: dict[str, float]) -> str:
    left = uniform(name)
    for fault, share in faults.items():
        left -= share
        if left < 0:
            return fault
    return "ok"


def _response(status: int, body: Json) -> Json:
    return {"response": {"status_code": status, "request_id": "req_batch", "body": body}, "error": None}


def failure(code: str, limit: int | None) -> Json:
    words = {
        "token_limit_exceeded": f"Enqueued token limit reached for this model. Limit: {limit or 90_000:,} enqueued "
        "tokens. Please try again once some in_progress batches have been completed.",
    }
    return {"code": code, "message": words.get(code, f"The batch failed: {code}"), "line": None, "param": None}


def read_lines(content: bytes, endpoint: str) -> tuple[list[Json], list[Json]]:
    """The requests of an input file, and what is wrong with it."""
    texts = content.decode().splitlines()
    if len(texts) > MOST_LINES or len(content) > MOST_BYTES:
        return [], [failure("file_too_large", None)]
    if not texts:
        return [], [failure("empty_file", None)]
    lines: list[Json] = []
    for number, text in enumerate(texts, 1):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            mistake = {"code": "invalid_json_line", "message": "This line is not parseable as valid JSON."}
            return [], [{**mistake, "line": number, "param": None}]
    return lines, list(_mistakes(lines, endpoint))


def _mistakes(lines: list[Json], endpoint: str) -> Iterator[Json]:
    seen: set[str] = set()
    for number, line in enumerate(lines, 1):
        where = {"line": number, "param": None}
        if set(line) != {"custom_id", "method", "url", "body"} or line["method"] != "POST" or line["url"] != endpoint:
            yield {"code": "invalid_request", "message": f"The request does not match {endpoint}.", **where}
        elif line["custom_id"] in seen:
            yield {"code": "duplicate_custom_id", "message": f"{line['custom_id']} occurs twice.", **where}
        elif (mistake := models.mistake_in(endpoint.removeprefix("/v1"), line["body"])) is not None:
            yield {"code": "invalid_request", "message": mistake, **where}
        seen.add(line.get("custom_id", ""))
