"""A synthetic world's tables, taken as a log like any other."""

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

from personas_tune.interactions.items import ItemRow, parse_items
from personas_tune.interactions.log import RawLog
from personas_tune.interactions.typed import read_typed

WHERE = "data.world"


def take_world_log(interactions: pa.Table) -> RawLog:
    """A world's interactions as a log."""
    return read_typed(interactions, WHERE, lambda index: index + 1)


def take_world_items(items: pa.Table) -> Iterator[ItemRow]:
    """A world's items as an item file's rows."""
    return parse_items(enumerate(items.to_pylist(), 1), WHERE)


def select_oracle(oracle: pa.Table, interactions: pa.Table) -> pa.Table:
    """The best possible predictions of the cohort's test rows, in their order.

    Args:
        oracle: user_id, item_id, optimal of every interaction of the world.
        interactions: The prepared interactions.
    """
    test = interactions.filter(pc.equal(interactions["split"], "test"))
    return oracle.take(pc.index_in(_pair_keys(test), value_set=_pair_keys(oracle)))


def _pair_keys(table: pa.Table) -> pa.Array:
    """User and item of each row as one text."""
    return pc.binary_join_element_wise(table["user_id"], table["item_id"], "\0").combine_chunks()
