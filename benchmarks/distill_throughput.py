"""Calls per second of the distiller's client beside a bare loop on the SDK, and memory by the number of users.

Hardware: 2 cores of an x86-64 virtual machine, the server on one of them
Date:     2026-11-20
Command:  OMP_NUM_THREADS=1 python benchmarks/distill_throughput.py --users 1000 100000
Result:   at 200 ms and 64 in flight (ideal 320 calls/s) 291 calls/s, the bare loop 289; at 20 ms and 64 484 against
          563; peak memory 190 MB with 1,000 users, 239 MB with 100,000

Both clients send the same requests (reflections on ten movies, five calls a user, one after the other) to the same
server on loopback at the same concurrency, in turns; a line has the median of the rounds. The bare loop is
`AsyncOpenAI(max_retries=0)` and a task per slot: no journal, no limits, no retries, nothing read. Ours commits every
answer to its journal before it is read. The ideal is concurrency / latency.

Memory is the peak of `python -m persona_distill` in a process of its own, over users with two train ratings each, so
one call each.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
from distill_job import prepare_job
from openai_server import start_server
from prepare import measure

from personas_tune.llm.calls import CHAT, Call, Chain, Request
from personas_tune.llm.journal import Journal
from personas_tune.llm.online import run_online
from personas_tune.llm.settings import ServerSettings

CALLS_PER_USER, RATED_PER_CALL = 5, 10
GENRES = ("Drama", "Comedy", "Crime", "Horror", "War")


@dataclass(frozen=True)
class Setting:
    latency_s: float
    concurrency: int
    n_users: int

    @property
    def ideal(self) -> float:
        return self.concurrency / self.latency_s


SETTINGS = (Setting(0.2, 64, 640), Setting(0.02, 64, 640), Setting(0.02, 8, 640))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", nargs="*", type=int, default=[1000, 10_000])
    parser.add_argument("--rounds", type=int, default=3)
    words = parser.parse_args()
    for setting in SETTINGS if words.rounds else ():
        compare(setting, words.rounds)
    for n_users in words.users:
        with tempfile.TemporaryDirectory() as folder:
            measure_memory(n_users, Path(folder))


def compare(setting: Setting, n_rounds: int) -> None:
    """Print calls per second of both clients, in turns on one server."""
    users = [[request_of(user, number) for number in range(CALLS_PER_USER)] for user in range(setting.n_users)]
    n_calls = setting.n_users * CALLS_PER_USER
    found: dict[str, list[tuple[float, float]]] = {"ours": [], "bare": []}
    with start_server(latency_s=setting.latency_s) as server:
        for _ in range(n_rounds):
            found["bare"].append(timed(lambda: asyncio.run(run_bare(users, server.base_url, setting.concurrency))))
            found["ours"].append(timed(lambda: run_ours(users, server.base_url, setting.concurrency)))
        assert server.counts()["billed"] == {"ok": 2 * n_rounds * n_calls}
    rate = {name: n_calls / statistics.median(seconds for seconds, _ in times) for name, times in found.items()}
    cpu_ms = {name: 1e3 * statistics.median(cpu for _, cpu in times) / n_calls for name, times in found.items()}
    print(
        f"latency {1e3 * setting.latency_s:.0f} ms, concurrency {setting.concurrency}: "
        f"ideal {setting.ideal:.0f} calls/s; ours / bare {rate['ours'] / rate['bare']:.2f}",
    )
    for name in found:
        share = rate[name] / setting.ideal
        print(
            f"  {name}  {rate[name]:5.0f} calls/s  {share:6.1%} of ideal  {cpu_ms[name]:.2f} ms of CPU a call",
            flush=True,
        )


def timed(run: Callable[[], None]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def request_of(user: int, number: int) -> Request:
    lines = [
        f"{line}. Film {user}-{number}-{line} (1995) | genres: {GENRES[(user + line) % 5]} | others give it 3.5 | "
        f"about: {'some words on what happens in it ' * 3}| MY RATING: {1 + (user * line) % 5} of 5"
        for line in range(1, RATED_PER_CALL + 1)
    ]
    user_text = "MY PROFILE SO FAR\n(nothing yet)\n\nWHAT I RATED NEXT, OLDEST FIRST\n" + "\n".join(lines)
    messages = [
        {"role": "system", "content": "You write down your own taste. " * 60},
        {"role": "user", "content": user_text},
    ]
    return Request(CHAT, {"model": "gpt-4o", "messages": messages, "max_completion_tokens": 4096}, "benchmark")


async def run_bare(users: list[list[Request]], base_url: str, concurrency: int) -> None:
    """The shortest client that sends the same."""
    left = iter(users)

    async def work(client: openai.AsyncOpenAI) -> None:
        for requests in left:
            for request in requests:
                body: dict[str, Any] = dict(request.body)
                await client.chat.completions.create(**body)

    async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        await asyncio.gather(*(work(client) for _ in range(concurrency)))


def run_ours(users: list[list[Request]], base_url: str, concurrency: int) -> None:
    server = ServerSettings(model="gpt-4o", base_url=base_url, concurrency=concurrency)
    with tempfile.TemporaryDirectory() as folder, Journal.open(Path(folder) / "journal.sqlite") as journal:
        chains = ((str(number), chain_of(requests)) for number, requests in enumerate(users))
        n_calls = len(users) * CALLS_PER_USER
        left_out = run_online(chains, journal=journal, server=server, max_tries=1, n_calls=n_calls, what="users")
        assert not left_out, left_out


def chain_of(requests: list[Request]) -> Chain[None]:
    for request in requests:
        yield Call(request, json.loads, expected_output_tokens=300)


def measure_memory(n_users: int, folder: Path) -> None:
    """Print the peak memory of distilling so many users."""
    write_log(n_users, folder)
    data = {
        "format": "csv", "path": str(folder / "ratings.csv"), "item_metadata": str(folder / "items.csv"),
        "historical_average": "train", "split": {"train_fraction": 0.67},
    }  # fmt: skip
    job = prepare_job(folder, data, concurrency=64, profile_words=90)
    with start_server() as server:
        measured = measure(job.command(server.base_url))
        billed = server.counts()["billed"]
    size = (job.memory / "journal.sqlite").stat().st_size
    print(
        f"{n_users} users: peak {measured.gigabytes * 1e3:.0f} MB, {measured.seconds:.0f} s, {billed} calls, "
        f"journal {size / 1e6:.0f} MB",
        flush=True,
    )


def write_log(n_users: int, folder: Path) -> None:
    """Three ratings a user, the last of them to predict."""
    n_items = 500
    items = (f"i{item},Film {item},{1950 + item % 70},{GENRES[item % 5]}\n" for item in range(n_items))
    (folder / "items.csv").write_text("item_id,title,year,genres\n" + "".join(items), encoding="utf-8")
    with (folder / "ratings.csv").open("w", encoding="utf-8") as stream:
        stream.write("user_id,item_id,rating,timestamp\n")
        stream.writelines(rating_lines(n_users, n_items))


def rating_lines(n_users: int, n_items: int) -> Iterator[str]:
    """No two users (of up to 100,000) alike: what was asked for one user would answer for the other."""
    for user in range(n_users):
        first, lap = user % n_items, user // n_items
        for number, item in enumerate((first, first + 1 + lap, first + n_items // 2)):
            yield f"u{user:06},i{item % n_items},{1 + (user + 3 * number) % 5},{1000 + number}\n"


if __name__ == "__main__":
    main()
