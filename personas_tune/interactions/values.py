"""What one value of a log looks like as text: how to read it, and which is the bad one after a fast reader gave up."""

import re

import pyarrow as pa

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_ZONED_DATE = re.compile(r"\d{4}-\d\d.*\d(Z|[+-]\d\d(:?\d\d)?)")
_DATE = re.compile(r"\d{4}-\d\d.*")
NUMBER, DATE, ZONED_DATE = pa.float64(), pa.timestamp("us"), pa.timestamp("us", "UTC")


def time_type(text: str) -> pa.DataType:
    """How a log's times are to be read if one is written so: as numbers, ISO dates, or ISO dates with a zone."""
    text = text.strip()
    # A date's last part looks like a zone: only behind a time of day is it one.
    if ":" in text and _ZONED_DATE.fullmatch(text):
        return ZONED_DATE
    return DATE if _DATE.fullmatch(text) else NUMBER


def id_text(value: str | float) -> str:
    """An id as text; a whole float, as pandas writes integers beside gaps, loses its ``.0``."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def value_problem(column: str, text: str, time: pa.DataType = NUMBER) -> str | None:
    """What is wrong with one value of a log, or None.

    Args:
        column: ``user_id``, ``item_id``, ``rating`` or ``timestamp``.
        text: The value as it stands in the file.
        time: How the log's times are read: the :func:`time_type` of the first.
    """
    if column in ("user_id", "item_id"):
        return None if text.strip() else f"empty {column}"
    if column == "timestamp" and time != NUMBER:
        wanted = "with a zone (2024-05-01T12:30:00Z)" if time == ZONED_DATE else "without a zone (2024-05-01 12:30:00)"
        problem = f"timestamp {text!r} is not an ISO date {wanted}, and the column begins with a date"
        return None if _is_date(text, time) else problem
    return None if _NUMBER.fullmatch(text.strip()) else f"{column} {text!r} is not a number"


def _is_date(text: str, time: pa.DataType) -> bool:
    try:
        pa.scalar(text.strip()).cast(time)
    except pa.ArrowInvalid:
        return False
    return True
