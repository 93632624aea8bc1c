"""Kills, drains and a faulty server: what becomes of answers that were paid, and of the tables made of them.

Hardware: 2 cores of an x86-64 virtual machine
Date:     2026-11-20
Command:  OMP_NUM_THREADS=1 python benchmarks/distill_reliability.py
Result:   every promise kept in 448 s: 200 SIGKILLs, 168 calls billed again (at most 1600 allowed); 100 SIGTERMs and
          SIGINTs, none billed again; 50 SIGKILLs in batch mode, no duplicate batch, none billed again

The recipe runs in a process of its own against a server on loopback (tests/openai_server.py) that answers 15% of the
calls with 429, 7% with 500, breaks 4% off and 4% in the middle of the answer, both after billing, cuts 6% of the JSON
and gives 7% of wrong JSON, no JSON or refusals. The server numbers what it bills and puts the number into the answer's
id, so that each billed answer is found again in the journal, or isn't. A *life* is one experiment from its beginning to
its finished tables, by as many runs of the same command as it takes.

--kills    SIGKILL at random moments: while the recipe starts, calls, or writes the tables from a finished journal.
           After each: every row of the journal is still there; what was billed and is in no row was in flight.
--drains   SIGTERM and SIGINT while calls are in flight, the server's connections whole: nothing billed is missing in
           the journal, nothing is billed twice.
--batch-kills  SIGKILL around uploads, creations, polls and downloads of the Batch API.

Ends with status 1 if a promise is broken.
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from distill_job import Job, Row, prepare_job
from openai_server import Server, start_server

CONCURRENCY = 8
SPOILT = {"truncated": 0.06, "wrong_json": 0.03, "not_json": 0.02, "refusal": 0.02}
REFUSED = {"rate_limited": 0.15, "server_error": 0.07}
BROKEN = {"reset": 0.04, "half_body": 0.04}
ONLINE = {"latency_s": 0.05, "retry_after_s": 0.05}
BATCH = {
    "validating_s": 0.1, "in_progress_s": 0.2, "finalizing_s": 0.1, "before_commit_s": 0.15, "after_commit_s": 0.15,
    "retry_after_s": 0.05, "line_faults": {**SPOILT, "server_error": 0.05, "expired": 0.03},
    "batch_faults": {"rate_limited": 0.05, "server_error": 0.05, "reset": 0.05},
}  # fmt: skip
CALL = "POST /v1/chat/completions"
BATCH_MOMENTS = (
    "POST /v1/files",
    "POST /v1/batches",
    "GET /v1/batches",
    "GET /v1/batches/ID",
    "GET /v1/files/ID/content",
)
DISTILL = {"concurrency": CONCURRENCY, "batch_size": 10, "profile_words": 90, "max_tries": 15, "max_retries": 30}
AT_RANDOM_S = 0.6  # from the moment that is waited for to the signal, at most


@dataclass
class Outcome:
    """What happened in one part of the benchmark."""

    name: str
    stops: int = 0
    runs: int = 0
    lives: int = 0
    calls: int = 0
    billed_twice: int = 0
    worst_loss: int = 0
    duplicate_batches: int = 0
    broken: list[str] = field(default_factory=list)

    def promise(self, kept: bool, what: str) -> None:
        if not kept:
            self.broken.append(what)
            print(f"{self.name}: BROKEN: {what}", flush=True)

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.stops} in {self.runs} runs of {self.lives} experiments, {self.calls} calls billed, "
            f"{self.billed_twice} again; one stop lost at most {self.worst_loss}; "
            f"{self.duplicate_batches} duplicate batches; {len(self.broken)} promises broken"
        )


@dataclass(frozen=True)
class Plan:
    """How the runs of a life are stopped."""

    signals: tuple[signal.Signals, ...]
    moments: tuple[str, ...]  # what the server is to be asked first; "" for the start of the process
    may_lose: int | None  # billed answers a stop, those in flight; None if they can still be fetched
    distill: dict[str, Any]


@dataclass(frozen=True)
class Unbroken:
    """An unbroken run's tables, and the seconds that it takes to write them from its journal."""

    tables: dict[str, str]
    seconds: float


