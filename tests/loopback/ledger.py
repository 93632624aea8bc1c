"""What the server was asked and what it billed."""

import re
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]
N_REQUESTS_KEPT = 50_000
_ID = re.compile(r"(?<=/)(file-|batch_)\d+")


@dataclass
class Ledger:
    """Everything billed, and the latest requests; times are seconds since the server's start."""

    billed: list[Json] = field(default_factory=list)
    requests: deque[Json] = field(default_factory=lambda: deque(maxlen=N_REQUESTS_KEPT))
    asked: Counter[str] = field(default_factory=Counter)  # "POST /v1/files" and so on, ids left out
    under_way: int = 0
    most_under_way: int = 0
    connections: int = 0
    _started: float = field(default_factory=time.monotonic)

    def now(self) -> float:
        return time.monotonic() - self._started

    def bill(self, path: str, request: str, body: str, what: str, usage: Json, batch: str | None = None) -> None:
        self.billed.append(
            {
                "n": len(self.billed), "path": path, "request": request, "body": body, "what": what, "usage": usage,
                "batch": batch, "at": self.now(),
            }
        )  # fmt: skip

    def arrive(self, method: str, path: str, headers: dict[str, str], n_bytes: int) -> Json:
        entry = {
            "n": self.asked.total(), "method": method, "path": path, "at": self.now(), "n_bytes": n_bytes,
            "has_key": "authorization" in headers, "user_agent": headers.get("user-agent", ""), "outcome": None,
        }  # fmt: skip
        self.asked[f"{method} {re.sub(_ID, 'ID', path)}"] += 1
        self.requests.append(entry)
        return entry

    def counts(self) -> Json:
        usages = [entry["usage"] for entry in self.billed]
        return {
            "billed": dict(Counter(entry["what"] for entry in self.billed)),
            "input_tokens": sum(usage["prompt_tokens"] for usage in usages),
            "output_tokens": sum(usage.get("completion_tokens", 0) for usage in usages),
            "requests": self.asked.total(),
            "asked": dict(self.asked),
            "under_way": self.under_way,
            "most_under_way": self.most_under_way,
            "connections": self.connections,
        }
