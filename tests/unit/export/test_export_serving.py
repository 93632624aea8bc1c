"""vLLM's command line for what was exported, and the same as a record."""

import json
import shlex
from pathlib import Path

import pytest

from personas_tune.errors import DataError
from personas_tune.export.serving import (
    RECORD,
    Exported,
    ExportedSet,
    Written,
    read_all_sets,
    read_set,
    serving_lines,
    serving_record,
    serving_records,
    set_record,
    vllm_command,
    vllm_rank,
)


def exported(adapter="0", path="/runs/export/persona/0", rank=32, **changes):
    return Exported("persona", adapter, Path(path), Written(rank, **changes))


@pytest.mark.parametrize(
    ("rank", "allowed"), [(1, 1), (2, 8), (8, 8), (9, 16), (64, 64), (257, 320), (321, 512), (512, 512), (513, None)]
)
def test_the_smallest_allowed_rank_that_fits_is_asked_for(rank, allowed):
    assert vllm_rank(rank) == allowed


def test_the_command_is_one_shell_line_that_names_every_adapter():
    both = {"persona-0": "/runs/export/persona/0", "persona-1": "/my runs/it's/1"}
    assert shlex.split(vllm_command("microsoft/Phi-3-mini-4k-instruct", both, 40)) == [
        "vllm", "serve", "microsoft/Phi-3-mini-4k-instruct", "--enable-lora", "--max-lora-rank", "64",
        "--max-loras", "2", "--lora-modules", "persona-0=/runs/export/persona/0", "persona-1=/my runs/it's/1",
    ]  # fmt: skip


def test_a_path_with_a_comma_is_given_as_json():
    module = shlex.split(vllm_command("base", {"persona-0": "/a,b/0"}, 8))[-1]
    assert json.loads(module) == {"name": "persona-0", "path": "/a,b/0"}


def test_the_record_says_what_a_program_needs():
    record = serving_record("base", [exported(), exported("1", "/1", rank=None)])
    assert record["base"] == "base"
    assert record["max_lora_rank"] == 32
    own = {"set": "persona", "adapter": "0", "path": "/runs/export/persona/0", "rank": 32}
    assert record["adapters"] == {"persona-0": own}
    assert record["command"] == vllm_command("base", {"persona-0": "/runs/export/persona/0"}, 32)
    merged = record["merged"]["persona-1"]
    assert shlex.split(merged["command"]) == ["vllm", "serve", "/1", "--served-model-name", "persona-1"]
    assert record["notes"] == []
    assert serving_lines(record) == [f"serve with: {record['command']}", f"serve with: {merged['command']}"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"rank": 768},
            "rank 768 is above vLLM's largest, 512; cut it (export.max_rank=512, lossy) or serve it merged",
        ),
        ({"is_dora": True}, "vLLM takes no DoRA adapters; serve it merged (export.format=merged)"),
        ({"no_output": True}, "vLLM adapts no output layer in this family; serve it merged (export.format=merged)"),
    ],
)
def test_what_vllm_refuses_is_left_out_and_told(changes, said):
    record = serving_record("base", [exported(), exported("1", **changes)])
    assert "persona-1" not in record["command"]
    assert record["notes"][0].startswith(f"persona-1: {said}")
    alone = serving_record("base", [exported(**changes)])
    assert alone["command"] is None
    assert alone["max_lora_rank"] is None
    assert said in serving_lines(alone)[0]


def test_a_merged_dora_is_served():
    assert Written(None, is_dora=True).why_not_served is None


def test_what_a_cut_cost_is_in_the_record():
    entry = serving_record("base", [exported(errors=(0.0, 0.5))])["adapters"]["persona-0"]
    assert entry["truncation_error"] == {"mean": 0.25, "max": 0.5}
    assert Written(32, errors=(0.0, 0.5)).in_words == (
        "a PEFT folder of rank 32, cut: B A is off by 25.00% on average, by 50.00% in the worst module"
    )


def write_record(folder, record, *adapters):
    for adapter in adapters:
        (folder / adapter).mkdir(parents=True)
    (folder / RECORD).write_text(json.dumps(record))


def test_what_earlier_runs_exported_is_read_back_as_long_as_it_is_there(tmp_path):
    both = {"0": Written(8, errors=(0.5,)), "1": Written(16)}
    write_record(tmp_path / "persona", set_record(None, "b", "/b", both), "0")
    write_record(tmp_path / "merged" / "persona", set_record("twin", "b", "/b", {"0": Written(None)}), "0")
    assert read_all_sets(tmp_path) == [
        ExportedSet(None, "b", "/b", (Exported("persona", "0", tmp_path / "persona" / "0", both["0"]),)),
        ExportedSet(
            "twin", "b", "/b", (Exported("persona", "0", tmp_path / "merged" / "persona" / "0", Written(None)),)
        ),
    ]


@pytest.mark.parametrize("record", [[], {}, {"base": None, "base_name": "b", "loadable": "b", "adapters": {"0": {}}}])
def test_a_damaged_record_is_told_in_a_line(record, tmp_path):
    write_record(tmp_path / "persona", record, "0")
    with pytest.raises(
        DataError, match=r"export\.json: not a record of exported adapters \(.+\); remove .+ and export"
    ):
        read_set(tmp_path / "persona")


def test_each_base_has_a_file_and_sets_for_a_base_of_another_name_are_left_out():
    sets = [
        ExportedSet(None, "me/base", "me/base", (exported(),)),
        ExportedSet(None, "old", "/old", (exported("1", "/1"),)),
        ExportedSet("twin", "twin", "/twin", (exported("2", "/2"),)),
    ]
    records = serving_records(sets, {None: ("me/base", "/moved")})
    assert {name: list(record["adapters"]) for name, record in records.items()} == {
        "serving.json": ["persona-0"], "serving_twin.json": ["persona-2"],
    }  # fmt: skip
    assert [record["base"] for record in records.values()] == ["/moved", "/twin"]
