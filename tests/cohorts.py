"""Made-up samples of users with personas, and strategies that draw them."""

from collections import Counter

from hypothesis import strategies as st

from personas_tune.datasets import Sample


def samples_of(sizes, personas=None):
    """Samples of users with so many rows each, ordered by user and position as the files are."""
    personas = personas or [0] * len(sizes)
    return [
        Sample(f"u{user:03}", f"i{position}", position, 3.0, personas[user], ())
        for user, size in enumerate(sizes)
        for position in range(size)
    ]


def per_user(samples, rows):
    return Counter(samples[index].user_id for index in rows)


cohorts = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 3)), min_size=1, max_size=12).map(
    lambda users: samples_of([size for size, _ in users], [persona for _, persona in users])
)
seeds = st.integers(0, 2**31)
