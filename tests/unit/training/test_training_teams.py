"""Who trains what, and that processes which share an adapter train it as one would."""

from dataclasses import replace
from functools import partial
from itertools import islice, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from several import in_processes
from small_training import SETTINGS, small_model, some_rows
from torch import nn

from personas_tune.adapters.bank import AdapterBank
from personas_tune.processes import Processes
from personas_tune.training.fit import AdapterJob, train_steps, validation_loss
from personas_tune.training.teams import Place, Team, form_team, place_adapters, shared_adapters

sizes = st.lists(st.integers(1, 50), min_size=1, max_size=6)


# Placing


@given(sizes, st.integers(1, 9), st.sampled_from(["auto", "persona", "data", "fsdp"]))
def test_every_adapter_and_every_process_has_one_place(n_rows, n_processes, parallel):
    places = place_adapters(n_rows, n_processes, parallel)
    assert sorted(index for place in places for index in place.adapters) == list(range(len(n_rows)))
    assert [rank for place in places for rank in place.ranks] == list(range(n_processes))
    if parallel == "persona" or (parallel == "auto" and n_processes <= len(n_rows)):
        assert all(len(place.ranks) == 1 for place in places)
    if parallel in ("data", "fsdp"):
        assert len(places) == 1


@given(sizes, st.integers(1, 3))
def test_whole_personas_take_at_most_four_thirds_of_the_best_time(n_rows, n_processes):
    def time(placed):
        return max(sum(n for n, rank in zip(n_rows, placed, strict=True) if rank == own) for own in range(n_processes))

    places = place_adapters(n_rows, n_processes, "persona")
    rank_of = {index: rank for rank, place in enumerate(places) for index in place.adapters}
    best = min(time(placed) for placed in product(range(n_processes), repeat=len(n_rows)))
    assert time([rank_of[index] for index in range(len(n_rows))]) <= (4 / 3 - 1 / (3 * n_processes)) * best + 1e-9


@given(st.lists(st.integers(1, 50), min_size=1, max_size=3), st.integers(1, 4))
def test_processes_left_over_go_where_they_help_most(n_rows, n_left):
    def rows_per_process(sizes):
        return max(n / size for n, size in zip(n_rows, sizes, strict=True))

    n_processes = len(n_rows) + n_left
    size_of = {place.adapters[0]: len(place.ranks) for place in place_adapters(n_rows, n_processes, "auto")}
    ways = [way for way in product(range(1, n_left + 2), repeat=len(n_rows)) if sum(way) == n_processes]
    assert rows_per_process([size_of[index] for index in range(len(n_rows))]) == min(map(rows_per_process, ways))


def test_adapters_of_several_processes_are_named_with_their_number():
    places = place_adapters([9, 3], 4, "auto")
    assert shared_adapters(places, ["0", "1"], in_step=False) == {"0": "3"}
    assert shared_adapters(place_adapters([9, 3], 2, "fsdp"), ["0", "1"], in_step=True) == {
        "0": "2 in step", "1": "2 in step",
    }  # fmt: skip


@given(st.integers(1, 8), st.integers(0, 40))
def test_a_step_s_rows_are_shared_out_evenly_and_once(size, n_rows):
    shares = [Team(range(size), rank).share(range(n_rows)) for rank in range(size)]
    assert [row for share in shares for row in share] == list(range(n_rows))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_alone_needs_no_group():
    team, place = form_team([Place((0,), (0,))], Processes())
    weight = nn.Parameter(torch.ones(2))
    assert (team.leads, team.size, team.agree, place.adapters) == (True, 1, None, (0,))
    assert (team.add_up([weight], 2.5), team.sums([1.5]), team.follow_leader(3), team.follow_leader(None)) == (
        2.5, [1.5], 3, None,
    )  # fmt: skip
    assert weight.grad is None


def test_processes_that_share_an_adapter_begin_with_the_same_weights_and_draw_dropout_of_their_own():
    first, second = (AdapterBank(small_model()).add_new("set/0", 3, stream=stream) for stream in (0, 1))
    assert all(torch.equal(weight, second.masters[name]) for name, weight in first.masters.items())
    assert not torch.equal(first.rng["cpu"], second.rng["cpu"])
    assert torch.equal(first.rng["cpu"], AdapterBank(small_model()).add_new("set/0", 3).rng["cpu"])


# Training in one, two and four processes, without dropout

