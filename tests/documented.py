"""Commands of the pages: which there are, and whether they are run by a test or marked with what they need."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
INDEX = ROOT / "docs" / "index.md"
NO_COMMAND = re.compile(r"#|$|export |\. |\w+=(?:'[^']*'|\S*)$")  # comments, and what only sets the shell up
MARK = re.compile(r"# (?:needs (?:a GPU|a key|a server|MovieLens)|takes \d+ minutes?)\b")
SHELLS = ("", "sh", "bash", "console")
LINK = re.compile(r"\]\(([\w/.]+\.md)[)#]")


@dataclass(frozen=True)
class Command:
    """A command of a fenced block: where it stands, its words, and the mark that keeps a test from running it."""

    page: str
    line: int
    words: tuple[str, ...]
    mark: str | None

    @property
    def where(self) -> str:
        """How messages call it."""
        return f"{self.page}:{self.line}: {shlex.join(self.words)}"


def pages_in_reading_order() -> list[Path]:
    """README, CONTRIBUTING, the index and what it links to in its order, then all other pages."""
    linked = [INDEX.parent / link for link in LINK.findall(INDEX.read_text(encoding="utf-8"))]
    pages = dict.fromkeys(
        [ROOT / "README.md", ROOT / "CONTRIBUTING.md", INDEX, *linked, *sorted(INDEX.parent.glob("**/*.md"))]
    )
    return [page for page in pages if page.is_file()]


def commands_of(page: Path, root: Path = ROOT) -> list[Command]:
    """All commands in a page's fenced blocks, with their marks."""
    name = str(page.relative_to(root))
    return [
        Command(name, number, _words_of(line, f"{name}:{number}"), mark)
        for number, line, mark in _marked_lines(page.read_text(encoding="utf-8"))
        if not NO_COMMAND.match(line)
    ]


def _words_of(line: str, where: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(line, comments=True))
    except ValueError as error:
        raise ValueError(f"{where}: no command: {line} ({error}); output stands in blocks of language text") from error


def _marked_lines(text: str) -> Iterator[tuple[int, str, str | None]]:
    """Lines of shell blocks with number and mark; a comment line marks what follows it up to a blank line."""
    for block in _shell_blocks(text):
        above = None
        for number, line in _joined(block):
            found = MARK.search(line)
            mark = found.group() if found else None
            if line.startswith("#"):
                above = mark or above
            elif not line:
                above = None
            yield number, line, mark or above


def _shell_blocks(text: str) -> Iterator[list[tuple[int, str]]]:
    """The numbered lines of each fenced block that names no language, or a shell's, and isn't a printed table."""
    language, block = None, list[tuple[int, str]]()
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("```"):
            if language in SHELLS and not (block and block[0][1].startswith("|")):
                yield block
            language, block = (line[3:].strip() if language is None else None), []
        else:
            block.append((number, line.strip()))


def _joined(block: list[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Continued lines as one, under the first one's number."""
    start, begun = 0, ""
    for number, line in block:
        start, begun = (start, f"{begun} {line}") if begun else (number, line)
        if begun.endswith("\\"):
            begun = begun.removesuffix("\\").rstrip()
        else:
            yield start, begun
            begun = ""
