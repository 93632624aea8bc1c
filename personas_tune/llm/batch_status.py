"""What a batch's object says."""

import re
import sys

from openai.types import Batch

OVER = ("completed", "expired", "cancelled")
_LIMIT = re.compile(r"Limit: ([\d,]+)")


def is_over(batch: Batch) -> bool:
    """Whether nothing more will come, and what came can be fetched."""
    return batch.status in OVER and (batch.output_file_id is not None or n_answered(batch) == 0)


def n_answered(batch: Batch) -> int:
    """How many of its requests are answered."""
    return batch.request_counts.completed if batch.request_counts else 0


def codes_of(batch: Batch) -> set[str | None]:
    """Why the server turned it away, in its codes."""
    return {error.code for error in (batch.errors and batch.errors.data) or []}


def words_in(batch: Batch) -> str:
    """Why the server turned the batch away, in its own words."""
    errors = (batch.errors and batch.errors.data) or []
    words = [
        f"{error.message or error.code}{'' if error.line is None else f' (line {error.line})'}" for error in errors
    ]
    return " ".join(words[:3]) or "no reason given"


def limit_in(words: str) -> int:
    """How many tokens may be enqueued, if the words tell."""
    found = _LIMIT.search(words)
    return int(found[1].replace(",", "")) if found else sys.maxsize
