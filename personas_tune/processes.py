"""One run in several processes, as torchrun starts them: who is who, and how they talk.

They talk through torchrun's key-value store, so a process can wait for the others as long as it takes,
and still be told that one has failed or that all shall stop. Tensors go by collective operations, which
whoever needs them calls. A run without torchrun is one process, and nothing of torch is loaded for it.
"""

import os
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import is_dataclass
from datetime import timedelta
from io import BytesIO
from pathlib import PurePath
from typing import Any, TypeVar

from personas_tune.errors import ConfigError, OtherProcessFailed, ProcessError

T = TypeVar("T")

_POLL_EVERY = 0.02  # seconds
# torchrun ends all processes once one has ended: whoever has nothing to say lets the one that has be the first.
_SPEAKER_ENDS_WITHIN = 10  # seconds
_SIGNALLED = 128  # from which on an exit status says that a signal ended a process
_LARGEST_VALUE = 4 * 2**20  # bytes; torch's store refuses 8 MiB
_LONGEST_COLLECTIVE = timedelta(hours=2)  # beyond that something hangs
# What torchrun tells a process; without them it is the only one.
_TORCHRUN_VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


class Processes:
    """The processes of a run, as one of them sees it; get it from :func:`joined`.

    Args:
        rank: Which one this is, from 0 on.
        size: How many there are.
        store: A key-value store that all of them reach; None if there is only one.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None) -> None:
        self.rank = rank
        self.size = size
        self._store = store
        self._n_exchanges = 0
        self._has_spoken = False

    @property
    def is_first(self) -> bool:
        """Whether it is this one that prints and writes what there is one of."""
        return self.rank == 0

    def gather(self, value: T, meanwhile: Callable[[], object] = lambda: None) -> list[T]:
        """Exchange a value; every process calls it, and waits until all have.

        Args:
            value: Of this process: plain values, paths, and dataclasses of this package.
            meanwhile: Called again and again while it waits.

        Returns:
            The values of all processes by rank.

        Raises:
            OtherProcessFailed: If one has failed instead.
        """
        if self._store is None:
            return [value]
        keys = self._exchange(value, meanwhile)
        return self._read(keys)

    def gather_in_first(self, value: T) -> list[T]:
        """As :func:`gather`, but only the first process gets the values; the others get an empty list."""
        if self._store is None:
            return [value]
        keys = self._exchange(value, meanwhile=lambda: None)
        return self._read(keys if self.is_first else [])

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first process makes, in all of them; every process calls it. Raises as :meth:`gather` does."""
        if not self.is_first:
            return self.gather(None)[0]  # type: ignore[return-value]
        made = make()
        self.gather(made)
        return made

    @contextmanager
    def held_by_first(self, make: Callable[[], AbstractContextManager[T]]) -> Iterator[T]:
        """Enter a context in the first process only; all of them get what it gives."""
        with ExitStack() as stack:
            yield self.from_first(lambda: stack.enter_context(make()))

    def tell_first(self, value: Any) -> None:
        """Leave a value for the first process, without waiting."""
        self._store.queue_push("told", pickle.dumps(value))

    def told(self) -> Iterator[Any]:
        """In the first process: what the others have left since the last call."""
        while self._store is not None and self._store.queue_len("told"):
            yield _unpack(self._store.queue_pop("told"))

    def ask_to_stop(self, signal_number: int) -> None:
        """Let every process know that this one was told to end."""
        if self._store is not None:
            self._store.set("stop", str(signal_number))

    def asked_to_stop(self) -> int | None:
        """The signal that one of the processes was told to end by."""
        if self._store is None or not self._store.check(["stop"]):
            return None
        return int(self._store.get("stop"))

    @contextmanager
    def one_speaks(self) -> Iterator[None]:
        """Let only the first error of all processes out; the others end without a word.

        Raises:
            OtherProcessFailed: In place of an error, if another process has failed before.
        """
        try:
            yield
        except SystemExit:
            if not self.is_first:
                self._let_speaker_end()
            raise
        except OtherProcessFailed:
            self._let_speaker_end()
            raise
        except BaseException as error:
            if self._may_tell(error):
                self._has_spoken = True
                if _is_of_a_lost_process(error):
                    raise ProcessError(
                        f"another process can't be reached ({' '.join(str(error).split())[:200]})",
                        where="several processes",
                        remedy="see what ended it, and run the same command to go on",
                    ) from error
                raise
            status = getattr(error, "exit_status", 2)
            if status < _SIGNALLED:  # torchrun, which was told to end, too, waits for all
                self._let_speaker_end()
            raise OtherProcessFailed(status) from None

    def part(self) -> None:
        """Wait for all at the end; the first stays to the last, as the store may live in it."""
        self.gather(None)
        self._store.add("gone", 1)
        if self.is_first:
            self._wait_until(lambda: self._store.add("gone", 0) == self.size, lambda: None)

    def _may_tell(self, error: BaseException) -> bool:
        if self._store is None:
            return True
        try:
            return bool(self._store.add("failed", 1) == 1)
        except RuntimeError:  # the store is gone, and so is the process that it lived in: that is all the error says
            return not isinstance(error, RuntimeError)

    def _exchange(self, value: object, meanwhile: Callable[[], object]) -> list[str]:
        """Put in a value, and wait until all have; gives where the values lie."""
        turn = self._n_exchanges
        self._n_exchanges += 1
        self._put(f"exchange {turn} {self.rank}", value)
        keys = [f"exchange {turn} {rank}" for rank in range(self.size)]
        self._wait_until(lambda: self._store.check(keys), meanwhile)
        return keys

    def _read(self, keys: list[str]) -> list[Any]:
        values = [self._get(key) for key in keys]
        if self._n_exchanges > 1:  # whoever has put in a value has read those of the exchange before
            self._forget(f"exchange {self._n_exchanges - 2} {self.rank}")
        return values

    def _put(self, key: str, value: object) -> None:
        """Put in a value in parts; the key itself comes last, and says how many there are."""
        data = pickle.dumps(value)
        starts = range(0, len(data), _LARGEST_VALUE)
        for number, start in enumerate(starts):
            self._store.set(f"{key} {number}", data[start : start + _LARGEST_VALUE])
        self._store.set(key, str(len(starts)))

    def _get(self, key: str) -> Any:
        n_parts = int(self._store.get(key))
        return _unpack(b"".join(self._store.get(f"{key} {number}") for number in range(n_parts)))

    def _forget(self, key: str) -> None:
        for number in range(int(self._store.get(key))):
            self._store.delete_key(f"{key} {number}")
        self._store.delete_key(key)

    def _wait_until(self, done: Callable[[], bool], meanwhile: Callable[[], object]) -> None:
        while not done():
            if self._store.add("failed", 0) > 0:
                raise OtherProcessFailed
            meanwhile()
            time.sleep(_POLL_EVERY)

    def _let_speaker_end(self) -> None:
        if not self._has_spoken and "TORCHELASTIC_RUN_ID" in os.environ:
            time.sleep(_SPEAKER_ENDS_WITHIN)