KILL = Plan((signal.SIGKILL,), (CALL, CALL, CALL, ""), CONCURRENCY, {})
DRAIN = Plan((signal.SIGTERM, signal.SIGINT), (CALL,), 0, {})
BATCH_KILL = Plan((signal.SIGKILL,), BATCH_MOMENTS, None, {"batch_api": True, "batch_poll_s": 0.1})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--drains", type=int, default=100)
    parser.add_argument("--batch-kills", type=int, default=50)
    parser.add_argument("--users", type=int, default=20)
    parser.add_argument("--at-once", type=int, default=3, help="experiments side by side")
    parser.add_argument("--short", action="store_true", help="a few of each, for the tests")
    words = parser.parse_args()
    if words.short:
        words.kills, words.seeds, words.drains, words.batch_kills, words.users = 3, 1, 2, 3, 5
    # A shell has what it runs in the background ignore SIGINT, and children take that over.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        job = prepare_job(Path(folder), data_of(words.users), **DISTILL)
        n_broken = len(run_parts(job, words))
    seconds = time.monotonic() - started
    print(f"{seconds:.0f} s; {f'{n_broken} promises BROKEN' if n_broken else 'every promise kept'}")
    sys.exit(1 if n_broken else 0)


def run_parts(job: Job, words: argparse.Namespace) -> list[str]:
    """Run all parts, some at a time; give the promises that were broken."""
    whole = unbroken(job)
    shares = [
        (seed + 1) * words.kills // words.seeds - seed * words.kills // words.seeds for seed in range(words.seeds)
    ]
    parts: list[Callable[[], Outcome]] = [
        lambda: run_on_faulty_server(job, whole),
        lambda: stop_often("SIGKILL, Batch API", BATCH_KILL, words.batch_kills, 0, job, whole),
        lambda: stop_often("SIGTERM and SIGINT", DRAIN, words.drains, 0, job, whole),
    ]
    parts += [partial(stop_often, f"SIGKILL, seed {seed}", KILL, n, seed, job, whole) for seed, n in enumerate(shares)]
    with ThreadPoolExecutor(words.at_once) as pool:
        outcomes = list(pool.map(lambda part: part(), parts))
    kills = [outcome for outcome in outcomes if outcome.name.startswith("SIGKILL, seed")]
    n, again = sum(outcome.stops for outcome in kills), sum(outcome.billed_twice for outcome in kills)
    print(f"{n} SIGKILLs in all: {again} calls billed again, at most {n * CONCURRENCY} allowed")
    return [promise for outcome in outcomes for promise in outcome.broken]


def data_of(n_users: int) -> dict[str, Any]:
    world = {"n_users": 20 + n_users, "n_items": 200, "n_groups": 4, "mean_interactions": 40}
    return {"format": "world", "world": world, "cohort": {"n_users": n_users}}


def unbroken(job: Job) -> Unbroken:
    """What a server without faults gives, and how long the tables alone take."""
    own = job.fresh("unbroken")
    with start_server() as server:
        own.finish(server.base_url)
        tables = own.tables()
        own.forget_tables()
        started = time.monotonic()
        own.finish(server.base_url)
        seconds = time.monotonic() - started
        print(f"unbroken: {server.counts()['billed']} calls", flush=True)
    return Unbroken(tables, seconds)


