"""Lines of a text file, compressed or not, with a decoding mistake told by its row."""

import codecs
import gzip
import zlib
from collections.abc import Iterator, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import BinaryIO, cast

from personas_tune.errors import ConfigError, DataError, PersonasTuneError

_CHUNK = 1 << 20


def suffix_of(path: Path) -> str:
    """The file's suffix in lower case, ``.gz`` aside: ``.csv`` for ``ratings.csv.gz``."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def text_lines(path: Path, encoding: str = "utf-8") -> Iterator[str]:
    """Every line with its line end; a byte order mark is skipped.

    Raises:
        ConfigError: If there is no such encoding.
        DataError: For bytes that aren't text in that encoding, naming their row, or a damaged ``.gz``.
    """
    check_encoding(encoding)
    try:
        with _open(path) as binary, TextIOWrapper(binary, encoding=_skipping_mark(encoding), newline="") as text:
            yield from text
    except UnicodeError as error:
        raise _undecodable(path, encoding) from error
    except (EOFError, OSError, zlib.error) as error:
        raise unreadable(path, error) from error


def read_bytes(path: Path) -> bytes:
    """All bytes of a file, decompressed.

    Raises:
        DataError: For a damaged ``.gz``.
    """
    try:
        with _open(path) as binary:
            return binary.read()
    except (EOFError, OSError, zlib.error) as error:
        raise unreadable(path, error) from error


def pick_encoding(path: Path, candidates: Sequence[str]) -> str:
    """The first encoding in which the whole file is text; the first of all when there is none."""
    return next((encoding for encoding in candidates if _decodes(path, encoding)), candidates[0])


def check_encoding(encoding: str) -> None:
    """Raise a :class:`ConfigError` for an encoding that Python doesn't know."""
    try:
        codecs.lookup(encoding)
    except LookupError:
        remedy = "use utf-8, latin-1, cp1252, utf-16, ..."
        raise ConfigError(f"unknown encoding {encoding!r}", where="data.encoding", remedy=remedy) from None


def first_line(error: BaseException) -> str:
    """An error's message, or its kind when it has none, as one line."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def unreadable(path: Path, error: BaseException) -> DataError:
    """The error of a file that can't be read to its end."""
    what = f"can't be read to its end ({first_line(error)})"
    return DataError(what, where=str(path), remedy="fetch or write the file again")


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix.lower() == ".gz" else path.open("rb")


def _skipping_mark(encoding: str) -> str:
    return "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding


def _decodes(path: Path, encoding: str) -> bool:
    check_encoding(encoding)
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        with _open(path) as binary:
            while chunk := binary.read(_CHUNK):
                decoder.decode(chunk)
            decoder.decode(b"", final=True)
    except (UnicodeError, EOFError, OSError, zlib.error):
        return False
    return True


def _undecodable(path: Path, encoding: str) -> PersonasTuneError:
    """The decoding mistake with its row; a second, slower reading that only a bad file costs."""
    content = read_bytes(path)
    remedy = f"set data.encoding to the file's own, such as {'utf-8' if 'latin' in encoding else 'latin-1'}"
    try:
        content.decode(encoding)
    except UnicodeDecodeError as error:
        row = content.count(b"\n", 0, error.start) + 1
        what = f"byte 0x{content[error.start]:02x} is not {encoding} text"
        return DataError(what, where=f"{path} row {row}", remedy=remedy)
    except UnicodeError:
        pass
    return DataError(f"not {encoding} text", where=str(path), remedy=remedy)
