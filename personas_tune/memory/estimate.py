"""What distilling a cohort by a language model will take: calls, tokens, money, time. Nothing is sent."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from personas_tune.llm.budget import Budget, estimated_usage
from personas_tune.llm.journal import Total, Usage
from personas_tune.llm.replay import Answers, read_first_usable
from personas_tune.llm.settings import ServerSettings
from personas_tune.memory.history import Ints
from personas_tune.memory.reflection import ReflectionSettings, reflect_on, typical_answer
from personas_tune.memory.stream import UserHistory

SAMPLED_USERS = 2000
SECONDS_PER_CALL = 10.0  # assumed where no limit of the server is known
BATCH_HOURS = 24  # the longest that a batch takes


@dataclass(frozen=True)
class Estimate:
    """Calls to come, and what they probably take.

    Args:
        n_users: The cohort.
        n_sampled: Users whose prompts were made to count tokens.
        n_calls: Reflections in all; consolidations, which depend on the answers, come on top.
        n_answered: Reflections that the journal has answers to.
        n_waves: The longest chain: so many rounds the Batch API needs at least.
        usage: Of the calls that aren't answered yet.
    """

    n_users: int
    n_sampled: int
    n_calls: int
    n_answered: int
    n_waves: int
    usage: Usage

    @property
    def n_open(self) -> int:
        """Reflections still to be paid."""
        return self.n_calls - self.n_answered


def estimate_distillation(
    histories: Iterable[UserHistory], n_train: Ints, settings: ReflectionSettings, answers: Answers | None
) -> Estimate:
    """Count the calls of all users, and the tokens of a sample of users spread evenly.

    The number of calls is exact but for consolidations; tokens are four characters each, answers as
    long as their budgets usually make them.

    Args:
        histories: All users, by id.
        n_train: How many train interactions each has, shape ``(n_users,)``.
        settings: What would be asked.
        answers: The journal, if there is one.
    """
    n_calls = -(-n_train // settings.batch_size)
    stride = max(1, -(-len(n_train) // SAMPLED_USERS))
    usage, n_sampled, n_seen, n_answered = Usage(), 0, 0, 0
    for history in islice(histories, 0, None, stride):
        n_sampled += 1
        for is_answered, tokens in _walk(history, settings, answers):
            n_seen += 1
            n_answered += is_answered
            usage = usage if is_answered else usage + tokens
    scale = float(n_calls.sum()) / n_seen if n_seen else 0.0
    return Estimate(
        n_users=len(n_train),
        n_sampled=n_sampled,
        n_calls=int(n_calls.sum()),
        n_answered=round(n_answered * scale),
        n_waves=int(n_calls.max(initial=0)),
        usage=Usage(round(usage.input_tokens * scale), 0, round(usage.output_tokens * scale)),
    )


def _walk(history: UserHistory, settings: ReflectionSettings, answers: Answers | None) -> Iterable[tuple[bool, Usage]]:
    """Each reflection of a user, whether it is answered, and what it takes if not."""
    chain = reflect_on(history, settings)
    try:
        call = next(chain)
        while True:
            bodies = [] if answers is None else answers.answers(call.request.sha256)
            is_answered, read, _ = read_first_usable(call, bodies)
            yield is_answered, estimated_usage(call.request.body_after(None), call.expected_output_tokens)
            call = chain.send(read if is_answered else typical_answer(call, settings))
    except StopIteration:
        return


def estimate_lines(
    estimate: Estimate, server: ServerSettings, spent: Iterable[Total] = (), *, batch_api: bool = False
) -> list[str]:
    """The estimate for people to read, a line each.

    Args:
        estimate: What is to come.
        server: Has prices and bounds.
        spent: What the journal holds for the model already; it counts against the bounds.
        batch_api: Whether the Batch API is to be used.
    """
    usage = estimate.usage
    budget = Budget(server.prices, server.max_usd, server.max_tokens, before=spent)
    lines = [
        f"{estimate.n_users:,} users, {estimate.n_calls:,} calls of {server.model}, {estimate.n_answered:,} of them "
        "answered already; each of the others takes a second one if the profile outgrows its budget",
        f"{_amount(usage.input_tokens)} tokens in, {_amount(usage.output_tokens)} out for the rest, estimated from "
        f"the prompts of {estimate.n_sampled:,} users at 4 characters a token",
    ]
    if server.prices is None:
        lines.append("cost unknown: set distill.prices={input: ..., output: ...} in USD per million tokens")
    else:
        online, batch = (server.prices.cost_usd(usage, via) for via in ("online", "batch"))
        lines.append(f"cost about {online:,.2f} USD online, {batch:,.2f} USD with distill.batch_api=true")
    if not budget.allows(usage, "batch" if batch_api else "online"):
        bounds = {"max_usd": server.max_usd, "max_tokens": server.max_tokens}
        named = " ".join(f"distill.{key}={bound:g}" for key, bound in bounds.items() if bound is not None)
        spent_before = f"{budget.spent_tokens:,} tokens spent"
        lines.append(f"that is more than {named} allow after {spent_before}: the run would stop on the way")
    lines.append(f"time about {_time(_online_seconds(estimate, server))} online{_assumption(server)}")
    lines.append(
        f"time at most {_time(estimate.n_waves * BATCH_HOURS * 3600)} with distill.batch_api=true: "
        f"{estimate.n_waves} waves of up to {BATCH_HOURS} h"
    )
    return lines


def _online_seconds(estimate: Estimate, server: ServerSettings) -> float:
    limits = [estimate.n_open * SECONDS_PER_CALL / server.concurrency]
    if server.requests_per_minute is not None:
        limits.append(estimate.n_open / server.requests_per_minute * 60)
    if server.tokens_per_minute is not None:
        limits.append(estimate.usage.tokens / server.tokens_per_minute * 60)
    return max(limits)


def _assumption(server: ServerSettings) -> str:
    named = {"requests a minute": server.requests_per_minute, "tokens a minute": server.tokens_per_minute}
    limits = "".join(f", {limit} {name}" for name, limit in named.items() if limit is not None)
    return f" at {SECONDS_PER_CALL:g} s a call, {server.concurrency} at once{limits}"


def _amount(n_tokens: int) -> str:
    return f"{n_tokens / 1e9:,.1f} billion" if n_tokens >= 1e9 else f"{n_tokens / 1e6:.2f} million"


def _time(seconds: float) -> str:
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h" if seconds < 72 * 3600 else f"{seconds / 86400:.0f} days"
