"""What processes of one run tell each other; most of it shown with threads that share a store."""

import gc
import os
import pickle
import time
from contextlib import contextmanager

import pytest
import torch
from several import in_processes, in_threads
from torch.distributed import HashStore, TCPStore

from personas_tune import processes
from personas_tune.errors import ConfigError, DataError, Interrupted, OtherProcessFailed
from personas_tune.processes import Processes, alone, joined, take_own_device


def test_each_gets_the_values_of_all_by_rank_and_the_store_forgets_them():
    def work(here):
        values = [here.gather((here.rank, turn)) for turn in range(5)]
        return values, here._store.num_keys()

    for values, n_keys in in_threads(work, 3):
        assert values == [[(rank, turn) for rank in range(3)] for turn in range(5)]
        assert n_keys <= 2 * 3 * 2 + 1  # a value and its size, of the last exchange and of the one before; `failed`


def test_values_may_be_larger_than_torch_s_store_takes():
    first = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    stores = [first, TCPStore("localhost", first.port, is_master=False)]
    sent = [os.urandom(9 * 2**20), b"little"]

    def work(here):
        return Processes(here.rank, 2, stores[here.rank]).gather_in_first(sent[here.rank])

    assert in_threads(work, 2) == [sent, []]


def test_nothing_that_others_put_into_the_store_is_run(tmp_path):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    def work(here):
        if here.rank == 1:
            here._put("exchange 0 1", Harm())
        else:
            with pytest.raises(pickle.UnpicklingError, match="mkdir is nothing that processes exchange"):
                here.gather(None)

    in_threads(work, 2)
    assert not (tmp_path / "harm").exists()


def test_who_waits_has_time_for_something_else():
    def work(here):
        if here.rank == 0:
            return here.gather(None, meanwhile=lambda: here.ask_to_stop(15))
        while here.asked_to_stop() is None:
            pass
        return here.gather(None)

    assert in_threads(work, 2) == [[None, None]] * 2


def test_what_the_first_makes_all_have_and_only_the_first_has_made():
    made = []

    def work(here):
        return here.from_first(lambda: made.append(here.rank) or "made")

    assert in_threads(work, 3) == ["made"] * 3
    assert made == [0]


def test_a_context_is_entered_and_left_by_the_first_alone():
    events = []

    @contextmanager
    def held():
        events.append("enter")
        yield "held"
        events.append("leave")

    def work(here):
        with here.held_by_first(held) as got:
            here.gather(None)
            return got

    assert in_threads(work, 3) == ["held"] * 3
    assert events == ["enter", "leave"]


def test_what_others_leave_the_first_finds_in_each_ones_order():
    def work(here):
        if not here.is_first:
            for number in range(3):
                here.tell_first((here.rank, number))
        here.gather(None)
        return list(here.told()) if here.is_first else None

    found = in_threads(work, 3)[0]
    assert sorted(found) == [(rank, number) for rank in (1, 2) for number in range(3)]
    assert [number for rank, number in found if rank == 1] == [0, 1, 2]


def test_one_alone_waits_for_nobody():
    here = Processes()
    here.ask_to_stop(15)
    assert here.gather("mine") == ["mine"]
    assert here.from_first(lambda: "made") == "made"
    assert (list(here.told()), here.asked_to_stop(), here.is_first) == ([], None, True)
    with pytest.raises(DataError), here.one_speaks():
        raise DataError("mine")


# Mistakes


def outcome_of(work):
    """What a block comes to: its error's lines and exit status."""
    try:
        return work()
    except Exception as error:
        return type(error), getattr(error, "lines", None), getattr(error, "exit_status", None)


SILENT = (OtherProcessFailed, [], 2)


def test_of_several_that_fail_one_speaks():
    def work(here):
        with here.one_speaks():
            raise DataError(f"of {here.rank}")

    outcomes = in_threads(lambda here: outcome_of(lambda: work(here)), 3)
    (spoken,) = [outcome for outcome in outcomes if outcome != SILENT]
    assert spoken == (DataError, [f"of {outcomes.index(spoken)}"], 2)


