"""A stand-in for the Hugging Face Hub on a loopback socket: what was asked of it, and what it holds.

It takes every file within the commit. The real one has large files, weights among them, uploaded apart (LFS); that part
of the client never runs here.
"""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Hub:
    """A running hub.

    Args:
        url: Where it listens.
        token: The one that may write; others are refused.
        repositories: Whether each is private, by name.
        files: Of each repository, contents by path.
        requests: Method and path of every request.
    """

    url: str
    token: str
    repositories: dict[str, bool] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)


@contextmanager
def start_hub(token: str = "hf_good") -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}", token)
    server.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._answer_any()

    def do_HEAD(self) -> None:
        self._answer_any()

    def do_POST(self) -> None:
        self._answer_any()

    def log_message(self, *arguments: Any) -> None:
        pass

    def _answer_any(self) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.requests.append(f"{self.command} {self.path}")
        if self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self._answer(401, {"error": "Invalid username or password."})
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            known = name in hub.repositories
            private = asked.get("private") or asked.get("visibility") == "private"  # older clients and newer ones
            hub.repositories.setdefault(name, bool(private))
            return self._answer(409 if known else 200, {"url": f"{hub.url}/{name}"})
        if path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        repository = "/".join(path.split("/")[3:5])
        if "/preupload/" in path:
            files = [{"path": each["path"], "uploadMode": "regular"} for each in json.loads(body)["files"]]
            return self._answer(200, {"files": [{**each, "shouldIgnore": False, "oid": None} for each in files]})
        if "/tree/" in path:
            files = hub.files.get(repository, {})
            return self._answer(200, [{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in files])
        if "/commit/" in path:
            return self._answer(200, self._commit(hub, repository, body))
        return self._answer(200, {"id": repository, "sha": "0" * 40, "siblings": [], "private": True})

    def _commit(self, hub: Hub, repository: str, body: bytes) -> dict[str, Any]:
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                content = base64.b64decode(entry["value"]["content"])
                hub.files.setdefault(repository, {})[entry["value"]["path"]] = content
            if entry["key"] == "deletedFile":
                del hub.files[repository][entry["value"]["path"]]
        return {"success": True, "commitUrl": f"{hub.url}/{repository}/commit/1", "commitOid": "1" * 40}

    def _answer(self, status: int, value: Any) -> None:
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)
