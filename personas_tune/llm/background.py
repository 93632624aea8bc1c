"""An event loop in a thread of its own, so that code without one can use clients that need one.

It works in a notebook as well, whose own loop is running already, and what is waited for can be interrupted there.
"""

import asyncio
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

Result = TypeVar("Result")
Last = Callable[[], Awaitable[None]]


class BackgroundLoop:
    """Runs coroutines; ends when it is closed, let go of, or the program ends.

    Args:
        last: Run in it before it ends, to close what belongs to it.
    """

    def __init__(self, last: Sequence[Last]) -> None:
        self._loop = asyncio.new_event_loop()
        # A daemon: when the program ends, Python waits for other threads before it runs finalizers.
        thread = threading.Thread(target=_serve, args=(self._loop,), name="personas_tune requests", daemon=True)
        thread.start()
        self._end = weakref.finalize(self, _stop, self._loop, thread, last)

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """What a coroutine returns; whatever interrupts the wait cancels it at once."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        finally:
            future.cancel()  # of no effect once it is done

    @property
    def is_closed(self) -> bool:
        """Whether it has ended."""
        return not self._end.alive

    def close(self) -> None:
        """End the thread; again it does nothing."""
        self._end()


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    loop.run_forever()
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread, last: Sequence[Last]) -> None:
    asyncio.run_coroutine_threadsafe(_end(last), loop)
    if thread is not threading.current_thread():  # as it is when a callback's garbage held the loop
        thread.join()


async def _end(last: Sequence[Last]) -> None:
    try:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, *(each() for each in last), return_exceptions=True)
    finally:
        asyncio.get_running_loop().stop()
