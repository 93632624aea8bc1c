"""Just enough of HTTP/1.1: keep-alive, Content-Length and chunked bodies, and broken answers on demand."""

import asyncio
import json
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, urlsplit

REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 429: "Too Many Requests"}


@dataclass(frozen=True)
class HttpRequest:
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]  # names in lower case
    body: bytes


@dataclass(frozen=True)
class Reply:
    """An answer; ``cut`` breaks it off."""

    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)
    cut: str | None = None  # reset or half_body


def json_reply(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Reply:
    return Reply(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})


Handler = Callable[[HttpRequest], Awaitable[Reply]]


class Connection(asyncio.Protocol):
    """One client connection; requests on it are answered one after the other.

    A request that has arrived is worked off even if the client is gone by then, as a real server would.
    """

    def __init__(self, handle: Handler) -> None:
        self._handle = handle
        self._buffer = bytearray()
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._serve_next()

    def _serve_next(self) -> None:
        if self._task is None and (request := take_request(self._buffer)) is not None:
            self._task = asyncio.get_running_loop().create_task(self._serve(request))

    async def _serve(self, request: HttpRequest) -> None:
        try:
            reply = await self._handle(request)
        except Exception as error:
            self._transport.abort()
            raise AssertionError(f"{request.method} {request.path}") from error
        self._task = None
        if not self._transport.is_closing():
            self._send(reply)
            self._serve_next()

    def _send(self, reply: Reply) -> None:
        if reply.cut == "reset":
            linger = struct.pack("ii", 1, 0)  # close() then sends RST
            self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self._transport.abort()
            return
        lines = [f"HTTP/1.1 {reply.status} {REASONS.get(reply.status, 'Error')}"]
        lines += [f"{name}: {value}" for name, value in reply.headers.items()]
        lines.append(f"Content-Length: {len(reply.body)}\r\n\r\n")
        body = reply.body[: len(reply.body) // 2] if reply.cut == "half_body" else reply.body
        self._transport.write("\r\n".join(lines).encode() + body)
        if reply.cut == "half_body":
            self._transport.close()


def take_request(buffer: bytearray) -> HttpRequest | None:
    """Take the first request out of what was received; None while it is incomplete."""
    end = buffer.find(b"\r\n\r\n")
    if end < 0:
        return None
    first, *lines = buffer[:end].decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    taken = _take_body(buffer, end + 4, headers)
    if taken is None:
        return None
    body, length = taken
    del buffer[:length]
    method, target, _ = first.split(" ")
    url = urlsplit(target)
    return HttpRequest(method, url.path, dict(parse_qsl(url.query)), headers, body)


def _take_body(buffer: bytearray, start: int, headers: dict[str, str]) -> tuple[bytes, int] | None:
    """The body and where the request ends."""
    if headers.get("transfer-encoding") == "chunked":
        return _take_chunks(buffer, start)
    end = start + int(headers.get("content-length", "0"))
    return None if len(buffer) < end else (bytes(buffer[start:end]), end)


def _take_chunks(buffer: bytearray, start: int) -> tuple[bytes, int] | None:
    body = b""
    while (line := buffer.find(b"\r\n", start)) >= 0:
        size = int(buffer[start:line].split(b";")[0], 16)
        start = line + 2 + size + 2
        if len(buffer) < start:
            return None
        if size == 0:
            return body, start
        body += buffer[line + 2 : line + 2 + size]
    return None
