"""Small calls, chains and runs for the tests of the online client, and a server that answers as it is told.

As a program it runs a job, and says on standard output when an answer was kept:

    python llm_calls.py '{"journal": "/tmp/journal.sqlite", "base_url": "http://127.0.0.1:8000/v1", "n_users": 3}'
"""

import json
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from personas_tune.config import exit_status_of
from personas_tune.llm.calls import CHAT, Call, Chain, Rejected, Request
from personas_tune.llm.journal import Attempt, Journal, Total, Usage
from personas_tune.llm.online import run_online
from personas_tune.llm.settings import ServerSettings

MODEL = "gpt-4o"
Chains = Iterable[tuple[str, Chain[object]]]
Answer = tuple[int, dict[str, str], bytes | None]  # status, headers, body


def read_reply(body: str) -> str:
    """The word that a helpful server answers."""
    try:
        return str(json.loads(json.loads(body)["choices"][0]["message"]["content"])["reply"])
    except (ValueError, KeyError, TypeError):
        raise Rejected("it is no JSON with a reply") from None


def call(text: str, **body: Any) -> Call:
    messages = [{"role": "system", "content": "Answer in JSON."}, {"role": "user", "content": text}]
    return Call(Request(CHAT, {"model": MODEL, "messages": messages, **body}, "v1"), read_reply, 10)


def steps(*calls: Call) -> Chain[object]:
    for each in calls:  # noqa: UP028  # a tuple is sent nothing
        yield each


def users(n: int, n_steps: int = 1) -> Chains:
    for user in range(n):
        yield f"u{user}", steps(*(call(f"user {user} step {step}") for step in range(n_steps)))


def run(journal: Journal | Path, base_url: str, chains: Chains, *, max_tries: int = 3, **bounds: Any) -> dict[str, str]:
    """Get the chains' calls answered."""
    if isinstance(journal, Path):
        with Journal.open(journal) as opened:
            return run(opened, base_url, chains, max_tries=max_tries, **bounds)
    settings = ServerSettings(**{"model": MODEL, "base_url": base_url, "concurrency": 4, **bounds})
    return run_online(chains, journal=journal, server=settings, max_tries=max_tries, n_calls=None, what="distill")


def totals(journal: Path) -> dict[str, Total]:
    """What the journal holds, by status."""
    with Journal.open(journal) as opened:
        return {total.status: total for total in opened.totals(MODEL)}


def attempt(request: str = "a" * 64, response: str | None = "body", **changes: Any) -> Attempt:
    usual: dict[str, Any] = {
        "status": "answered", "http_status": 200, "usage": Usage(10, 2, 3), "request_id": "req_1", "model": MODEL,
        "via": "online", "started": 1.5, "ended": 2.5,
    }  # fmt: skip
    return Attempt(request, response=response, **{**usual, **changes})


def completion(text: str = '{"reply": "OK."}') -> bytes:
    """A chat completion's body."""
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 4}}
    return json.dumps({"choices": [{"message": {"content": text}}], "usage": usage}).encode()


DRIBBLE = None  # in the place of a body: a byte now and then


class ScriptedServer(ThreadingHTTPServer):
    """Answers calls with what it was given, the last for ever; every other path with 404. Keeps what it was sent."""

    daemon_threads = True

    def __init__(self, answers: Iterable[Answer]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers = list(answers)
        self.sent: list[tuple[str, dict[str, str], Any]] = []  # path, headers in lower case, body
        self.model_status = 404  # of the answer about the model
        self.latency_s = 0.0  # of all answers to calls but the first
        self.n_answered = 0
        self.n_answered_before: list[int] = []  # how many answers had gone out when each call arrived
        self.lock = threading.Lock()
        self.may_end = threading.Event()

    def answer(self, body: Any) -> Answer:
        """The next answer, whatever was asked."""
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    @property
    def calls(self) -> list[Any]:
        """Bodies of the calls that arrived."""
        return [body for path, _, body in self.sent if "/models" not in path]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ScriptedServer

    def do_GET(self) -> None:
        self._answer(None)

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["content-length"]))))

    def _answer(self, body: Any) -> None:
        with self.server.lock:
            self.server.sent.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
            if body is None:
                status, headers, content = self.server.model_status, {}, b"{}"
            else:
                status, headers, content = self.server.answer(body)
                self.server.n_answered_before.append(self.server.n_answered)
            is_first = len(self.server.n_answered_before) < 2
        time.sleep(0 if body is None or is_first else self.server.latency_s)
        with self.server.lock:
            self.server.n_answered += body is not None
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if isinstance(content, bytes):
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        else:
            self._dribble()

    def _dribble(self) -> None:
        """A byte now and then, until the test ends or the client is gone."""
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        try:
            while not self.server.may_end.wait(0.02):
                self.wfile.write(b" ")
        except OSError:
            pass

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@contextmanager
def scripted_server(*answers: Answer) -> Iterator[ScriptedServer]:
    server = ScriptedServer(answers)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.may_end.set()
        server.shutdown()
        thread.join()
        server.server_close()


def error(status: int, message: str = "No.", code: str | None = None, **headers: str) -> Answer:
    """An answer of :class:`ScriptedServer` in OpenAI's form."""
    body = json.dumps({"error": {"message": message, "type": "some_error", "code": code}}).encode()
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, body


def main() -> None:
    job = json.loads(sys.argv[1])
    bounds = job.get("bounds", {})

    def told(chains: Chains) -> Chains:
        for name, chain in chains:
            yield name, _told(chain)

    def work() -> None:
        run(Path(job["journal"]), job["base_url"], told(users(job["n_users"], job.get("n_steps", 1))), **bounds)

    sys.exit(exit_status_of(work))


def _told(chain: Chain[object]) -> Chain[object]:
    answer = None
    while True:
        try:
            asked = chain.send(answer)
        except StopIteration:
            return
        answer = yield asked
        print(asked.request.sha256, flush=True)


if __name__ == "__main__":
    main()
