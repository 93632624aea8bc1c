"""tiktoken's copies of tokenizer files, and how not to read them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

_CACHE = "TIKTOKEN_CACHE_DIR"


@contextmanager
def read_afresh() -> Iterator[None]:
    """Have tiktoken read the files that are named.

    Left alone, it copies each file to a folder under /tmp by the path as it was written, and reads the copy ever
    after: a tokenizer that was trained again, or one at the same relative path elsewhere, would not be seen.
    """
    before = os.environ.get(_CACHE)
    os.environ[_CACHE] = ""  # tiktoken's way to switch its copies off
    try:
        yield
    finally:
        if before is None:
            del os.environ[_CACHE]
        else:
            os.environ[_CACHE] = before
