"""Several processes for tests: as threads that share a store, or as real ones."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch.distributed import HashStore

from personas_tune.processes import Processes


def in_threads(work: Callable[[Processes], Any], size: int) -> list[Any]:
    """Run ``work`` as several processes would, each in a thread; gives what each returns, by rank."""
    store = HashStore()
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: work(Processes(rank, size, store)), range(size)))
