"""What a loopback server can be told, at its start or while it runs."""

from dataclasses import dataclass, field

# What may befall a call to a model, and whether it is billed all the same.
BILLED_FAULTS = (
    "reset",  # the connection is reset when the answer is due
    "half_body",  # half of the answer, then the connection closes
    "truncated",  # finish_reason "length", JSON cut
    "wrong_json",  # valid JSON in which an item, or the profile, is missing
    "extra_keys",  # the right answer and keys that nobody asked for
    "not_json",
    "refusal",  # no content, but a message.refusal
    "too_long",  # a profile of `long_words` words
    "slow",  # the right answer, `slow_s` later
)
FREE_FAULTS = ("rate_limited", "server_error", "quota", "bad_request")
# What may befall a call to /files or /batches. A reset comes after the upload or the creation took place.
BATCH_FAULTS = ("reset", "half_body", "server_error", "rate_limited")
# What may befall a line of a batch.
LINE_FAULTS = ("truncated", "wrong_json", "extra_keys", "not_json", "refusal", "too_long", "server_error", "expired")


@dataclass(frozen=True)
class Options:
    """How the server behaves.

    Args:
        latency_s: From a call to its answer; rate limits answer at once.
        seed: Of the draws of faults. Which calls are hit depends on their bodies and on how often each
            was sent before, not on the order in which they arrive.
        api_key: The key that calls have to bring; None takes any call.
        models: Those that there are; others are answered with 404.
        shutdown_date: What ``/models`` says about every model, such as ``2027-01-14``.
        faults: Share of calls to a model that each fault hits.
        plan: What befalls the next calls to a model, in the order in which they arrive ("ok" for nothing);
            chance decides again when it is used up.
        batch_faults: Share of calls to ``/files`` and ``/batches``.
        batch_plan: The next of those calls.
        line_faults: Share of the lines of batches.
        batch_failures: Why the next batches fail, one code a batch ("ok" for one that doesn't).
        enqueued_tokens: How many input tokens all batches under way may have together.
        requests_per_minute: Over it: 429. Also makes every answer carry x-ratelimit headers.
        tokens_per_minute: The same for tokens.
        burst_s: How many seconds' worth of those limits may be used at once.
        retry_after_s: What ``rate_limited`` asks for.
        slow_s: What ``slow`` adds to the latency.
        long_words: Length of a ``too_long`` profile.
        dimensions: Of an embedding that asks for none.
        validating_s: How long a batch stays in each state.
        in_progress_s: The same.
        finalizing_s: The same.
        before_commit_s: Between an upload's or creation's arrival and its taking place.
        after_commit_s: Between its taking place and its answer.
    """

    latency_s: float = 0.0
    seed: int = 0
    api_key: str | None = None
    models: tuple[str, ...] = ("gpt-4o", "gpt-4o-mini", "text-embedding-ada-002", "text-embedding-3-small")
    shutdown_date: str | None = None
    faults: dict[str, float] = field(default_factory=dict)
    plan: tuple[str, ...] = ()
    batch_faults: dict[str, float] = field(default_factory=dict)
    batch_plan: tuple[str, ...] = ()
    line_faults: dict[str, float] = field(default_factory=dict)
    batch_failures: tuple[str, ...] = ()
    enqueued_tokens: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    burst_s: float = 60.0
    retry_after_s: float = 1.0
    slow_s: float = 5.0
    long_words: int = 2100
    dimensions: int = 64
    validating_s: float = 0.0
    in_progress_s: float = 0.0
    finalizing_s: float = 0.0
    before_commit_s: float = 0.0
    after_commit_s: float = 0.0

    def __post_init__(self) -> None:
        known = {
            "faults": (*BILLED_FAULTS, *FREE_FAULTS), "plan": ("ok", *BILLED_FAULTS, *FREE_FAULTS),
            "batch_faults": BATCH_FAULTS, "batch_plan": ("ok", *BATCH_FAULTS), "line_faults": LINE_FAULTS,
        }  # fmt: skip
        for name, faults in known.items():
            unknown = set(getattr(self, name)) - set(faults)
            if unknown:
                raise ValueError(f"{name}: no fault {sorted(unknown)}; there are {faults}")