def run_on_faulty_server(job: Job, whole: Unbroken) -> Outcome:
    """Faults alone, no stops: every answer that arrived is kept, with its tokens; only broken ones are paid again."""
    own, outcome = job.fresh("faulty"), Outcome("faults alone")
    with start_server(**ONLINE, faults={**REFUSED, **BROKEN, **SPOILT}) as server:
        own.finish(server.base_url)
        billed, rows = server.billed(), own.journal_rows()
        check_life(outcome, own, server, rows, whole)
        lost = [entry for entry in billed if entry["what"] in BROKEN]
        kept = [row for row in rows if row.status == "lost"]
        outcome.promise(len(kept) >= len(lost), f"{len(lost)} broken answers, {len(kept)} noted")
        outcome.promise(outcome.billed_twice == 0, f"{outcome.billed_twice} billed twice without a stop")
    print(f"{outcome}; {dict(Counter(entry['what'] for entry in billed))}", flush=True)
    return outcome


def stop_often(name: str, plan: Plan, n_stops: int, seed: int, job: Job, whole: Unbroken) -> Outcome:
    """Live one experiment after the other until so many runs were stopped in all."""
    outcome, rng = Outcome(name), random.Random(f"{name} {seed}")
    while outcome.stops < n_stops:
        own = job.fresh(f"life-{time.monotonic_ns()}")
        with start_server(**server_options(plan, seed=rng.randrange(10**6))) as server:
            rows = live(own, server, plan, rng, outcome, n_stops - (plan is KILL))
            if plan is KILL:
                rows = stop_in_the_tables(own, server, rng, outcome, n_stops, whole.seconds)
            check_life(outcome, own, server, rows, whole)
    if n_stops:
        print(outcome, flush=True)
    return outcome


def server_options(plan: Plan, seed: int) -> dict[str, Any]:
    if plan is BATCH_KILL:
        return {**BATCH, "seed": seed}
    if plan is DRAIN:  # without 429s, which would leave few calls in flight
        return {"latency_s": 0.25, "faults": {**SPOILT, "server_error": 0.07}, "seed": seed}
    return {**ONLINE, "faults": {**REFUSED, **BROKEN, **SPOILT}, "seed": seed}


def live(job: Job, server: Server, plan: Plan, rng: random.Random, outcome: Outcome, n_stops: int) -> set[Row]:
    """Run until the tables are there, stopping each run while stops are left; give the journal."""
    rows: set[Row] = set()
    lost: set[int] = set()
    while True:
        outcome.runs += 1
        process = job.start(server.base_url, **plan.distill)
        if outcome.stops < n_stops:
            outcome.stops += stop_at_random(process, server, plan, rng)
        status = process.wait()
        settle(server)
        rows = check_run(outcome, job, server, rows, lost, may_lose=plan.may_lose if status else 0)
        if status == 0:
            return rows
        expected = {-stop for stop in plan.signals} | {128 + stop for stop in plan.signals}
        if status not in expected or "Traceback" in job.told():
            raise SystemExit(f"the recipe ended with {status}:\n{job.told()}")


def stop_at_random(process: "subprocess.Popen[bytes]", server: Server, plan: Plan, rng: random.Random) -> bool:
    """Send a signal a random time after a moment; whether it reached a running process."""
    moment, stop, delay_s = rng.choice(plan.moments), rng.choice(plan.signals), rng.uniform(0, AT_RANDOM_S)
    before = asked(server, moment)
    while moment and asked(server, moment) == before and process.poll() is None:
        time.sleep(0.005)
    time.sleep(delay_s if moment else 3 * delay_s)
    if process.poll() is not None:
        return False
    process.send_signal(stop)
    return process.wait() != 0


def asked(server: Server, moment: str) -> int:
    n: int = server.counts()["asked"].get(moment, 0)
    return n


def settle(server: Server) -> None:
    """Wait until the server is through with what it was sent."""
    time.sleep(0.05)
    while server.counts()["under_way"]:
        time.sleep(0.01)


