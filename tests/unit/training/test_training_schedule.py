"""Whose turn it is, and where the others wait."""

from fractions import Fraction
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from personas_tune.training.schedule import Progress, checkpoint_turns, move_training_state, next_in_turn

sizes = st.lists(st.integers(1, 12), min_size=1, max_size=6)


def turns(n_steps, schedule, done=None):
    """Whose turn it is, from a given moment to the end."""
    done = list(done or [0] * len(n_steps))
    order = []
    while (turn := next_in_turn(done, n_steps, schedule)) is not None:
        done[turn] += 1
        order.append(turn)
    return order


def test_one_by_one_ends_one_adapter_before_the_next():
    assert turns([3, 2, 1], "one_by_one") == [0, 0, 0, 1, 1, 2]


def test_interleaved_adapters_come_to_their_ends_together():
    assert turns([6, 2], "interleaved") == [0, 1, 0, 0, 0, 1, 0, 0]
    assert turns([2, 2, 2], "interleaved") == [0, 1, 2, 0, 1, 2]


@given(sizes, st.sampled_from(["one_by_one", "interleaved"]))
def test_every_adapter_takes_all_of_its_steps(n_steps, schedule):
    order = turns(n_steps, schedule)
    assert [order.count(index) for index in range(len(n_steps))] == n_steps


@given(sizes)
def test_no_interleaved_adapter_is_ever_a_step_ahead_of_the_share_that_the_others_have_done(n_steps):
    done = [0] * len(n_steps)
    for turn in turns(n_steps, "interleaved"):
        assert Fraction(done[turn], n_steps[turn]) == min(Fraction(d, n) for d, n in zip(done, n_steps, strict=True))
        done[turn] += 1


@given(sizes, st.integers(1, 4))
def test_interleaved_adapters_all_stand_at_the_end_of_an_epoch_once_in_each(steps_per_epoch, epochs):
    """Which is when a checkpoint is written: not one for each of 64 adapters."""
    done = [0] * len(steps_per_epoch)
    seen = []
    for turn in turns([epochs * steps for steps in steps_per_epoch], "interleaved"):
        done[turn] += 1
        seen.append(list(done))
    assert all([epoch * steps for steps in steps_per_epoch] in seen for epoch in range(1, epochs + 1))


@given(sizes, st.sampled_from(["one_by_one", "interleaved"]), st.data())
def test_a_resumed_schedule_goes_on_as_the_unbroken_one(n_steps, schedule, data):
    whole = turns(n_steps, schedule)
    broken_at = data.draw(st.integers(0, len(whole)))
    done = [whole[:broken_at].count(index) for index in range(len(n_steps))]
    assert turns(n_steps, schedule, done) == whole[broken_at:]


# Checkpoints

SCHEDULES = st.sampled_from(["one_by_one", "interleaved"])
epochs_of = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3)), min_size=1, max_size=4)


def team_of(shape):
    """Adapters by their steps per epoch and their epochs, none of which has begun."""
    return [Progress(0, steps * epochs, steps) for steps, epochs in shape]


def after(team, order, turn):
    """The team after so many of its turns."""
    done = [each.steps_done + order[:turn].count(index) for index, each in enumerate(team)]
    return [Progress(d, each.n_steps, each.steps_per_epoch) for d, each in zip(done, team, strict=True)]


def order_of(team, schedule):
    return turns([each.n_steps for each in team], schedule, [each.steps_done for each in team])


@given(epochs_of, SCHEDULES, st.integers(1, 7))
def test_one_team_writes_a_checkpoint_each_time_so_many_steps_are_done(shape, schedule, every):
    n_steps = sum(steps * epochs for steps, epochs in shape)
    expected = {turn for turn in range(1, n_steps) if turn % every == 0}
    assert checkpoint_turns([team_of(shape)], schedule, every) == expected


@given(epochs_of, SCHEDULES)
def test_one_team_writes_a_checkpoint_whenever_none_of_its_adapters_is_within_an_epoch(shape, schedule):
    team = team_of(shape)
    order = order_of(team, schedule)
    expected = {
        turn
        for turn in range(1, len(order))
        if all(each.steps_done % each.steps_per_epoch == 0 for each in after(team, order, turn))
    }
    assert checkpoint_turns([team], schedule, None) == expected


@given(epochs_of, SCHEDULES, st.none() | st.integers(1, 7), st.data())
def test_a_resumed_team_writes_the_checkpoints_that_were_left(shape, schedule, every, data):
    team = team_of(shape)
    order = order_of(team, schedule)
    begun = data.draw(st.integers(0, len(order)))
    due = checkpoint_turns([team], schedule, every)
    left = checkpoint_turns([after(team, order, begun)], schedule, every)
    assert left == {turn - begun for turn in due if turn > begun}


def test_teams_count_their_steps_together_and_the_longest_ones_epochs_count():
    short, long = team_of([(2, 1)]), team_of([(3, 2)])
    assert checkpoint_turns([short, long], "one_by_one", 3) == {2, 4}  # 2, 4, 5, 6, 7 and 8 steps are done
    assert checkpoint_turns([short, long], "one_by_one", None) == {3}
    assert checkpoint_turns([short, [], long], "one_by_one", 100) == set()
    assert checkpoint_turns([], "one_by_one", None) == checkpoint_turns([[]], "one_by_one", 1) == set()


# Waiting


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adagrad, partial(torch.optim.SGD, momentum=0.9)])
def test_states_that_take_room_move_and_counts_of_steps_stay(kind):
    weight, optimizer = stepped(kind)
    large = {name for name, value in optimizer.state[weight].items() if value.dim() > 0}
    assert large
    move_training_state([], optimizer, torch.device("meta"))  # stands for a GPU: nothing large may stay behind
    assert {name for name, value in optimizer.state[weight].items() if value.device.type == "meta"} == large


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("fused", [True, False])
def test_a_weight_keeps_its_identity_and_steps_on_after_it_has_waited(fused):
    kind = partial(torch.optim.AdamW, fused=fused)
    (weight, optimizer), (stayed, other) = stepped(kind, "cuda"), stepped(kind, "cuda")
    move_training_state([weight], optimizer, torch.device("cpu"))
    assert weight.device.type == "cpu"
    move_training_state([weight], optimizer, torch.device("cuda"))
    assert optimizer.param_groups[0]["params"][0] is weight
    for each in (optimizer, other):
        each.param_groups[0]["params"][0].grad = torch.ones(4, 3, device="cuda")
        each.step()
    assert torch.equal(weight, stayed)


def stepped(kind, device="cpu"):
    weight = nn.Parameter(torch.arange(12.0, device=device).view(4, 3))
    optimizer = kind([weight], lr=0.1)
    weight.grad = torch.full((4, 3), 0.5, device=device)
    optimizer.step()
    weight.grad = None
    return weight, optimizer
