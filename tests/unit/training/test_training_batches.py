"""How rows are cut into rounds and passes."""

from shared_rows import rows_of_users

from personas_tune.datasets import TokenRow
from personas_tune.training.batches import AnswerBatch, Round, bundles, even_parts, fill_plan, plan_passes, shape_of


def plan(rows, names, rows_per_pass, share=True):
    return plan_passes(rows, names, pad_id=0, share=share, rows_per_pass=rows_per_pass)


def test_small_groups_have_their_prefixes_run_together_and_large_ones_their_branches_in_parts() -> None:
    rows, names = rows_of_users(n_users=3, n_rows=4)
    together = plan(rows, names, 8)
    assert [(len(part.prefixes.lengths), [batch.runs for batch in part.batches]) for part in together] == [
        (2, [(4, 4)]),
        (1, [(4,)]),
    ]
    apart = plan(rows, names, 3)
    assert [[batch.runs for batch in part.batches] for part in apart] == [[(2,), (2,)]] * 3


def batches_of(parts) -> list[AnswerBatch]:
    return [batch for part in parts for batch in (part.batches if isinstance(part, Round) else [part])]


def test_every_answer_is_predicted_once() -> None:
    rows, names = rows_of_users()
    for share in (True, False):
        for rows_per_pass in (1, 3, 12):
            batches = batches_of(plan(rows, names, rows_per_pass, share))
            assert all(len(batch.tokens) <= rows_per_pass for batch in batches)
            answers = sorted(token for batch in batches for token in batch.targets.tolist())
            assert answers == sorted(token for row in rows for token in row.answer)


def test_rows_without_a_useful_common_prefix_are_run_whole() -> None:
    alone = TokenRow([1, 2, 3, 4, 5, 6], 4)
    unlike = [TokenRow([9, n, n, n, n, n, 3, 7], 6) for n in range(3)]
    (batch,) = plan([alone, *unlike], ["alone", *["unlike"] * 3], 10)
    assert (batch.runs, batch.tokens.shape) == ((), (4, 8))


def test_only_rows_of_one_name_share() -> None:
    rows, _ = rows_of_users(n_users=1)
    (batch,) = plan(rows, ["a", "b", "c", "d"], 10)
    assert batch.runs == ()


def test_plans_are_filled_up_to_a_shape_that_all_processes_have() -> None:
    rows, names = rows_of_users(n_users=2, n_rows=5)
    one = plan(rows, names, 2)
    other = plan([*rows[:3], TokenRow([1, 2, 3], 2)], ["a", "a", "a", "b"], 2)
    assert [shape_of(parts) for parts in (one, other, [])] == [[0, 3, 3], [1, 2], [0]]
    for parts in (one, other, []):
        filled = fill_plan(parts, [1, 3, 3], 0)
        assert [isinstance(part, Round) for part in filled] == [True, True, False]
        assert shape_of(filled) == [1, 3, 3]
        n_counted = sum(batch.counts * len(batch.targets) for batch in batches_of(filled))
        assert n_counted == sum(len(batch.targets) for batch in batches_of(parts))


def test_cutting_into_even_parts_and_bundles_by_hand() -> None:
    assert list(even_parts([1, 2, 3, 4, 5], 2)) == [[1], [2, 3], [4, 5]]
    assert list(even_parts([], 2)) == []
    assert list(bundles([2, 2, 5, 1, 1], 4)) == [range(0, 2), range(2, 3), range(3, 5)]
    assert list(bundles([], 4)) == []
