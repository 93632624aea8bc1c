import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from personas_tune.embedding.vectors import Embeddings, Space
from personas_tune.errors import DataError, MissingInputError, RetrievalError
from personas_tune.retrieval.index import MemoryIndex, build_index, retrieve

SPACE = Space("lsa", 3, "f" * 64)


def unit(vectors):
    vectors = np.asarray(vectors, dtype=np.float64)
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def embeddings(vectors):
    return Embeddings(np.asarray(vectors, dtype=np.float32), SPACE)


def brute_force(keys, positions, query, k, *, own=None, before=None, floor=None):
    """Sort everything by cosine, then throw out what isn't allowed."""
    found = []
    for key, position in zip(keys, positions, strict=True):
        cosine = float((key.astype(np.float64) * query.astype(np.float64)).sum())
        found.append((-cosine, position))
    allowed = [
        (negative, position)
        for negative, position in sorted(found)
        if position != own and (before is None or position < before) and (floor is None or -negative >= floor - 1e-6)
    ]
    return [position for _, position in allowed[:k]]


# Few different directions, so that ties are the rule.
coarse = npst.arrays(np.int64, (3,), elements=st.integers(-1, 1)).filter(lambda vector: vector.any())
# Any direction, also nearly equal ones that float32 sums can't tell apart.
fine = npst.arrays(np.float64, (3,), elements=st.floats(0.999, 1.001))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_every_query_finds_what_numpy_finds(data):
    vectors = data.draw(st.sampled_from([coarse, fine]))
    n_of_user = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    keys = [unit(data.draw(st.lists(vectors, min_size=n, max_size=n))) for n in n_of_user]
    positions = [sorted(data.draw(st.sets(st.integers(0, 40), min_size=n, max_size=n))) for n in n_of_user]
    user_ids = [f"u{user}" for user, n in enumerate(n_of_user) for _ in range(n)]
    index = build_index(user_ids, [p for ps in positions for p in ps], embeddings(np.concatenate(keys)))

    user = data.draw(st.integers(0, len(n_of_user) - 1))
    query = unit(data.draw(vectors))
    k = data.draw(st.integers(0, 14))
    floor = data.draw(st.none() | st.sampled_from([-1.0, 0.0, 0.5, 1.0]))
    target = data.draw(st.integers(0, 41))
    expected = brute_force(keys[user], positions[user], query, k, own=target, before=None, floor=floor)
    assert index.nearest(f"u{user}", query, k, own_position=target, min_similarity=floor) == expected
    expected = brute_force(keys[user], positions[user], query, k, before=target, floor=floor)
    assert index.nearest(f"u{user}", query, k, before_position=target, min_similarity=floor) == expected


def test_the_nearest_of_continuous_vectors_is_numpys_argmax():
    draws = np.random.default_rng(0)
    keys, queries = unit(draws.normal(size=(20 * 50, 3))), unit(draws.normal(size=(200, 3)))
    index = build_index([f"u{i // 50:02}" for i in range(1000)], [i % 50 for i in range(1000)], embeddings(keys))
    for row, query in enumerate(queries):
        user = row % 20
        scores = keys[user * 50 : user * 50 + 50] @ query
        assert index.nearest(f"u{user:02}", query, 1) == [int(scores.argmax())]
        assert index.nearest(f"u{user:02}", query, 5) == np.argsort(-scores)[:5].tolist()


def test_many_equal_keys_come_in_the_order_of_their_positions():
    keys = unit([[1, 2, 3]] * 40 + [[1, 2, 2.9]] * 40)
    index = build_index(["u"] * 80, list(range(80)), embeddings(keys))
    assert index.nearest("u", keys[0], 3) == [0, 1, 2]
    assert index.nearest("u", keys[0], 3, own_position=1) == [0, 2, 3]
    assert index.nearest("u", keys[-1], 3) == [40, 41, 42]
    assert index.nearest("u", keys[0], 45) == list(range(45))


def test_nothing_of_another_user_is_found():
    keys = unit([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0.1]])
    index = build_index(["a", "a", "b", "b"], [0, 1, 0, 1], embeddings(keys))
    assert index.nearest("b", keys[1], 4) == [0, 1]
    assert index.nearest("b", keys[0], 1) == [1]
    assert index.nearest("c", keys[0], 1) == []


def test_the_only_memory_is_not_found_by_its_own_sample():
    index = build_index(["a"], [4], embeddings(unit([[1, 0, 0]])))
    assert retrieve(index, ["a", "a"], [4, 5], embeddings(unit([[1, 0, 0], [1, 0, 0]])), k=3) == [[], [4]]


