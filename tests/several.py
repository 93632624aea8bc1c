"""Several processes for tests: as threads that share a store, or as real ones that can be killed."""

import os
import pickle
import runpy
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from threading import RLock
from typing import Any

from torch.distributed import HashStore, TCPStore
from tqdm import tqdm

from personas_tune.processes import Processes, joined

# Processes are forked from one that has imported what takes long.
FORK = get_context("forkserver")
FORK.set_forkserver_preload(["several", "persona_raft", "persona_lora", "persona_eval", "torch._dynamo"])
HANGS_AFTER = 120  # seconds


@dataclass(frozen=True)
class Outcome:
    """What a recipe printed, and its exit status."""

    status: int
    out: str
    err: str


def in_threads(work: Callable[[Processes], Any], size: int) -> list[Any]:
    """Run ``work`` as several processes would, each in a thread; gives what each returns, by rank."""
    store = HashStore()
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: work(Processes(rank, size, store)), range(size)))


def in_processes(work: Callable[[Processes], Any], size: int) -> list[Any]:
    """Run ``work``, a function of a module, in processes of its own; gives what each returns, by rank."""
    store = _store()
    pipes = [FORK.Pipe(duplex=False) for _ in range(size)]
    for rank, (_, sender) in enumerate(pipes):
        FORK.Process(target=_work, args=(work, _variables(store, rank, size), sender), daemon=True).start()
        sender.close()
    values = []
    for receiver, _ in pipes:
        assert receiver.poll(HANGS_AFTER), "it hangs"
        values.append(pickle.loads(receiver.recv_bytes()))
    return values


class Started:
    """A recipe in one or several processes; the test stands for torchrun, and holds their store.

    Args:
        recipe: Its name.
        config: The YAML.
        root: Becomes ``output_dir``; what is printed goes into a folder beside it.
        overrides: Of keys.
        size: How many processes.
    """

    def __init__(self, recipe: str, config: Path, root: Path, *overrides: str, size: int = 1) -> None:
        self._folder = root.parent / "output"
        self._folder.mkdir(exist_ok=True)
        self._store = _store()
        words = [recipe, "--config", str(config), f"output_dir={root}", *overrides]
        self._processes = [
            FORK.Process(target=_run, args=(words, _variables(self._store, rank, size), str(self._folder / str(rank))))
            for rank in range(size)
        ]
        for process in self._processes:
            process.start()

    def wait_until(self, happened: Callable[[], bool]) -> bool:
        """Look again and again; give whether it happened before one of the processes ended."""
        while all(process.is_alive() for process in self._processes):
            if happened():
                return True
            time.sleep(0.001)
        return False

    def send(self, number: int, ranks: Sequence[int] | None = None) -> list[Outcome]:
        """Send a signal to some of the processes, or to all of them, and wait for their ends."""
        for rank in range(len(self._processes)) if ranks is None else ranks:
            process = self._processes[rank]
            if process.is_alive():
                os.kill(process.pid, number)
        return self.end()

    def end(self) -> list[Outcome]:
        """Wait for all; give what each has printed, and how it ended."""
        deadline = time.monotonic() + HANGS_AFTER
        for process in self._processes:
            process.join(max(0, deadline - time.monotonic()))
        hanging = [rank for rank, process in enumerate(self._processes) if process.exitcode is None]
        for rank in hanging:
            os.kill(self._processes[rank].pid, signal.SIGKILL)
        assert not hanging, f"{hanging} hang"
        return [self._outcome(rank, process.exitcode) for rank, process in enumerate(self._processes)]

    def _outcome(self, rank: int, status: int) -> Outcome:
        texts = [self._folder / f"{rank}.{stream}" for stream in ("out", "err")]
        return Outcome(status, *(text.read_text() if text.exists() else "" for text in texts))


def _store() -> TCPStore:
    return TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=HANGS_AFTER))


def _variables(store: TCPStore, rank: int, size: int) -> dict[str, str]:
    """What torchrun tells a process; that it is the only one takes nothing."""
    if size == 1:
        return {}
    return {
        "WORLD_SIZE": str(size), "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip


def _run(words: list[str], variables: dict[str, str], output: str) -> None:
    """In the child: what `tune run` does, with what it prints in files."""
    for number, stream in ((1, "out"), (2, "err")):
        with Path(f"{output}.{stream}").open("w") as file:
            os.dup2(file.fileno(), number)
    tqdm.set_lock(RLock())  # its own would outlive a kill
    os.environ.update(variables)
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__")


def _work(work: Callable[[Processes], Any], variables: dict[str, str], sender: Connection) -> None:
    os.environ.update(variables)
    with joined() as processes:
        value = work(processes)
    sender.send_bytes(pickle.dumps(value))