N_ROWS = [14, 10]
STEPS = {  # the rows of a step, and how they are run; three rows leave one of four processes without any
    "shared prefixes": replace(SETTINGS, batch_size=4, schedule="interleaved"),
    "plain": replace(SETTINGS, batch_size=4, prefix_sharing="off", schedule="interleaved"),
    "few rows": replace(SETTINGS, batch_size=3, gradient_accumulation_steps=1, schedule="interleaved"),
}


def jobs_of(bank, indices):
    """Adapters that have left their beginnings, where half of the gradients are zero; SGD at a rate of 1."""
    jobs = []
    for index in indices:
        masters = bank.add_new(f"set/{index}", seed=3).masters
        generator = torch.Generator().manual_seed(index)
        for weight in masters.values():
            weight.data.normal_(std=0.1, generator=generator)
        jobs.append(
            AdapterJob(
                name=f"set/{index}",
                rows=some_rows(N_ROWS[index], seed=index),
                prefixes=[f"u{row % 4}" for row in range(N_ROWS[index])],
                optimizer=torch.optim.SGD(masters.values(), lr=1),
                validation_rows=some_rows(3, seed=100 + index),
            )
        )
    return jobs


def one_step_of_each(settings, parallel, processes):
    """Gradients, loss and validation loss of this process's adapters."""
    team, place = form_team(place_adapters(N_ROWS, processes.size, parallel), processes)
    model = small_model(lora_dropout=0.0)
    bank = AdapterBank(model)
    jobs = jobs_of(bank, place.adapters)
    before = {job.name: bank[job.name].state_dict() for job in jobs}
    reports = islice(train_steps(model, bank, jobs, nn.CrossEntropyLoss(), settings, 0, team), len(jobs))
    losses = {report.adapter: report.loss for report in reports}
    return {
        job.name: {
            "gradients": differences(before[job.name], bank[job.name].state_dict()),
            "loss": losses[job.name],
            "validation loss": validation_loss(model, bank, job, nn.CrossEntropyLoss(), 2, 0, team),
        }
        for job in jobs
    }  # fmt: skip


def differences(before, after):
    return {name: weight - after[name] for name, weight in before.items()}


def each_way(parallel, processes):
    return {name: one_step_of_each(settings, parallel, processes) for name, settings in STEPS.items()}


@pytest.mark.parametrize(("n_processes", "parallel"), [(2, "persona"), (2, "data"), (4, "data"), (4, "auto")])
def test_several_processes_find_the_gradients_of_one(n_processes, parallel):
    expected = each_way("auto", Processes())
    seen = []
    for found in in_processes(partial(each_way, parallel), n_processes):
        for way, of_adapters in found.items():
            for adapter, values in of_adapters.items():
                seen.append((way, adapter))
                of_one = expected[way][adapter]
                assert values["loss"] == pytest.approx(of_one["loss"], rel=1e-6)
                assert values["validation loss"] == pytest.approx(of_one["validation loss"], rel=1e-5)
                ours, one = (torch.cat([g.flatten() for g in each["gradients"].values()]) for each in (values, of_one))
                assert (ours - one).norm() <= 1e-5 * one.norm(), (way, adapter)
    each_one = 1 if parallel == "persona" else n_processes if parallel == "data" else 2
    assert sorted(seen) == sorted([(way, f"set/{index}") for way in STEPS for index in (0, 1)] * each_one)


def talk(processes):
    """What the processes of two teams of two hear from each other."""
    team, _ = form_team([Place((0, 1), (0,)), Place((2, 3), (1,))], processes)
    weight = nn.Parameter(torch.full((2,), float(processes.rank)))
    if processes.rank != 3:  # its share has no rows
        weight.grad = torch.full((2,), 10.0 + processes.rank)
    total = team.add_up([weight], float(processes.rank))
    summed = weight.grad.tolist() if team.leads else None
    team.spread([weight])
    leader_said = team.follow_leader(15 if processes.rank == 0 else None)
    return team.leads, team.size, total, summed, weight.tolist(), leader_said, team.sums([1, processes.rank])


def test_a_team_sums_in_its_leader_and_follows_it():
    assert in_processes(talk, 4) == [
        (True, 2, 1.0, [21.0, 21.0], [0.0, 0.0], 15, [2.0, 1.0]),
        (False, 2, 1.0, None, [0.0, 0.0], 15, [2.0, 1.0]),
        (True, 2, 5.0, [12.0, 12.0], [2.0, 2.0], None, [2.0, 5.0]),
        (False, 2, 5.0, None, [2.0, 2.0], None, [2.0, 5.0]),
    ]
