"""Seeded faults, and rate limits that count for real."""

import hashlib
from collections import Counter
from collections.abc import Mapping


class Fate:
    """Draws what befalls a call: by plan first, then by chance.

    Chance depends on the seed, on what is asked and on how often it was asked before, so that runs
    in which calls arrive in another order meet the same faults.
    """

    def __init__(self) -> None:
        self._asked: Counter[str] = Counter()
        self._planned = 0

    def draw(self, name: str, plan: tuple[str, ...], faults: Mapping[str, float], seed: int) -> str:
        self._asked[name] += 1
        if self._planned < len(plan):
            self._planned += 1
            return plan[self._planned - 1]
        left = uniform(f"{seed} {name} {self._asked[name]}")
        for fault, share in faults.items():
            left -= share
            if left < 0:
                return fault
        return "ok"

    def start_plan_again(self) -> None:
        self._planned = 0


def uniform(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big") / 2**56


class Bucket:
    """A limit per minute that refills steadily."""

    def __init__(self, per_minute: int, burst_s: float, now: float) -> None:
        self.per_minute = per_minute
        self._size = max(1.0, per_minute * burst_s / 60)
        self._left = self._size
        self._at = now

    def wait_for(self, amount: float, now: float) -> float:
        """Seconds until that much may be taken; 0.0 if at once."""
        self._left = min(self._size, self._left + (now - self._at) * self.per_minute / 60)
        self._at = now
        return max(0.0, (min(amount, self._size) - self._left) * 60 / self.per_minute)

    def take(self, amount: float) -> None:
        self._left -= amount

    def headers(self, kind: str) -> dict[str, str]:
        reset_s = (self._size - self._left) * 60 / self.per_minute
        return {
            f"x-ratelimit-limit-{kind}": str(self.per_minute),
            f"x-ratelimit-remaining-{kind}": str(max(0, int(self._left))),
            f"x-ratelimit-reset-{kind}": as_duration(reset_s),
        }


def as_duration(seconds: float) -> str:
    """As OpenAI writes it: 120ms, 1.5s, 6m0s."""
    if seconds < 1:
        return f"{round(seconds * 1000)}ms"
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes)}m{rest:.3g}s" if minutes else f"{rest:.4g}s"
