"""Teams with uneven work take their steps side by side; checkpoints and the end are common."""

import time
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from several import in_threads

from personas_tune.training.fit import StepReport
from personas_tune.training.meetings import Meetings
from personas_tune.training.schedule import Progress, checkpoint_turns
from personas_tune.training.stopping import StopRequest
from personas_tune.training.teams import Team


@dataclass
class Follower:
    """One process with steps of its own, and what has happened to it."""

    stop: StopRequest = field(default_factory=StopRequest)
    done: int = 0
    heard: list[StepReport] = field(default_factory=list)
    saved: list[list[int]] = field(default_factory=list)
    signal: int | None = None

    def steps(self, rank, n, told_in):
        """So many steps, and in one of them the process is told to end."""
        for self.done in range(1, n + 1):
            if self.done == told_in:
                self.stop.signal_number = 15
            time.sleep(0.0005)  # a step takes time, in which another process may be told to end
            yield StepReport(f"set/{rank}", self.done, 0, 4, 1.0, 0.1, None, 0.1)

    def follow(self, here, n_steps, due, told):
        meetings = Meetings(
            here,
            Team((here.rank,), here.rank),
            self.stop,
            self.heard.append,
            lambda: self.saved.append(here.gather(self.done)),
        )
        if told == (here.rank, 0):
            self.stop.signal_number = 15
        told_in = told[1] if told is not None and told[0] == here.rank else None
        self.signal = meetings.follow(self.steps(here.rank, n_steps[here.rank], told_in), due)
        return self


def run(n_steps, due, told=None):
    """Processes with so many steps each, one of which is told to end in one of its steps."""
    return in_threads(lambda here: Follower().follow(here, n_steps, due, told), len(n_steps))


def test_whoever_is_done_has_its_part_of_the_checkpoints_to_come_and_the_first_hears_of_every_step():
    followers = run([2, 5, 0], due={1, 3, 4})
    for follower in followers:
        assert follower.saved == [[1, 1, 0], [2, 3, 0], [2, 4, 0]]
        assert follower.signal is None
    heard = [(report.adapter, report.step) for report in followers[0].heard]
    assert sorted(heard) == [("set/0", 1), ("set/0", 2), *(("set/1", step) for step in range(1, 6))]
    assert [follower.heard for follower in followers[1:]] == [[], []]


@pytest.mark.parametrize("told", [(0, 2), (1, 1), (2, 0)])
def test_told_to_end_all_stop_at_a_common_checkpoint(told):
    """Also if it is one without work that is told."""
    followers = run([200, 100, 0], due=set(), told=told)
    assert [follower.signal for follower in followers] == [15] * 3
    (checkpoint,) = followers[0].saved
    assert [follower.saved for follower in followers] == [[checkpoint]] * 3
    assert checkpoint == [follower.done for follower in followers]
    assert len(followers[0].heard) == sum(checkpoint) < 300


def test_told_to_end_in_the_last_step_it_is_saved():
    (follower,) = run([3], due={2}, told=(0, 3))
    assert (follower.signal, follower.saved) == (15, [[2], [3]])


@settings(max_examples=25)
@given(st.data())
def test_they_never_wait_for_each_other_in_vain(data):
    n_steps = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=3))
    every = data.draw(st.none() | st.integers(1, 4))
    due = checkpoint_turns([[Progress(0, n, 2)] if n else [] for n in n_steps], "one_by_one", every)
    rank = data.draw(st.integers(0, len(n_steps) - 1))
    told = data.draw(st.none() | st.just((rank, data.draw(st.integers(0, n_steps[rank])))))
    followers = run(n_steps, due, told)
    first = followers[0]
    assert all((each.signal, each.saved) == (first.signal, first.saved) for each in followers)
    assert len(first.heard) == sum(each.done for each in followers)
    if told is None:
        assert [each.done for each in followers] == n_steps
        assert first.saved == [[min(turn, n) for n in n_steps] for turn in sorted(due)]
    elif first.signal is not None:
        assert first.saved[-1] == [each.done for each in followers]
