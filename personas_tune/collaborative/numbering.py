"""Users and items as numbers from 0."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray


def distinct_ids(*columns: pa.ChunkedArray) -> pa.Array:
    """The ids of all columns, each once, sorted."""
    chunks = [chunk for column in columns for chunk in column.cast(pa.string()).chunks]
    return pc.unique(pa.chunked_array(chunks, pa.string())).sort()


def places_of(ids: pa.ChunkedArray, distinct: pa.Array) -> NDArray[np.int64]:
    """Where each id stands among the distinct ones, all of which it is one of; shape ``(len(ids),)``."""
    return np.asarray(pc.index_in(ids, value_set=distinct).to_numpy(), dtype=np.int64)
