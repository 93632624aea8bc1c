"""What was looked at and how it stands: a line each, under a heading."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "missing", "note"]


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Args:
        state: ``ok``; ``missing`` if what is to run needs it; ``note`` if it is only worth knowing.
        what: What was found.
        mend: The command or setting that helps.
    """

    state: State
    what: str
    mend: str = ""

    def __str__(self) -> str:
        mend = f"; {self.mend}" if self.mend and self.state != "ok" else ""
        return f"{self.state:<7}  {' '.join(self.what.split())}{mend}"


def found(good: bool, what: str, mend: str = "") -> Finding:
    """A finding of something that is needed, and either there or not."""
    return Finding("ok" if good else "missing", what, mend)


def print_section(title: str, findings: Sequence[Finding]) -> int:
    """Print a heading and its findings, if there are any; gives how many are missing."""
    if findings:
        print(title)
    for finding in findings:
        print(f"  {finding}")
    return sum(finding.state == "missing" for finding in findings)
