"""Addresses of servers that can be shown and stored."""

from urllib.parse import urlsplit, urlunsplit


def bare_address(address: str) -> str:
    """An address without user, password and query; empty if it is none.

    Example:
        >>> bare_address("http://me:secret@localhost:8000/v1?key=1")
        'http://localhost:8000/v1'
    """
    try:
        parts = urlsplit(address)
    except ValueError:  # whoever uses it will say so
        return ""
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