def test_a_sample_before_the_target_sees_earlier_positions_only():
    keys = unit([[1, 0, 0], [1, 0.1, 0], [1, 0, 0]])
    index = build_index(["a"] * 3, [0, 2, 5], embeddings(keys))
    queries = embeddings(np.repeat(keys[:1], 4, axis=0))
    found = retrieve(index, ["a"] * 4, [0, 2, 5, 9], queries, k=9, before_target=True)
    assert found == [[], [0], [0, 2], [0, 5, 2]]
    assert retrieve(index, ["a"] * 4, [0, 2, 5, 9], queries, k=9) == [[5, 2], [0, 5], [0, 2], [0, 5, 2]]


def test_the_floor_keeps_a_memory_of_exactly_that_similarity():
    keys = unit([[1, 0, 0], [1, 1, 0], [0, 1, 0], [-1, 0, 0]])
    index = build_index(["a"] * 4, [0, 1, 2, 3], embeddings(keys))
    assert index.nearest("a", keys[0], 9, min_similarity=1.0) == [0]
    assert index.nearest("a", keys[0], 9, min_similarity=0.7) == [0, 1]
    assert index.nearest("a", keys[0], 9, min_similarity=0.0) == [0, 1, 2]
    assert index.nearest("a", keys[0], 9) == [0, 1, 2, 3]


def test_a_query_without_a_known_word_finds_nothing():
    index = build_index(["a"], [0], embeddings(unit([[1, 0, 0]])))
    assert retrieve(index, ["a", "a"], [1, 2], embeddings([[0, 0, 0], [1, 0, 0]]), k=1) == [[], [0]]


@pytest.mark.parametrize("bad", [[0, 0, 0], [np.nan, 1, 0], [np.inf, 0, 0], [3, 0, 0]])
def test_a_key_that_is_no_unit_vector_is_refused_by_name(bad):
    with pytest.raises(RetrievalError, match="memory of user b at position 7: vector of length"):
        build_index(["a", "b"], [0, 7], embeddings([[1, 0, 0], bad]))


@pytest.mark.parametrize("bad", [[np.nan, 1, 0], [3, 0, 0]])
def test_a_query_that_is_no_unit_vector_is_refused_by_name(bad):
    index = build_index(["a"], [0], embeddings([[1, 0, 0]]))
    with pytest.raises(RetrievalError, match="query of user a at position 8"):
        retrieve(index, ["b", "a"], [1, 8], embeddings([[1, 0, 0], bad]), k=1)


def test_queries_of_another_fit_are_refused():
    index = build_index(["a"], [0], embeddings([[1, 0, 0]]))
    foreign = Embeddings(np.array([[1, 0, 0]], np.float32), Space("lsa", 3, "0" * 64))
    with pytest.raises(DataError, match="can't be compared"):
        retrieve(index, ["a"], [1], foreign, k=1)


@pytest.mark.parametrize(
    ("user_ids", "positions"), [("aba", [0, 0, 1]), ("aab", [1, 0, 0]), ("aab", [1, 1, 0])], ids=str
)
def test_memories_out_of_order_are_refused(user_ids, positions):
    with pytest.raises(RetrievalError, match="sorted by user and position"):
        build_index(list(user_ids), positions, embeddings(unit(np.eye(3))))


def written(index, folder):
    for name, content in index.files().items():
        (folder / name).write_bytes(content)
    return folder


def test_a_loaded_index_finds_the_same(tmp_path):
    keys = unit(np.random.default_rng(1).normal(size=(12, 3)))
    index = build_index(["é"] * 5 + ["b"] * 7, [*range(5), *range(7)], embeddings(keys))
    loaded = MemoryIndex.load(written(index, tmp_path))
    assert loaded.space == SPACE
    assert loaded.files() == index.files()
    for user_id in ("é", "b"):
        assert loaded.nearest(user_id, keys[3], 4) == index.nearest(user_id, keys[3], 4)


@pytest.mark.parametrize("name", ["index.json", "offsets.npy", "positions.npy", "keys.npy"])
def test_a_damaged_or_missing_index_file_is_named(tmp_path, name):
    written(build_index(["a", "b"], [0, 0], embeddings(np.eye(3)[:2])), tmp_path)
    content = (tmp_path / name).read_bytes()
    for damaged in (content[: len(content) // 2], content[:-7], b""):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(DataError, match=str(tmp_path)):
            MemoryIndex.load(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(MissingInputError, match=name):
        MemoryIndex.load(tmp_path)


def test_index_files_of_different_runs_are_refused(tmp_path):
    written(build_index(["a", "b"], [0, 0], embeddings(np.eye(3)[:2])), tmp_path)
    other = build_index(["a", "a", "b"], [0, 1, 0], embeddings(np.eye(3)))
    (tmp_path / "offsets.npy").write_bytes(other.files()["offsets.npy"])
    with pytest.raises(DataError, match="don't belong together"):
        MemoryIndex.load(tmp_path)
