"""Uploaded files."""

import time
from dataclasses import dataclass, field
from typing import Any

from loopback.http import HttpRequest

Json = dict[str, Any]


@dataclass(frozen=True)
class StoredFile:
    id: str
    filename: str
    purpose: str
    content: bytes
    created_at: int

    def as_json(self) -> Json:
        return {
            "id": self.id, "object": "file", "bytes": len(self.content), "created_at": self.created_at,
            "filename": self.filename, "purpose": self.purpose, "status": "processed", "status_details": None,
        }  # fmt: skip


@dataclass
class Files:
    by_id: dict[str, StoredFile] = field(default_factory=dict)
    n_made: int = 0

    def add(self, filename: str, purpose: str, content: bytes) -> StoredFile:
        self.n_made += 1
        file = StoredFile(f"file-{self.n_made:06}", filename, purpose, content, int(time.time()))
        self.by_id[file.id] = file
        return file


def read_form(request: HttpRequest) -> dict[str, tuple[str | None, bytes]]:
    """The fields of a multipart form: file name, content."""
    _, _, boundary = request.headers["content-type"].partition("boundary=")
    fields = {}
    for part in request.body.split(b"--" + boundary.strip('"').encode())[1:-1]:
        head, _, content = part.partition(b"\r\n\r\n")
        words = dict(
            word.strip().split("=", 1)
            for line in head.decode().split("\r\n")
            if line.lower().startswith("content-disposition")
            for word in line.split(";")[1:]
        )
        filename = words.get("filename")
        fields[words["name"].strip('"')] = (filename and filename.strip('"'), content.removesuffix(b"\r\n"))
    return fields


def page_of(newest_first: list[Json], query: dict[str, str]) -> Json:
    """One page of a listing, by ``after`` and ``limit``."""
    ids = [entry["id"] for entry in newest_first]
    start = ids.index(query["after"]) + 1 if query.get("after") in ids else 0
    end = start + min(100, int(query.get("limit", "20")))
    page = newest_first[start:end]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": end < len(newest_first),
    }
