import base64
import json
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from personas_tune.embedding.answers import read_vectors
from personas_tune.llm.calls import Rejected


def packed(vector):
    return base64.b64encode(np.array(vector, dtype="<f4").tobytes()).decode()


def answer(*vectors, indices=None):
    entries = [{"index": index, "embedding": vector} for index, vector in enumerate(vectors)]
    for entry, index in zip(entries, indices or [], strict=False):
        entry["index"] = index
    return json.dumps({"object": "list", "data": entries})


def test_vectors_are_scaled_to_length_1_in_float32():
    vectors = read_vectors(answer([3.0, 4.0], [0.0, 2.0]), 2)
    assert vectors.dtype == np.float32
    assert vectors.tolist() == [[np.float32(0.6), np.float32(0.8)], [0.0, 1.0]]


def test_the_index_of_a_vector_counts_and_not_its_place():
    vectors = read_vectors(answer([0.0, 1.0], [1.0, 0.0], indices=[1, 0]), 2)
    assert vectors.tolist() == [[1.0, 0.0], [0.0, 1.0]]


@given(st.lists(st.lists(st.floats(-10, 10, width=32), min_size=3, max_size=3).filter(any), min_size=1, max_size=4))
def test_base64_and_lists_of_numbers_give_equal_bytes(rows):
    as_numbers, as_base64 = answer(*rows), answer(*map(packed, rows))
    assert read_vectors(as_numbers, len(rows)).tobytes() == read_vectors(as_base64, len(rows)).tobytes()


@given(st.lists(st.lists(st.floats(-9, 9, width=32), min_size=5, max_size=5).filter(any), min_size=1, max_size=5))
def test_a_vector_is_the_same_in_any_company(rows):
    together = read_vectors(answer(*rows), len(rows))
    alone = [read_vectors(answer(row), 1)[0] for row in rows]
    assert together.tobytes() == np.stack(alone).tobytes()
    np.testing.assert_allclose(np.linalg.norm(together.astype(np.float64), axis=1), 1, atol=1e-6)


GOOD = [1.0, 2.0]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (answer(GOOD), "1 vectors for 2 texts"),
        (answer(GOOD, GOOD, GOOD), "3 vectors for 2 texts"),
        (answer(GOOD, GOOD, indices=[0, 0]), "indices aren't 0 to 1"),
        (answer(GOOD, GOOD, indices=[1, 2]), "indices aren't 0 to 1"),
        (answer(GOOD, GOOD, indices=["0", "1"]), "indices aren't 0 to 1"),
        (answer(GOOD, GOOD, indices=[False, True]), "indices aren't 0 to 1"),
        (answer(GOOD, [1.0]), "vectors of 1 and 2 numbers, not of one length"),
        (answer(GOOD, [1.0, float("nan")]), "aren't finite"),
        (answer(GOOD, [1.0, float("inf")]), "aren't finite"),
        (answer(GOOD, [1.0, 1e300]), "aren't finite"),
        (answer(GOOD, packed([1.0, np.inf])), "aren't finite"),
        (answer(GOOD, [0.0, 0.0]), "nothing but zeros"),
        (answer(GOOD, []), "no list of numbers"),
        (answer(GOOD, ""), "no list of numbers"),
        (answer(GOOD, None), "no list of numbers"),
        (answer(GOOD, [[1.0, 2.0]]), "no list of numbers"),
        (answer(GOOD, [1.0, "x"]), "can't be read"),
        (answer(GOOD, {"a": 1}), "can't be read"),
        (answer(GOOD, [1.0, 10**400]), "can't be read"),
        (answer(GOOD, "AAA"), "can't be read"),
        (answer(GOOD, "AAAA"), "can't be read"),
        (answer(GOOD, "not base64!"), "can't be read"),
        ('{"data": [1, 2]}', "no list of vectors"),
        ('{"data": []}', "no list of vectors"),
        ('{"data": {}}', "no list of vectors"),
        ('{"error": {"message": "no"}}', "no list of vectors"),
        ('{"data": [{"index"', "no list of vectors"),
        ("[" * 100_000, "no list of vectors"),
        ("[]", "no list of vectors"),
        ("3", "no list of vectors"),
        ("", "no list of vectors"),
    ],
)  # fmt: skip
def test_an_answer_that_is_not_one_usable_vector_a_text_is_rejected(body, message):
    with pytest.raises(Rejected, match=message):
        read_vectors(body, 2)


def test_vectors_of_another_length_than_asked_for_are_rejected():
    assert read_vectors(answer(GOOD), 1, dimensions=2).shape == (1, 2)
    with pytest.raises(Rejected, match="vectors of 2 numbers, not of 3"):
        read_vectors(answer(GOOD), 1, dimensions=3)


JSON = st.recursive(
    st.none() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["data", "index", "embedding"]), inner),
)


@given(st.text() | JSON.map(json.dumps))
def test_whatever_a_server_sends_is_read_or_rejected(body):
    with suppress(Rejected):
        assert read_vectors(body, 1).shape[0] == 1
