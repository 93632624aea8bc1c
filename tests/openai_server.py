"""A server on loopback that speaks the OpenAI API, fails as told and notes what it bills.

    with start_server(latency_s=0.02, faults={"rate_limited": 0.15}) as server:
        client = openai.OpenAI(base_url=server.base_url, api_key="none")
        ...
        server.billed()  # every billed answer, whether it arrived or not

By hand: ``python tests/openai_server.py --port 8000 --set latency_s=0.2 --set 'faults={"reset": 0.04}'``.
It runs in a process of its own, on the standard library alone. All options: ``loopback/options.py``.
"""

import argparse
import asyncio
import contextlib
import gc
import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # for benchmarks, which load this file by its path

from loopback.app import App, options_from
from loopback.http import Connection

Json = dict[str, Any]


@dataclass(frozen=True)
class Server:
    """A running server, seen by a test."""

    port: int

    @property
    def base_url(self) -> str:
        return f"{self.root}/v1"

    @property
    def root(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def billed(self) -> list[Json]:
        """What was billed, oldest first.

        Each: ``n``; ``path``; ``request``, a sha256 of path and body without complaints (messages behind the second);
        ``body``, that of the whole body; ``what``, a fault or "ok"; ``usage``; ``batch``, its id or None; ``at``.
        """
        found: list[Json] = self._get("billed")
        return found

    def requests(self) -> list[Json]:
        """The latest 50,000 requests: ``n, method, path, at, n_bytes, has_key, user_agent, outcome``.

        ``outcome`` is the status, "reset" or "half_body"; None while the request is under way.
        """
        found: list[Json] = self._get("requests")
        return found

    def batches(self) -> list[Json]:
        """All batches, oldest first."""
        found: list[Json] = self._get("batches")
        return found

    def files(self) -> list[Json]:
        """All files, oldest first."""
        found: list[Json] = self._get("files")
        return found

    def counts(self) -> Json:
        """Sums: billed (by fault or "ok"), input_tokens, output_tokens, requests, connections, most_under_way.

        And asked (requests by method and path, an id in it written ID), and under_way: those of this moment.
        """
        found: Json = self._get("counts")
        return found

    def set(self, **options: Any) -> None:
        """Change options; a plan that is given starts at its first fault."""
        request = urllib.request.Request(f"{self.root}/_set", json.dumps(options).encode(), method="POST")
        with urllib.request.urlopen(request):
            pass

    def _get(self, view: str) -> Any:
        with urllib.request.urlopen(f"{self.root}/_log/{view}") as answer:
            return json.load(answer)


@contextlib.contextmanager
def start_server(**options: Any) -> Iterator[Server]:
    """Run a server until the block ends, or until this process does."""
    options_from(options)  # a mistake is told here
    command = [sys.executable, __file__, "--until-stdin-closes"]
    for name, value in options.items():
        command += ["--set", f"{name}={json.dumps(value)}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield Server(int(process.stdout.readline().split(":")[-1]))
        finally:
            process.stdin.close()
            process.wait()


async def serve(app: App, port: int, until_stdin_closes: bool) -> None:
    loop = asyncio.get_running_loop()

    def connect() -> Connection:
        app.ledger.connections += 1
        return Connection(app.handle)

    server = await loop.create_server(connect, "127.0.0.1", port, backlog=2048)
    print(f"listening on 127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    if until_stdin_closes:
        await loop.run_in_executor(None, sys.stdin.read)
    else:
        await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=JSON")
    parser.add_argument("--until-stdin-closes", action="store_true")
    words = parser.parse_args()
    values = {name: json.loads(text) for name, _, text in (word.partition("=") for word in words.set)}
    gc.freeze()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(App(options_from(values)), words.port, words.until_stdin_closes))


if __name__ == "__main__":
    main()
