"""Made-up rows of the paper's shape: users, and of each some rows that begin with the same profile."""

import random
from dataclasses import dataclass

from personas_tune.datasets import TokenRow

N_ANSWER = 2  # a label and the end of turn
PAD_ID = 0


@dataclass(frozen=True)
class RowShape:
    """What rows look like; the same shape gives the same rows.

    Args:
        vocab: Tokens are drawn from this many.
        prefix: Mean tokens of what a user's rows begin with.
        branch: Mean tokens of what follows, the answer included.
        spread: Lengths differ from their means by up to this share.
        n_users: How many users.
        n_rows: Rows of each.
    """

    vocab: int
    prefix: int
    branch: int
    spread: float
    n_users: int
    n_rows: int

    def token_ratio(self, n_together: int) -> float:
        """What sharing the prefix of ``n_together`` rows saves at most: N(P+L) / (P+NL)."""
        return n_together * (self.prefix + self.branch) / (self.prefix + n_together * self.branch)


def made_up_rows(shape: RowShape) -> list[TokenRow]:
    """Rows of the first user, then of the second, and so on."""
    draw = random.Random(0)
    return [row for _ in range(shape.n_users) for row in _rows_of_a_user(shape, draw)]


def _rows_of_a_user(shape: RowShape, draw: random.Random) -> list[TokenRow]:
    prefix = draw.choices(range(1, shape.vocab), k=_length(shape.prefix, shape.spread, draw))
    rows = []
    for index in range(shape.n_rows):
        length = _length(shape.branch, shape.spread, draw)
        branch = [1 + index, *draw.choices(range(1, shape.vocab), k=length - 1)]  # the first token tells rows apart
        rows.append(TokenRow(prefix + branch, len(prefix) + length - N_ANSWER))
    return rows


def _length(mean: int, spread: float, draw: random.Random) -> int:
    return round(mean * draw.uniform(1 - spread, 1 + spread))
