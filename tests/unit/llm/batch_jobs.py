"""A small job for the Batch API, and processes in which it runs and may be killed.

As a program it forks a process for each line of its input, which spares these the imports.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from personas_tune.config import exit_status_of
from personas_tune.llm.batch_ledger import Ledger
from personas_tune.llm.batches import run_batches
from personas_tune.llm.calls import CHAT, Call, Chain, Rejected, Request
from personas_tune.llm.journal import Journal
from personas_tune.llm.replay import finished_chains
from personas_tune.llm.settings import ServerSettings

N_USERS = 6
Chains = Iterator[tuple[str, Chain[str]]]


def read_profile(body: str) -> str:
    try:
        return str(json.loads(json.loads(body)["choices"][0]["message"]["content"])["profile"])
    except (ValueError, KeyError, TypeError):
        raise Rejected("there is no JSON with a profile") from None


def question(text: str, max_words: int = 60) -> Call:
    messages = [{"role": "system", "content": "Answer in JSON."}, {"role": "user", "content": text}]
    return Call(Request(CHAT, {"model": "gpt-4o", "messages": messages}, "v1"), read_profile, max_words)


def reflect(user: str, n_steps: int, version: str = "") -> Chain[str]:
    """A chain of that many calls, each of which holds what the one before it answered."""
    profile = "(nothing yet)"
    for step in range(n_steps):
        line = f"1. Film {step} of {user}{version} | genres: Drama | MY RATING: {1 + step % 5} of 5"
        profile = yield question(f"MY PROFILE SO FAR\n{profile}\n\nWHAT I RATED NEXT, OLDEST FIRST\n{line}")
    return profile


def chains(n_users: int = N_USERS, version: str = "") -> Chains:
    """Users of one, two and three steps."""
    for number in range(n_users):
        yield f"u{number}", reflect(f"u{number}", 1 + number % 3, version)


def run_job(folder: Path, base_url: str, *, die_before: str | None = None, **options: Any) -> list[str]:
    """Run the job on a journal in ``folder`` and return what its users came to."""
    n_users, version = options.pop("n_users", N_USERS), options.pop("version", "")
    arguments = {"max_tries": 3, "poll_s": 0.01, "max_requests": 4} | options
    bounds = arguments.pop("bounds", {})
    with Journal.open(folder / "journal.sqlite") as journal:
        if die_before is not None:
            die_before_it_is_noted(journal, die_before)
        incomplete = run_batches(
            lambda: chains(n_users, version),
            journal=journal,
            server=ServerSettings("gpt-4o", base_url=base_url, **bounds),
            folder=folder / "batches",
            **arguments,
        )
        return [*finished_chains(chains(n_users, version), journal, leave_out=incomplete), *incomplete.values()]


def die_before_it_is_noted(journal: Journal, state: str) -> None:
    """Have the process killed at the moment at which it is about to note that a shard has come so far."""
    journal._connection.create_function("die", 0, lambda: os.kill(os.getpid(), signal.SIGKILL))
    Ledger(journal)  # makes the tables
    for event in ("INSERT", "UPDATE"):
        journal.execute(
            f"CREATE TEMP TRIGGER die_{event} BEFORE {event} ON main.batch_shards WHEN new.state = '{state}' "
            "BEGIN SELECT die(); END"
        )


@dataclass
class Job:
    """A job in a process of its own."""

    host: "subprocess.Popen[str]"
    pid: int
    output: Path

    def kill(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> tuple[int, str]:
        """How it ended, and what it wrote to standard error."""
        return int(tell(self.host, str(self.pid))), self.output.read_text(encoding="utf-8")


def start_job(host: "subprocess.Popen[str]", folder: Path, base_url: str, **options: Any) -> Job:
    values = {"folder": str(folder), "base_url": base_url, **options}
    return Job(host, int(tell(host, json.dumps(values))), folder / "stderr")


def tell(host: "subprocess.Popen[str]", line: str) -> str:
    assert host.stdin is not None
    assert host.stdout is not None
    print(line, file=host.stdin, flush=True)
    return host.stdout.readline()


@contextmanager
def start_host() -> "Iterator[subprocess.Popen[str]]":
    command = [sys.executable, __file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as host:
        yield host


def fork_job(folder: str, **options: Any) -> int:
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(f"{folder}/stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os._exit(exit_status_of(lambda: run_job(Path(folder), **options) and None))
    return pid


if __name__ == "__main__":
    for line in sys.stdin:  # a job to start, or the id of a process to wait for
        task = json.loads(line)
        answer = fork_job(**task) if isinstance(task, dict) else os.waitstatus_to_exitcode(os.waitpid(task, 0)[1])
        print(answer, flush=True)
