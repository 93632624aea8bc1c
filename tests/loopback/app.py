"""The endpoints."""

import asyncio
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from loopback import models
from loopback.batches import Batches
from loopback.chance import Bucket, Fate
from loopback.files import Files, page_of, read_form
from loopback.http import HttpRequest, Reply, json_reply
from loopback.ledger import Ledger
from loopback.options import FREE_FAULTS, Options

Json = dict[str, Any]
MODEL_PATHS = ("/chat/completions", "/embeddings")


def refusal(status: int, message: str, kind: str, code: str | None = None, **headers: str) -> Reply:
    """An error in OpenAI's form."""
    error = {"message": message, "type": kind, "param": None, "code": code}
    return json_reply({"error": error}, status, {name.replace("_", "-"): text for name, text in headers.items()})


class App:
    def __init__(self, options: Options) -> None:
        self.options = options
        self.ledger = Ledger()
        self._files = Files()
        self._batches = Batches(self._files, self.ledger, lambda: self.options)
        self._fate, self._batch_fate = Fate(), Fate()
        self._buckets: dict[str, Bucket] = {}
        self._system_messages: set[str] = set()
        self._fill_buckets()

    async def handle(self, request: HttpRequest) -> Reply:
        if request.path.startswith("/_"):
            return self._control(request)
        headers, ledger = request.headers, self.ledger
        entry = ledger.arrive(request.method, request.path, headers, len(request.body))
        ledger.under_way += 1
        ledger.most_under_way = max(ledger.most_under_way, ledger.under_way)
        try:
            reply = self._without_key(headers) or await self._route(request, request.path.removeprefix("/v1"))
        finally:
            ledger.under_way -= 1
        entry["outcome"] = reply.cut or reply.status
        stamp = {"x-request-id": f"req_{entry['n']:08}", "openai-processing-ms": "1"}
        return replace(reply, headers={**reply.headers, **stamp})

    def _control(self, request: HttpRequest) -> Reply:
        """What tests ask: the ledger; and, by POST, options to change."""
        if request.path == "/_set":
            self._change(json.loads(request.body))
            return json_reply({})
        self._batches.advance()
        views: dict[str, Callable[[], Any]] = {
            "/_log/billed": lambda: self.ledger.billed,
            "/_log/requests": lambda: list(self.ledger.requests),
            "/_log/batches": lambda: [batch.as_json() for batch in self._batches.by_id.values()],
            "/_log/files": lambda: [file.as_json() for file in self._files.by_id.values()],
            "/_log/counts": self.ledger.counts,
        }
        return json_reply(views[request.path]())

    def _change(self, changes: Json) -> None:
        self.options = options_from({**asdict(self.options), **changes})
        if changes.keys() & {"requests_per_minute", "tokens_per_minute", "burst_s"}:
            self._fill_buckets()
        if "plan" in changes:
            self._fate.start_plan_again()
        if "batch_plan" in changes:
            self._batch_fate.start_plan_again()

    def _fill_buckets(self) -> None:
        limits = {"requests": self.options.requests_per_minute, "tokens": self.options.tokens_per_minute}
        now, burst_s = self.ledger.now(), self.options.burst_s
        self._buckets = {kind: Bucket(n, burst_s, now) for kind, n in limits.items() if n is not None}

    def _without_key(self, headers: dict[str, str]) -> Reply | None:
        key = headers.get("authorization", "").removeprefix("Bearer ")
        if self.options.api_key in (None, key):
            return None
        words = f"Incorrect API key provided: {key}." if key else "You didn't provide an API key."
        return refusal(401, words, "invalid_request_error", "invalid_api_key")  # with the key: it must not spread

    async def _route(self, request: HttpRequest, path: str) -> Reply:
        if path in MODEL_PATHS and request.method == "POST":
            return await self._call(path, json.loads(request.body))
        if path.startswith("/models") and request.method == "GET":
            return self._models(path.removeprefix("/models").removeprefix("/"))
        if path.startswith(("/files", "/batches")):
            return await self._batch_call(request, path)
        return refusal(404, f"Invalid URL ({request.method} {request.path})", "invalid_request_error")

    def _models(self, name: str) -> Reply:
        more = {"shutdown_date": self.options.shutdown_date} if self.options.shutdown_date else {}
        listed = [
            {"id": model, "object": "model", "created": 1_700_000_000, "owned_by": "loopback", **more}
            for model in self.options.models
        ]
        if not name:
            return json_reply({"object": "list", "data": listed})
        found = [entry for entry in listed if entry["id"] == name]
        return json_reply(found[0]) if found else self._no_such_model(name)

    def _no_such_model(self, name: str) -> Reply:
        words = f"The model `{name}` does not exist or you do not have access to it."
        return refusal(404, words, "invalid_request_error", "model_not_found")

    async def _call(self, path: str, body: Json) -> Reply:
        """A call to a model: billed when it arrives, whatever becomes of the connection."""
        options = self.options
        mistake = models.mistake_in(path, body)
        if mistake is not None:
            return refusal(400, mistake, "invalid_request_error")
        if body["model"] not in options.models:
            return self._no_such_model(body["model"])
        over_limit = self._over_limit(body)
        if over_limit is not None:
            return over_limit
        request = models.sha256_of(models.without_complaints(path, body))
        what = self._fate.draw(request, options.plan, options.faults, options.seed)
        limits = self._limit_headers()
        if what in FREE_FAULTS:
            await asyncio.sleep(0 if what == "rate_limited" else options.latency_s)
            return self._free_fault(what)
        answer = self._answer(path, body, request, what)
        await asyncio.sleep(options.latency_s + (options.slow_s if what == "slow" else 0))
        return cut_off(json_reply(answer, headers=limits), what)

    def _answer(self, path: str, body: Json, request: str, what: str) -> Json:
        system = body["messages"][0]["content"] if "messages" in body else ""
        answer = models.complete(path, body, what, self.options, cached=system in self._system_messages)
        self._system_messages.add(system)
        self.ledger.bill(path, request, models.sha256_of(body), what, answer["usage"])
        if path == "/embeddings":
            return answer
        return {"id": f"chatcmpl-{len(self.ledger.billed)}", "created": int(time.time()), **answer}

    def _over_limit(self, body: Json) -> Reply | None:
        amounts = {"requests": 1.0, "tokens": float(models.tokens_asked(body))}
        now = self.ledger.now()
        waits = {kind: bucket.wait_for(amounts[kind], now) for kind, bucket in self._buckets.items()}
        longest = max(waits, key=lambda kind: waits[kind], default="requests")
        if waits.get(longest, 0.0) > 0:
            return self._rate_limited(longest, waits[longest])
        for kind, bucket in self._buckets.items():
            bucket.take(amounts[kind])
        return None

    def _limit_headers(self) -> dict[str, str]:
        return {name: text for kind, bucket in self._buckets.items() for name, text in bucket.headers(kind).items()}

    def _rate_limited(self, kind: str, wait_s: float) -> Reply:
        words = f"Rate limit reached on {kind} per min. Please try again in {round(wait_s * 1000)}ms."
        headers = {"retry-after-ms": str(math.ceil(wait_s * 1000)), "retry-after": str(math.ceil(wait_s))}
        return refusal(429, words, kind, "rate_limit_exceeded", **headers, **self._limit_headers())

    def _free_fault(self, what: str) -> Reply:
        if what == "rate_limited":
            return self._rate_limited("requests", self.options.retry_after_s)
        if what == "quota":
            words = "You exceeded your current quota, please check your plan and billing details."
            return refusal(429, words, "insufficient_quota", "insufficient_quota")
        if what == "bad_request":
            return refusal(400, "This request is not to the server's liking.", "invalid_request_error", "bad_request")
        return refusal(500, "The server had an error while processing your request.", "server_error")

    async def _batch_call(self, request: HttpRequest, path: str) -> Reply:
        """A call to files or batches; what it asks for takes place even if its answer doesn't arrive."""
        options = self.options
        name = f"{request.method} {path}"
        what = self._batch_fate.draw(name, options.batch_plan, options.batch_faults, options.seed)
        if what in FREE_FAULTS:
            return self._free_fault(what)
        writes = request.method == "POST"
        await asyncio.sleep(options.before_commit_s if writes else 0)
        collection, _, rest = path.removeprefix("/").partition("/")
        answer = self._files_call if collection == "files" else self._batches_call
        reply = answer(request, rest)
        await asyncio.sleep(options.after_commit_s if writes else 0)
        return cut_off(reply, what)

    def _files_call(self, request: HttpRequest, rest: str) -> Reply:
        file_id, _, content = rest.partition("/")
        if request.method == "POST":
            form = read_form(request)
            filename, data = form["file"]
            return json_reply(self._files.add(filename or "upload", form["purpose"][1].decode(), data).as_json())
        if not file_id:
            purpose = request.query.get("purpose")
            files = [file.as_json() for file in reversed(self._files.by_id.values())]
            return json_reply(page_of([file for file in files if purpose in (None, file["purpose"])], request.query))
        file = self._files.by_id.get(file_id)
        if file is None:
            return refusal(404, f"No such File object: {file_id}", "invalid_request_error")
        if request.method == "DELETE":
            del self._files.by_id[file_id]
            return json_reply({"id": file_id, "object": "file", "deleted": True})
        if content:
            return Reply(200, file.content, {"Content-Type": "application/octet-stream"})
        return json_reply(file.as_json())

    def _batches_call(self, request: HttpRequest, rest: str) -> Reply:
        batch_id, _, action = rest.partition("/")
        if request.method == "POST" and not batch_id:
            body = json.loads(request.body)
            if body["input_file_id"] not in self._files.by_id:
                return refusal(400, f"No such File object: {body['input_file_id']}", "invalid_request_error")
            return json_reply(self._batches.create(body).as_json())
        self._batches.advance()
        if not batch_id:
            return json_reply(page_of(self._batches.newest_first(), request.query))
        batch = self._batches.by_id.get(batch_id)
        if batch is None:
            return refusal(404, f"No batch found with id '{batch_id}'.", "invalid_request_error")
        if action == "cancel":
            self._batches.cancel(batch)
        return json_reply(batch.as_json())


def cut_off(reply: Reply, fault: str) -> Reply:
    """The answer, to be broken off if that is the fault."""
    return replace(reply, cut=fault) if fault in ("reset", "half_body") else reply


def options_from(values: Json) -> Options:
    """Options from JSON, whose lists are tuples here."""
    given: Json = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return Options(**given)