@pytest.mark.parametrize("wait", [
    lambda here: here.gather(None), lambda here: here.from_first(lambda: None), lambda here: here.part(),
])  # fmt: skip
def test_who_waits_for_one_that_fails_is_told(wait):
    def work(here):
        with here.one_speaks():
            if here.rank == 1:
                raise DataError("of 1")
            wait(here)

    said = (DataError, ["of 1"], 2)
    assert in_threads(lambda here: outcome_of(lambda: work(here)), 3) == [SILENT, said, SILENT]


def test_a_bug_of_ours_is_told_once_too():
    def work(here):
        with here.one_speaks():
            here.gather(None) if here.rank else here.gather(1 / 0)

    assert in_threads(lambda here: outcome_of(lambda: work(here)), 2) == [(ZeroDivisionError, None, None), SILENT]


def test_all_end_with_the_status_of_the_signal():
    def work(here):
        with here.one_speaks():
            here.gather(None)
            raise Interrupted(15, "stopped")

    outcomes = in_threads(lambda here: outcome_of(lambda: work(here)), 3)
    assert [status for _, _, status in outcomes] == [143] * 3
    assert sum(len(lines) for _, lines, _ in outcomes) == 1


def test_if_the_store_is_gone_with_the_process_it_lived_in_the_others_end_silently():
    server = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    here = Processes(1, 2, TCPStore("localhost", server.port, is_master=False, wait_for_workers=False))
    del server
    gc.collect()

    def work(wrong):
        with here.one_speaks():
            wrong()

    def find_a_mistake():
        raise DataError("of 1")

    assert outcome_of(lambda: work(lambda: here.gather(None))) == SILENT
    assert outcome_of(lambda: work(find_a_mistake)) == (DataError, ["of 1"], 2)


def test_the_first_stays_until_all_have_left():
    left = []

    def work(here):
        here.part()
        left.append(here.rank)
        return here._store.add("gone", 0)

    assert in_threads(work, 4)[0] == 4


# Joining


def test_without_torchrun_there_is_one(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined() as here:
        assert (here.rank, here.size) == (0, 1)


@pytest.mark.parametrize("missing", ["RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_an_environment_that_says_half_of_it_is_refused(monkeypatch, missing):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(missing)
    with (
        pytest.raises(ConfigError, match=rf"environment: WORLD_SIZE is 2, but .*{missing}.*; start with `tune run"),
        joined(),
    ):
        pass


def blocks_within(here):
    """Joins again, as a recipe within the pipeline does; the second comes late to the end."""
    with joined() as within:
        same = within is here
        if not here.is_first:
            time.sleep(0.1)
            here.tell_first("before the end")
    heard = list(here.told()) if here.is_first else None
    with alone(), joined() as single:
        size = single.size, "WORLD_SIZE" in os.environ
    with joined() as within:
        return same and within is here, heard, size, os.environ["WORLD_SIZE"]


def test_a_block_within_has_the_same_processes_and_ends_when_all_have_come_to_its_end():
    assert in_processes(blocks_within, 2) == [
        (True, ["before the end"], (1, False), "2"),
        (True, None, (1, False), "2"),
    ]


@pytest.fixture
def on_gpus(monkeypatch):
    """Pretends that this is a process of several on a machine with two GPUs; gives the GPUs that were taken."""
    taken = []
    monkeypatch.setattr(processes, "_current", Processes(3, 4, HashStore()))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    return taken


def test_each_process_takes_the_gpu_of_its_place_on_the_machine(on_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    for name in ("cpu", "cuda:0", "cuda"):
        take_own_device(name)
    assert on_gpus == [1]


def test_more_processes_than_gpus_are_refused(on_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match=r"--nproc_per_node: more processes than the 2 GPUs .*; set it to 2"):
        take_own_device("cuda")
    assert on_gpus == []
