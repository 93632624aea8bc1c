"""Warns of a model that is about to go, from what ``GET /models/{model}`` says of it."""

import json
from datetime import UTC, date, datetime

WARN_DAYS = 90


def shutdown_warning(model: str, body: str) -> str | None:
    """What to tell the user if the model goes within 90 days; many servers don't say.

    Args:
        model: Its name.
        body: What the server answered.
    """
    day = shutdown_date_in(body)
    if day is None or (day - datetime.now(UTC).date()).days > WARN_DAYS:
        return None
    return f"warning: {model} is to be shut down on {day}: name another model by then"


def shutdown_date_in(body: str) -> date | None:
    """The day, if it is told in a way that can be read."""
    try:
        told = json.loads(body)["shutdown_date"]
        if isinstance(told, str):
            return date.fromisoformat(told[:10])
        return datetime.fromtimestamp(told, UTC).date()
    except (ValueError, LookupError, TypeError, OverflowError, OSError, RecursionError):
        return None
