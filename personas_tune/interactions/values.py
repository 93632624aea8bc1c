"""What one value of a log must look like as text, to name the bad one after a fast reader gave up."""

import re
from datetime import datetime

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def is_date(text: str) -> bool:
    """Whether a time is written as a date (ISO 8601) rather than as a number."""
    text = text.strip()
    return bool(re.match(r"\d{4}-\d\d", text))


def value_problem(column: str, text: str, dates: bool = False) -> str | None:
    """What is wrong with one value of a log, or None.

    Args:
        column: ``user_id``, ``item_id``, ``rating`` or ``timestamp``.
        text: The value as it stands in the file.
        dates: Whether the log's times are dates.
    """
    if column in ("user_id", "item_id"):
        return None if text.strip() else f"empty {column}"
    good = _is_iso_time(text) if column == "timestamp" and dates else _NUMBER.fullmatch(text.strip())
    wanted = "an ISO date, as the first row's is" if column == "timestamp" and dates else "a number"
    return None if good else f"{column} {text!r} is not {wanted}"


def _is_iso_time(text: str) -> bool:
    try:
        datetime.fromisoformat(text.strip())
    except ValueError:
        return False
    return True
