import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from personas_tune.datasets import TokenRow
from personas_tune.datasets.token_tree import build_token_tree

ROWS = st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=8), min_size=1, max_size=8)


def as_rows(lists: list[list[int]]) -> list[TokenRow]:
    return [TokenRow(tokens, len(tokens) - 1) for tokens in lists]


@given(ROWS)
def test_following_a_node_s_ancestors_spells_its_row(lists: list[list[int]]) -> None:
    tree = build_token_tree(as_rows(lists))
    for row, source in zip(lists, tree.sources, strict=True):
        path = np.flatnonzero(tree.attends[source])
        path = path[np.argsort(tree.depth[path])]
        assert tree.tokens[path].tolist() == row[:-1]
        assert tree.depth[path].tolist() == list(range(len(row) - 1))


@given(ROWS)
def test_no_prefix_is_stored_twice(lists: list[list[int]]) -> None:
    for whole in (True, False):
        tree = build_token_tree(as_rows(lists), whole=whole)
        prefixes = {tuple(row[: n + 1]) for row in lists for n in range(len(row) - (not whole))}
        assert len(tree.tokens) == len(prefixes)


def test_a_hand_made_tree() -> None:
    tree = build_token_tree([TokenRow([7, 8, 9], 2), TokenRow([7, 8, 5], 2)], whole=True)
    assert tree.tokens.tolist() == [7, 8, 5, 9]
    assert tree.depth.tolist() == [0, 1, 2, 2]
    assert tree.attends.tolist() == [
        [True, False, False, False],
        [True, True, False, False],
        [True, True, True, False],
        [True, True, False, True],
    ]
    assert tree.sources.tolist() == [1, 1]
    assert tree.targets.tolist() == [9, 5]


def test_a_last_token_needs_no_node() -> None:
    tree = build_token_tree([TokenRow([7, 8, 9], 2), TokenRow([7, 8, 5, 6], 2)])
    assert tree.tokens.tolist() == [7, 8, 5]
    assert tree.attends.tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    assert tree.sources.tolist() == [1, 1, 2]
    assert tree.targets.tolist() == [9, 5, 6]
