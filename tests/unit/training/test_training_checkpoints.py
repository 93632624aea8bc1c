"""Checkpoints: a training goes on from any of them to the same bits, and from nothing else."""

import json
import os
import resource
import shutil
import signal
from dataclasses import replace
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from several import in_threads
from small_training import N_STEPS, SETTINGS, small_model, small_training
from test_training_state import assert_same

from personas_tune.errors import CheckpointError, MissingInputError
from personas_tune.training import parts, stopping
from personas_tune.training.checkpoints import (
    MARKER,
    Checkpoints,
    Origin,
    Part,
    checkpoint_folder,
    read_checkpoint,
)
from personas_tune.training.state import process_state
from personas_tune.training.stopping import stop_requests
from personas_tune.training.teams import Team

ORIGIN = Origin(
    adapter_set="set",
    settings={"seed": 5, "adapter_set": {"per": "persona"}, "optimizer": {"lr": 0.01, "betas": [0.9, 0.99]}},
    inputs={"/there/train.parquet": "a1", "/there/model.safetensors": "b2"},
    device="cpu",
    key="as it was",
)


def parts_of(training):
    return parts.parts_of(training.bank, training.jobs, Team(), rank=0)


def save_every_step(training, checkpoints):
    for number, _ in enumerate(training.steps(), start=1):
        checkpoints.save(number, parts_of(training))


def resumed(checkpoint, settings=SETTINGS, model=None):
    """A training built anew and put where the checkpoint stands."""
    training = small_training(settings, model=model)
    parts.restore_parts(training.bank, training.jobs, Team(), 0, checkpoint)
    return training


@pytest.fixture(scope="module")
def unbroken():
    return small_training().to_the_end()