def check_run(
    outcome: Outcome, job: Job, server: Server, before: set[Row], lost: set[int], *, may_lose: int | None
) -> set[Row]:
    """What must hold after every run; gives the journal and adds the numbers of what the run lost to ``lost``.

    Args:
        before: The journal before the run.
        may_lose: How many billed answers the run may have lost; None for batches, whose answers can still be fetched.
    """
    rows = job.journal_rows()
    outcome.promise(before <= rows, f"{len(before - rows)} rows of the journal are gone")
    if may_lose is not None:
        new = {entry["n"] for entry in answered_in_full(server.billed())} - numbers_in(rows) - lost
        outcome.worst_loss = max(outcome.worst_loss, len(new))
        outcome.promise(len(new) <= may_lose, f"{len(new)} billed answers lost by one run, {may_lose} may be")
        lost |= new
    return rows


def stop_in_the_tables(
    job: Job, server: Server, rng: random.Random, outcome: Outcome, n_stops: int, seconds: float
) -> set[Row]:
    """Kill runs that only write tables from a finished journal, then let one end; none makes a call."""
    rows, billed = job.journal_rows(), server.counts()["billed"]
    enough = min(outcome.stops + 2, n_stops)
    while outcome.stops < enough:
        job.forget_tables()
        outcome.runs += 1
        process = job.start(server.base_url)
        time.sleep(rng.uniform(0.5, 1.0) * seconds)
        process.kill()
        outcome.stops += process.wait() != 0
        outcome.promise(rows <= job.journal_rows(), "rows of the journal are gone")
    outcome.runs += 1
    job.finish(server.base_url)
    outcome.promise(server.counts()["billed"] == billed, "a run on a finished journal made calls")
    return job.journal_rows()


def check_life(outcome: Outcome, job: Job, server: Server, rows: set[Row], whole: Unbroken) -> None:
    """What must hold once the tables are there."""
    billed = server.billed()
    good = Counter(entry["request"] for entry in billed if entry["what"] == "ok")
    outcome.lives += 1
    outcome.calls += len(billed)
    outcome.billed_twice += good.total() - len(good)
    outcome.promise(job.tables() == whole.tables, f"tables differ from an unbroken run's: {job.root.name}")
    tokens = {entry["n"]: tokens_of(entry["usage"]) for entry in billed}
    kept = {number: row for row in rows if (number := number_in(row)) is not None}
    wrong = [n for n, row in kept.items() if tokens[n] != (row.input_tokens, row.cached_tokens, row.output_tokens)]
    outcome.promise(not wrong, f"{len(wrong)} rows whose tokens aren't the server's")
    journalled = Counter(billed[number]["request"] for number in kept if billed[number]["what"] == "ok")
    outcome.promise(set(journalled.values()) <= {1}, "an answer that was in the journal was paid again")
    check_batches(outcome, server, kept)


def check_batches(outcome: Outcome, server: Server, kept: dict[int, Row]) -> None:
    batches = server.batches()
    if not batches:
        return
    same = Counter(tuple(sorted(batch["metadata"].items())) for batch in batches)
    duplicates = same.total() - len(same)
    outcome.duplicate_batches += duplicates
    outcome.promise(duplicates == 0, f"{duplicates} batches created twice")
    missing = len(answered_in_full(server.billed())) - len(kept)
    outcome.promise(missing == 0, f"{missing} answers of batches aren't in the journal")
    outcome.promise(outcome.billed_twice == 0, f"{outcome.billed_twice} requests billed twice in batches")


def answered_in_full(billed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was answered in full."""
    return [entry for entry in billed if entry["what"] not in BROKEN]


def numbers_in(rows: set[Row]) -> set[int]:
    return {number for row in rows if (number := number_in(row)) is not None}


def number_in(row: Row) -> int | None:
    """The server's number of the billed answer that the row keeps."""
    if row.status != "answered" or row.response is None:
        return None
    _, _, rest = row.response.partition('"chatcmpl-')
    return int(rest.partition('"')[0]) - 1


def tokens_of(usage: dict[str, Any]) -> tuple[int, int, int]:
    return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"], usage["completion_tokens"]


if __name__ == "__main__":
    main()
