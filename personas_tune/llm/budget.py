"""What calls cost: prices, token counts, and the sum that a job may spend."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from personas_tune.errors import BudgetError
from personas_tune.llm.journal import Total, Usage, Via

MOST_TOKENS = 2**53  # told by a server; more are a mistake, and too long a number for the journal
TOKENS_PER_CHARACTER = 0.25  # of English text; enough for limits, corrected by what servers count


@dataclass(frozen=True)
class Prices:
    """USD per million tokens.

    Args:
        input: For input tokens.
        cached_input: For those of them that the server had cached; as ``input`` if None.
        output: For output tokens.
        batch_share: Of these prices, what the Batch API takes.
    """

    input: float
    cached_input: float | None = None
    output: float = 0.0
    batch_share: float = 0.5

    def cost_usd(self, usage: Usage, via: Via = "online") -> float:
        """What so many tokens cost, in USD."""
        cached_price = self.input if self.cached_input is None else self.cached_input
        uncached = usage.input_tokens - usage.cached_tokens
        cost = uncached * self.input + usage.cached_tokens * cached_price + usage.output_tokens * self.output
        return cost / 1e6 * (self.batch_share if via == "batch" else 1.0)


def estimated_usage(body: Mapping[str, Any], expected_output_tokens: int) -> Usage:
    """How many tokens a request probably takes, at four characters a token."""
    return Usage(input_tokens=round(_n_characters(body) * TOKENS_PER_CHARACTER), output_tokens=expected_output_tokens)


def _n_characters(value: object) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_n_characters, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_n_characters, value))
    return 0


def usage_in(body: str) -> Usage | None:
    """The token counts that a server put into an answer; None if it did not, or if the answer is no JSON."""
    try:
        told = json.loads(body)["usage"]
        details = told.get("prompt_tokens_details") or {}
        n_input = _n_tokens(told["prompt_tokens"])
        return Usage(
            input_tokens=n_input,
            cached_tokens=min(_n_tokens(details.get("cached_tokens") or 0), n_input),
            output_tokens=_n_tokens(told.get("completion_tokens") or 0),
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError):
        return None


def _n_tokens(told: Any) -> int:
    return min(max(int(told), 0), MOST_TOKENS)


class Budget:
    """Watches what a job has spent and what the calls in flight may add.

    Args:
        prices: Needed for ``max_usd``.
        max_usd: What the whole job may cost; no bound if None.
        max_tokens: Input and output tokens that the whole job may take; no bound if None.
        before: What earlier runs of the job spent, from :meth:`Journal.totals`.
        section: The part of a config that has the bounds, for messages.
    """

    def __init__(
        self,
        prices: Prices | None = None,
        max_usd: float | None = None,
        max_tokens: int | None = None,
        before: Iterable[Total] = (),
        section: str = "distill",
    ) -> None:
        self._prices = prices
        self._section = section
        self._max_usd = max_usd
        self._max_tokens = max_tokens
        self.spent_tokens = 0
        self.spent_usd = 0.0
        self._reserved = Usage()
        for total in before:
            self._spend(total.usage, total.via)

    def _spend(self, usage: Usage, via: Via) -> None:
        self.spent_tokens += usage.tokens
        self.spent_usd += self.cost_usd(usage, via)

    def cost_usd(self, usage: Usage, via: Via = "online") -> float:
        """What so many tokens cost; 0 when no prices are known."""
        return 0.0 if self._prices is None else self._prices.cost_usd(usage, via)

    def allows(self, estimate: Usage, via: Via = "online") -> bool:
        """Whether a further call fits, should all in flight take what was estimated."""
        ahead = self._reserved + estimate
        if self._max_tokens is not None and self.spent_tokens + ahead.tokens > self._max_tokens:
            return False
        return self._max_usd is None or self.spent_usd + self.cost_usd(ahead, via) <= self._max_usd

    def reserve(self, estimate: Usage) -> None:
        """A call that will probably take that much is on its way."""
        self._reserved = self._reserved + estimate

    def settle(self, estimate: Usage, usage: Usage, via: Via = "online") -> None:
        """A call on its way is over and took ``usage``."""
        self._reserved = self._reserved - estimate
        self._spend(usage, via)

    def error(self, estimate: Usage, kept_in: str, via: Via = "online", what_next: str = "call") -> BudgetError:
        """Why a call, or whatever ``what_next`` names, of that estimate isn't sent."""
        if self._max_tokens is not None and self.spent_tokens + estimate.tokens > self._max_tokens:
            what = f"{self.spent_tokens} tokens are spent, the next {what_next} takes about {estimate.tokens}"
            return self._told(what, "max_tokens", str(self._max_tokens), kept_in)
        cost = f"{self.cost_usd(estimate, via):.2g} USD"
        what = f"{self.spent_usd:.4g} USD are spent, the next {what_next} costs about {cost}"
        return self._told(what, "max_usd", f"{self._max_usd:g}", kept_in)

    def _told(self, what: str, name: str, value: str, kept_in: str) -> BudgetError:
        key = f"{self._section}.{name}"
        remedy = f"every answer is kept in {kept_in}: raise {key} and run the same command to go on"
        return BudgetError(what, where=f"{key}={value}", remedy=remedy)

    def __str__(self) -> str:
        """What is spent and what remains, for a progress bar."""
        if self._prices is None:
            remaining = "" if self._max_tokens is None else f", {max(self._max_tokens - self.spent_tokens, 0)} left"
            return f"{self.spent_tokens} tokens{remaining}"
        remaining = "" if self._max_usd is None else f", {max(self._max_usd - self.spent_usd, 0):.2f} left"
        return f"{self.spent_usd:.2f} USD{remaining}"