class _PlainUnpickler(pickle.Unpickler):
    """Makes plain values, paths and this package's own dataclasses, and runs nothing else: the store has a port."""

    def find_class(self, module: str, name: str) -> type:
        found = super().find_class(module, name) if module.startswith(("personas_tune.", "pathlib")) else None
        if isinstance(found, type) and (is_dataclass(found) or issubclass(found, PurePath)):
            return found
        raise pickle.UnpicklingError(f"{module}.{name} is nothing that processes exchange")


def _unpack(data: bytes) -> Any:
    return _PlainUnpickler(BytesIO(data)).load()


def _is_of_a_lost_process(error: BaseException) -> bool:
    """Whether a collective operation failed since a process is gone; gloo and NCCL have errors of their own."""
    return isinstance(error, RuntimeError) and any(
        word in str(error) for word in ("gloo", "NCCL", "c10d", "ProcessGroup")
    )


_current: Processes | None = None


@contextmanager
def joined() -> Iterator[Processes]:
    """Join the other processes that torchrun started; within another such block, the same ones.

    Raises:
        ConfigError: If the environment says that there are several, but not where.
        OtherProcessFailed: In place of an error, if another process has failed before.
    """
    global _current
    if _current is not None:
        with _current.one_speaks():
            yield _current
            _current.gather(None)  # what comes next may read what the first has written last
        return
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes()
        return
    _current = _join()
    try:
        with _current.one_speaks():
            yield _current
            _leave(_current)
    finally:
        _current = None


@contextmanager
def alone() -> Iterator[None]:
    """Within this block, this process seems to be the only one."""
    global _current
    here, _current = _current, None
    variables = {name: os.environ.pop(name) for name in _TORCHRUN_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(variables)
        _current = here


def take_own_device(name: str) -> None:
    """Let ``cuda`` mean this process's own GPU.

    Raises:
        ConfigError: If this machine has fewer GPUs than processes.
    """
    if name != "cuda" or _current is None:
        return
    import torch

    place, n_gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if 0 < n_gpus <= place:
        raise ConfigError(
            f"more processes than the {n_gpus} GPUs of this machine",
            where="--nproc_per_node",
            remedy=f"set it to {n_gpus}",
        )
    if n_gpus:
        torch.cuda.set_device(place)


def _join() -> Processes:
    import torch
    from torch.distributed import PrefixStore, init_process_group  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, size = next(rendezvous("env://"))
    except ValueError as error:
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {' '.join(str(error).split())}",
            where="environment",
            remedy="start with `tune run --nproc_per_node N ...`, or unset WORLD_SIZE",
        ) from error
    init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        store=PrefixStore("torch", store),
        rank=rank,
        world_size=size,
        timeout=_LONGEST_COLLECTIVE,
    )
    return Processes(rank, size, PrefixStore("personas_tune", store))


def _leave(processes: Processes) -> None:
    from torch import distributed

    processes.part()
    distributed.destroy_process_group()