@pytest.fixture(scope="module")
def every_step(tmp_path_factory):
    """A folder with a checkpoint of every step."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    save_every_step(small_training(replace(SETTINGS, schedule="interleaved")), Checkpoints(folder, ORIGIN, 99))
    return folder


@pytest.fixture
def folder(every_step, tmp_path):
    """The checkpoints of steps 3 and 4, to be changed."""
    for step in (3, 4):
        shutil.copytree(every_step / f"step_{step}", tmp_path / "checkpoints" / f"step_{step}")
    return tmp_path / "checkpoints"


# To the bit


def test_a_training_goes_on_from_every_step_to_the_same_bits(every_step, unbroken):
    model = small_model()
    for step in range(1, N_STEPS + 1):
        training = resumed(read_checkpoint(every_step / f"step_{step}"), model=model)
        assert sum(job.steps_done for job in training.jobs) == step
        assert len(list(training.steps())) == N_STEPS - step
        assert_same(training.state(), unbroken)


@pytest.mark.parametrize("changed", [{"schedule": "one_by_one"}, {"schedule": "interleaved", "offload_waiting": True}])
def test_schedule_and_offloading_may_change_in_between(every_step, unbroken, changed):
    checkpoint = read_checkpoint(every_step / "step_7")
    assert_same(resumed(checkpoint, replace(SETTINGS, **changed)).to_the_end(), unbroken)


def test_what_the_random_generators_gave_before_doesnt_matter(every_step, unbroken):
    training = resumed(read_checkpoint(every_step / "step_5"))
    torch.rand(17)
    assert_same(training.to_the_end(), unbroken)


def test_saving_changes_nothing(tmp_path, unbroken):
    training = small_training()
    save_every_step(training, Checkpoints(tmp_path / "c", ORIGIN, 1))
    assert_same(training.state(), unbroken)


def test_nothing_is_pickled(every_step):
    files = {file.suffix for file in every_step.rglob("*") if file.is_file()}
    assert files == {".safetensors", ".json"}


# What is kept


def test_the_last_ones_are_kept_and_what_was_left_behind_is_removed(tmp_path):
    folder = tmp_path / "c"
    for left in ("step_99.tmp", "step_2", "step_50.tmp"):
        (folder / left).mkdir(parents=True)
        (folder / left / "adapter_0.json").write_text("{")
    save_every_step(small_training(), Checkpoints(folder, ORIGIN, 3))
    assert sorted(path.name for path in folder.iterdir()) == ["step_10", "step_11", "step_12"]
    for path in folder.iterdir():
        read_checkpoint(path).check_files()


def test_an_adapter_that_took_no_step_is_linked_and_not_written_again(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", ORIGIN, 2)
    training = small_training()
    for number, _ in enumerate(islice(training.steps(), 2), start=1):  # both are of the larger adapter
        checkpoints.save(number, parts_of(training))
    one, two = (tmp_path / "c" / f"step_{step}" for step in (1, 2))
    assert (one / "adapter_1.safetensors").samefile(two / "adapter_1.safetensors")
    assert not (one / "adapter_0.safetensors").samefile(two / "adapter_0.safetensors")


def test_without_hard_links_everything_is_written(tmp_path, monkeypatch):
    def only_the_first(source, target):
        if target.name.endswith(".json"):
            raise OSError("no links here")
        link(source, target)

    link = os.link
    monkeypatch.setattr(os, "link", only_the_first)
    checkpoints = Checkpoints(tmp_path / "c", ORIGIN, 9)
    training = small_training()
    for number, _ in enumerate(islice(training.steps(), 3), start=1):
        checkpoints.save(number, parts_of(training))
    files = list((tmp_path / "c").rglob("adapter_1.*"))
    assert {path.stat().st_nlink for path in files} == {1}
    for step in (1, 2, 3):
        read_checkpoint(tmp_path / "c" / f"step_{step}").check_files()


def test_a_resumed_training_keeps_the_one_that_it_came_from(folder):
    checkpoints = Checkpoints(folder, ORIGIN, 2)
    found, _ = checkpoints.find(True)
    checkpoints.go_on_from(found)
    training = resumed(found)
    next(iter(training.steps()))
    checkpoints.save(5, parts_of(training))
    assert sorted(path.name for path in folder.iterdir()) == ["step_4", "step_5"]


def test_without_a_checkpoint_to_keep_none_is_written(tmp_path):
    Checkpoints(tmp_path / "c", ORIGIN, 0).save(1, parts_of(small_training()))
    assert not (tmp_path / "c").exists()


def test_whoever_follows_a_leader_keeps_its_own_random_stream_only(tmp_path):
    training, team = small_training(), Team((3, 5), 5)
    next(iter(training.steps()))
    mine = parts.parts_of(training.bank, training.jobs, team, rank=5)
    assert [part.name for part in mine] == ["process_5", "adapter_0_stream_1", "adapter_1_stream_1"]
    checkpoints = Checkpoints(tmp_path / "c", ORIGIN, 2)
    checkpoints.save(1, [*mine, *parts_of(training)])
    found, _ = checkpoints.find("last")
    again = small_training()
    parts.restore_parts(again.bank, again.jobs, team, 5, found)
    assert [job.steps_done for job in again.jobs] == [1, 0]
    assert_same(again.bank["set/0"].rng, training.bank["set/0"].rng)
    assert not again.jobs[0].optimizer.state_dict()["state"]


def test_several_processes_each_write_their_own_parts(tmp_path, unbroken):
    training = small_training()
    list(islice(training.steps(), 9))
    process, zero, one = parts_of(training)
    shares = [[zero, process], [one, replace(process, name="process_1")]]

    def save(processes):
        checkpoints = Checkpoints(tmp_path / "c", ORIGIN, 2)
        checkpoints.save(9, shares[processes.rank], processes)
        checkpoints.save(10, shares[processes.rank], processes)

    in_threads(save, 2)
    ninth, tenth = (read_checkpoint(tmp_path / "c" / f"step_{step}") for step in (9, 10))
    assert ninth.parts.keys() == {"adapter_0", "adapter_1", "process_0", "process_1"}
    assert tenth.parts["adapter_1"] == ninth.parts["adapter_1"]
    assert (tenth.path / "adapter_1.safetensors").stat().st_nlink == 2  # linked
    found, _ = Checkpoints(tmp_path / "c", ORIGIN, 2).find("last")
    assert_same(resumed(found).to_the_end(), unbroken)


def test_it_lies_beside_the_adapters(tmp_path):
    assert checkpoint_folder(tmp_path / "adapters" / "persona") == tmp_path / "adapters" / ".persona.checkpoints"


# Which one is found


def origin(**changes):
    return replace(ORIGIN, **changes)


def test_the_last_complete_one_is_found(folder):
    shutil.copytree(folder / "step_4", folder / "step_10")
    for wanted in (True, "last", None):
        found, note = Checkpoints(folder, ORIGIN, 2).find(wanted)
        assert (found.path.name, note) == ("step_10", "")
    (folder / "step_10" / MARKER).unlink()  # killed before it was complete
    found, _ = Checkpoints(folder, ORIGIN, 2).find(True)
    assert found.path.name == "step_4"


def test_one_may_be_named_wherever_it_lies(folder, tmp_path):
    moved = shutil.copytree(folder / "step_3", tmp_path / "elsewhere")
    found, _ = Checkpoints(folder, ORIGIN, 2).find(str(moved))
    assert found.path == moved


def test_one_that_is_not_wanted_is_passed_over_and_said(folder):
    found, note = Checkpoints(folder, ORIGIN, 2).find(False)
    assert found is None
    assert note.startswith(f"{folder}/step_4 is passed over")
    assert "resume_from_checkpoint=true" in note
    assert Checkpoints(folder.parent / "none", ORIGIN, 2).find(False) == (None, "")


def test_without_a_word_one_of_another_training_is_passed_over_and_said(folder):
    found, note = Checkpoints(folder, origin(adapter_set="other"), 2).find(None)
    assert found is None
    assert note == "the checkpoint of step 4 is of another training (the set was set, is other)"
    assert Checkpoints(folder.parent / "none", ORIGIN, 2).find(None) == (None, "")


def test_one_of_this_training_is_found_behind_one_of_another(folder):
    other = Checkpoints(folder, origin(device="cuda"), 9)
    other._kept = [read_checkpoint(folder / f"step_{step}") for step in (3, 4)]
    other.save(7, [Part("process_0", process_state)])
    found, _ = Checkpoints(folder, ORIGIN, 2).find(True)
    assert found.path.name == "step_4"


@pytest.mark.parametrize("wanted", [True, "last"])
def test_a_missing_one_is_refused(tmp_path, wanted):
    with pytest.raises(MissingInputError, match="none: no complete checkpoint; leave resume_from_checkpoint out"):
        Checkpoints(tmp_path / "none", ORIGIN, 2).find(wanted)


def test_a_named_one_that_isnt_there_or_isnt_complete_is_refused(folder):
    with pytest.raises(MissingInputError, match=r"step_8: no checkpoint there; resume_from_checkpoint=last finds"):
        Checkpoints(folder, ORIGIN, 2).find(str(folder / "step_8"))
    (folder / "step_4" / MARKER).unlink()
    with pytest.raises(MissingInputError, match=r"step_4: the checkpoint is not complete \(it has no complete.json\)"):
        Checkpoints(folder, ORIGIN, 2).find(str(folder / "step_4"))


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"adapter_set": "other"}, "the set was set, is other"),
        ({"settings": {**ORIGIN.settings, "seed": 6}}, "seed was 5, is 6"),
        ({"settings": {**ORIGIN.settings, "optimizer": {"lr": 0.1}}},
         "optimizer.betas was [0.9, 0.99], is not set, optimizer.lr was 0.01, is 0.1"),
        ({"inputs": {"/here/train.parquet": "a1", "/here/model.safetensors": "c3"}}, "model.safetensors has changed"),
        ({"inputs": {"/there/train.parquet": "a1"}, "key": "of less"}, "other files were read, or by another version"),
        ({"device": "cuda"}, "the device was cpu, is cuda"),
        ({"key": "of version 9"}, "other files were read, or by another version"),
    ],
)  # fmt: skip
def test_one_of_another_training_is_refused_and_what_differs_named(folder, changes, difference):
    with pytest.raises(CheckpointError) as refused:
        Checkpoints(folder, origin(**changes), 2).find(True)
    line = str(refused.value)
    assert line.startswith(f"{folder}/step_4: the checkpoint is of another training ({difference}")
    assert line.endswith("; go back to its settings, or resume_from_checkpoint=false starts anew")


def test_where_the_inputs_lie_doesnt_matter(folder):
    moved = origin(inputs={"/elsewhere/t.parquet": "a1", "/elsewhere/m.safetensors": "b2"})
    found, _ = Checkpoints(folder, moved, 2).find(True)
    assert found.path.name == "step_4"


def test_other_versions_of_what_computes_are_said(folder, monkeypatch):
    monkeypatch.setattr("personas_tune.training.checkpoints.running_versions", lambda: {"torch": "9.9"})
    _, note = Checkpoints(folder, ORIGIN, 2).find(None)
    assert note.startswith("it was written with torch ")
    assert note.endswith(": last digits may differ")


# Damage


FILES = [f"{part}.{kind}" for part in ("adapter_0", "adapter_1", "process_0") for kind in ("safetensors", "json")]


@pytest.mark.parametrize("how", ["cut", "removed"])
@pytest.mark.parametrize("file", [*FILES, MARKER])
def test_a_damaged_one_is_refused(folder, file, how):
    path = folder / "step_4" / file
    if how == "removed" and file == MARKER:
        pytest.skip("without its marker it isn't complete")
    if how == "removed":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-2])
    expected = f"{MARKER} can't be read" if file == MARKER else f"{file} is not what was written"
    for wanted in (True, None, str(folder / "step_4")):
        with pytest.raises(CheckpointError) as refused:
            Checkpoints(folder, ORIGIN, 2).find(wanted)
        assert str(refused.value) == (
            f"{folder}/step_4: the checkpoint is damaged ({expected}); resume_from_checkpoint={folder}/step_3 goes on "
            "from the one before, resume_from_checkpoint=false starts anew"
        )


def test_a_changed_digit_of_the_marker_is_noticed(folder):
    marker = folder / "step_4" / MARKER
    marker.write_text(marker.read_text().replace('"step": 4', '"step": 5'))
    with pytest.raises(CheckpointError, match=rf"damaged \({MARKER} is not what was written\)"):
        Checkpoints(folder, ORIGIN, 2).find(True)


@given(file=st.sampled_from([*FILES, MARKER]), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_noticed(every_step, file, place, bit):
    path = every_step / "step_12" / file
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[int(place * len(whole))] ^= 1 << bit
    path.write_bytes(changed)
    try:
        if file == MARKER and _reads_the_same(whole, changed):
            return  # an exponent's e for E
        with pytest.raises(CheckpointError, match="the checkpoint is"):
            Checkpoints(every_step, ORIGIN, 2).find(str(every_step / "step_12"))
    finally:
        path.write_bytes(whole)


def _reads_the_same(one, other):
    try:
        return json.loads(one) == json.loads(other)
    except ValueError:
        return False


def test_a_full_disk_is_told_in_a_line_and_the_last_one_stays(folder):
    checkpoints = Checkpoints(folder, ORIGIN, 2)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        with pytest.raises(CheckpointError, match=r"a checkpoint can't be written .*it goes on from the last one"):
            checkpoints.save(5, parts_of(small_training()))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert sorted(path.name for path in folder.iterdir()) == ["step_3", "step_4"]


def test_what_cant_be_kept_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"can't be kept in a checkpoint \(adapter_0/optimizer/0 is a object\)"):
        Checkpoints(tmp_path / "c", ORIGIN, 2).save(1, [Part("adapter_0", lambda: {"optimizer": [object()]})])
    assert list((tmp_path / "c").iterdir()) == []


# The end


def test_what_a_finished_training_left_behind_is_removed_and_anothers_is_not(folder):
    Checkpoints(folder, origin(adapter_set="other"), 2).remove_leftovers()
    assert folder.exists()
    Checkpoints(folder, ORIGIN, 2).remove_leftovers()
    assert not folder.exists()


# Stopping


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_a_later_one_ends_as_ever(number, monkeypatch):
    def ends(signal_number, frame):
        raise TimeoutError

    before = signal.signal(number, ends)
    try:
        with stop_requests() as stop:
            assert stop.signal_number is None
            os.kill(os.getpid(), number)
            assert stop.signal_number == number
            os.kill(os.getpid(), number)  # the same request, sent twice
            monkeypatch.setattr(stopping, "_SAME_REQUEST", 0)
            with pytest.raises(TimeoutError):
                os.kill(os.getpid(), number)
        assert signal.getsignal(number) is ends
    finally:
        signal.signal(number, before)


def test_afterwards_signals_do_what_they_did():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with stop_requests():
        pass
    assert {number: signal.getsignal(number) for number in before} == before
