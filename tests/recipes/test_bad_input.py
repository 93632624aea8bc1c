"""Whatever a user gets wrong: one line a mistake, exit status 2, and every file as it was."""

import csv
import gzip
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from pipelines import csv_experiment, run_recipe, write_yaml
from safetensors.torch import load_file, save_file

Rows = list[dict[str, Any]]
Change = Callable[[Path], None]

# Wherever ratings stand between 1 and 5 here, the scale is the usual one; the finished run has half stars.
STARS = ("data.item_metadata=null", "data.rating_scale={min: 1, max: 5, step: 1}", "data.cohort.min_interactions=2")
HEADER = "user_id,item_id,rating,timestamp\n"
GOOD = HEADER + "1,a,3,10\n1,b,4,20\n2,a,5,30\n2,b,1,40\n"


@dataclass(frozen=True)
class Case:
    """One mistake, or several.

    Args:
        recipe: What is run in a folder with ``experiment.yaml``, ``base/`` and a finished ``run/``.
        lines: What each line on stderr must hold, in this order: file, row or key; what is wrong; remedy.
        overrides: Of the command line.
        files: Written before the run.
        change: Other damage, done in that folder.
        fresh: Whether there is no ``run/`` yet; then there must be none afterwards.
    """

    recipe: str
    lines: list[list[str]]
    overrides: tuple[str, ...]
    files: Mapping[str, str | bytes]
    change: Change | None
    fresh: bool


def case(
    recipe: str,
    lines: str,
    *overrides: str,
    files: Mapping[str, str | bytes] | None = None,
    change: Change | None = None,
    fresh: bool = False,
) -> Case:
    """A case whose ``lines`` are written as ``where | what | remedy``."""
    expected = [line.split(" | ") for line in lines.splitlines()]
    return Case(recipe, expected, overrides, files or {}, change, fresh)


def bad_log(content: str | bytes, line: str, *overrides: str, name: str = "log.csv") -> Case:
    files = {name: content}
    return case("persona_prepare", line, *STARS, f"data.path={name}", *overrides, files=files, fresh=name == "log.csv")


def bad_data(line: str, *overrides: str, files: Mapping[str, str | bytes] | None = None) -> Case:
    """A good log with which something else is wrong."""
    files = {"log.csv": GOOD, **(files or {})}
    return case("persona_prepare", line, *STARS, "data.path=log.csv", *overrides, files=files)


def bad_metadata(content: str | bytes, line: str, name: str = "about.csv") -> Case:
    return bad_data(line, f"data.item_metadata={name}", files={name: content})


def bad_config(lines: str, *overrides: str, text: str | bytes | None = None) -> Case:
    return case("persona_cluster", lines, *overrides, files={} if text is None else {"experiment.yaml": text})


def bad_training(line: str, *overrides: str, change: Change | None = None) -> Case:
    return case("persona_lora", line, *overrides, change=change)


# Damage


def cut(file: str) -> Change:
    """Keep the first half of a file."""

    def change(folder: Path) -> None:
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: len(content) // 2])

    return change


def remove(name: str) -> Change:
    return lambda folder: rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def edit_table(file: str, edit: Callable[[pa.Table], pa.Table]) -> Change:
    return lambda folder: pq.write_table(edit(pq.read_table(folder / file)), folder / file)


def drop_column(file: str, column: str) -> Change:
    return edit_table(file, lambda table: table.drop_columns([column]))


def drop_first(file: str, key: str) -> Change:
    """Drop the rows that share the first row's ``key``."""
    return edit_table(file, lambda table: table.filter(pc.not_equal(table[key], table[key][0])))


def edit_json(file: str, edit: Callable[[dict[str, Any]], object]) -> Change:
    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text(encoding="utf-8"))
        edit(content)
        (folder / file).write_text(json.dumps(content), encoding="utf-8")

    return change


def edit_weights(file: str, edit: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def change(folder: Path) -> None:
        weights = load_file(folder / file)
        edit(weights)
        save_file(weights, folder / file)

    return change


def own_texts(profiles: Callable[[Rows], object] = list, memories: Callable[[Rows], object] | None = None) -> Change:
    """Write ``profiles.csv``, and ``memories.csv`` if it is edited too, for the whole cohort."""

    def change(folder: Path) -> None:
        users = pq.read_table(folder / "run/data/users.parquet")["user_id"].to_pylist()
        write_csv(folder / "profiles.csv", profiles, [{"user_id": u, "profile": "I like war films."} for u in users])
        if memories is not None:
            log = pq.read_table(folder / "run/data/interactions.parquet").to_pylist()
            rows = [{**{key: row[key] for key in ("user_id", "item_id", "split")}, "memory": "Good."} for row in log]
            write_csv(folder / "memories.csv", memories, rows)

    return change


def write_csv(path: Path, edit: Callable[[Rows], object], rows: Rows) -> None:
    edited = edit(rows)
    rows = edited if isinstance(edited, list) else rows
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def train_only(rows: Rows) -> Rows:
    return [row for row in rows if row["split"] == "train"]


def parquet(table: dict[str, list[Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(table), sink)
    return bytes(sink.getvalue().to_pybytes())


OWN = ("distill.distiller=file", "distill.path=profiles.csv")
OWN_MEMORIES = (*OWN, "distill.memories_path=memories.csv")

LOGS = {
    "no log is set": bad_data("data.path | no log is named | set data.path", "data.path=null"),
    "the log is not there": bad_data("gone.csv | no such file | check data.path", "data.path=gone.csv"),
    "MovieLens is not there": bad_data(
        "ml-1m | no such file | download https://files.grouplens.org", "data.format=movielens", "data.path=ml-1m"
    ),
    "a folder where a file is wanted": bad_data("base | a folder | set data.path", "data.path=base"),
    "latin-1 where UTF-8 is wanted": bad_log(
        HEADER.encode() + b"1,a,3,1\n1,caf\xe9,3,2\n", "log.csv row 3 | byte 0xe9 | set data.encoding"
    ),
    "an encoding that there is not": bad_data(
        "data.encoding | unknown encoding 'latin-99' | use utf-8", "data.encoding=latin-99"
    ),
    "no rating column": bad_log(
        "user,item,grade\n1,a,3\n", "log.csv row 1 | no rating column | set data.columns.rating"
    ),
    "a column that is not in the log": bad_data(
        "data.columns.user_id | no column 'usr_id' | did you mean user_id?", "data.columns={user_id: usr_id}"
    ),
    "a rating above the scale": bad_log(
        HEADER + "1,a,3,1\n1,b,7,2\n", "log.csv row 3 | rating 7 is not on the scale 1 to 5 | set data.rating_scale"
    ),
    "a rating between two steps": bad_log(
        HEADER + "1,a,3.5,1\n", "log.csv row 2 | rating 3.5 is not on the scale | set data.rating_scale"
    ),
    "a rating that is NaN": bad_log(HEADER + "1,a,nan,1\n", "log.csv row 2 | rating nan is not a number | mend"),
    "a rating in words": bad_log(HEADER + "1,a,five,1\n", "log.csv row 2 | rating 'five' | mend or drop the row"),
    "a pair twice": bad_log(
        HEADER + "1,a,3,1\n2,a,3,1\n1,a,4,0\n",
        "log.csv row 4 | user '1' rates item 'a' again, after row 2 | set data.duplicates",
    ),
    "milliseconds": bad_log(
        HEADER + "1,a,3,1577836800000\n", "log.csv row 2 | 1577836800000 is too late | set data.timestamp_unit=ms"
    ),
    "an empty file": bad_log("", "log.csv | empty file | check data.path"),
    "a header and nothing else": bad_log(HEADER, "log.csv | no interactions | check data.path"),
    "a ragged row": bad_log(HEADER + "1,a,3,1\n1,b,3\n", "log.csv row 3 | 3 values where 4 belong | mend or drop"),
    "a torn gzip": bad_log(
        gzip.compress(GOOD.encode() * 50)[:60], "log.csv.gz | can't be read to its end | again", name="log.csv.gz"
    ),
    "a truncated Parquet log": bad_log(
        parquet({"user": ["1"], "item": ["a"], "rating": [3]})[:200],
        "log.parquet | not a readable Parquet file | fetch or write the file again",
        "data.format=parquet",
        name="log.parquet",
    ),
    "a line that is no JSON": bad_log(
        '{"user":1,"item":"a","rating":3}\n{"user":1,\n',
        "log.jsonl row 2 | not JSON | one object a line",
        "data.format=jsonl",
        name="log.jsonl",
    ),
    "commas in ratings.dat": bad_log(
        "1,a,3,1\n", "ratings.dat row 1 | 1 values where 4 belong | mend", "data.format=movielens", name="ratings.dat"
    ),
    "three mistakes in one row": case(
        "persona_prepare",
        "log.csv row 2 | empty user_id | mend\n"
        "log.csv row 2 | rating 9 | set data.rating_scale\n"
        "log.csv row 2 | timestamp -1 | mend",
        *STARS,
        "data.path=log.csv",
        files={"log.csv": HEADER + ",a,9,-1\n"},
        fresh=True,
    ),
    "no user in the cohort": bad_data(
        "data.cohort | no user has 100 | the 2 users have 2 to 2",
        "data.cohort.min_interactions=100",
        "data.cohort.max_interactions=null",
    ),
    "more users than there are": bad_data(
        "data.cohort.n_users | 6 users are asked for, and 2 | set data.cohort.n_users=2"
    ),
    "more test rows than there are": bad_data(
        "data.split.test_rows | 9 test rows are asked for, and there are 2 | set it to 2 or less",
        "data.cohort.n_users=2",
        "data.split.test_rows=9",
    ),
    "a time cut without test rows": bad_data(
        "data.split | leaves none of 2 users | set data.split.by=user_time",
        "data.cohort.n_users=2",
        "data.split.by=global_time",
    ),
    "a world that is too small": bad_data(
        "data.world.mean_interactions | 80 interactions per user need as many items | raise data.world.n_items",
        "data.format=world",
        "data.world.n_items=40",
    ),
    "metadata of other items": bad_metadata(
        "item_id,summary\nA,s\n",
        "about.csv | none of its 1 items is in the log | use a file with the log's own item ids",
    ),
    "metadata without ids": bad_metadata("name,summary\nA,s\n", "about.csv | no item_id column | name the ids item_id"),
    "metadata with an item twice": bad_metadata(
        "item_id,summary\na,s\nb,s\na,t\n", "about.csv row 4 | item 'a' again | keep one row an item"
    ),
    "metadata with an impossible year": bad_metadata(
        "item_id,year\na,1990\nb,soon\n", "about.csv row 3 | year 'soon' is not a year | leave the year empty"
    ),
    "metadata of an unknown kind": bad_metadata("PK", "about.xlsx | '.xlsx' | use .csv", name="about.xlsx"),
    "metadata that is not there": bad_data(
        "gone.csv | file not found | check data.item_metadata", "data.item_metadata=gone.csv"
    ),
    "an exclusion of unknown users": bad_data(
        "others.parquet | none of its 1 users is in the log | made from the same log",
        "data.cohort.exclude=others.parquet",
        files={"others.parquet": parquet({"user_id": ["nobody"]})},
    ),
    "an exclusion without user ids": bad_data(
        "others.parquet | column user_id is missing | check the path",
        "data.cohort.exclude=others.parquet",
        files={"others.parquet": parquet({"item_id": ["a"]})},
    ),
}

KEYS = {
    "no such config": case(
        "persona_cluster",
        "'quikstart.yaml' | no such file | did you mean quickstart.yaml?",
        "--config",
        "quikstart.yaml",
    ),
    "a YAML syntax error": bad_config("experiment.yaml | line 2 | mend the file", text="output_dir: run\nseed: [1\n"),
    "a key written twice": bad_config(
        "experiment.yaml | duplicate key seed | mend", text="output_dir: run\nseed: 1\nseed: 2\n"
    ),
    "a YAML that is a list": bad_config("experiment.yaml | not a mapping | personas-tune cp", text="- output_dir\n"),
    "a YAML in another encoding": bad_config(
        "experiment.yaml | can't decode byte 0xe9 | mend", text=b"output_dir: caf\xe9\n"
    ),
    "an empty YAML": bad_config("experiment.yaml | key output_dir is missing | add output_dir: ...", text=""),
    "a reference to nothing": bad_config(
        "experiment.yaml | metric_logger.log_dir | 'outputdir' not found | mend the ${...} reference",
        "metric_logger.log_dir=${outputdir}/logs",
    ),
    "an environment variable that is not set": bad_config(
        "data.path | PERSONAS_TUNE_UNSET is not set | export PERSONAS_TUNE_UNSET",
        "data.path=${oc.env:PERSONAS_TUNE_UNSET}",
    ),
    "mistyped keys at every depth": bad_config(
        "unknown key data.cohort.n_user | did you mean data.cohort.n_users?\n"
        "unknown key data.pth | did you mean data.path?\n"
        "unknown key adapter_sets.persona.memoires | did you mean adapter_sets.persona.memories?\n"
        "unknown key agents.base.adapter | did you mean agents.base.adapters?\n"
        "unknown key sed | did you mean seed?",
        "data.cohort.n_user=5",
        "data.pth=x",
        "adapter_sets.persona.memoires=both",
        "agents.base.adapter=persona",
        "sed=1",
    ),
    "values of the wrong type": bad_config(
        "dtype is 'fp64' | it should be 'fp32' or 'bf16'\n"
        "personas.k is 'many' | it should be a valid integer or 'elbow'\n"
        "epochs is 'two' | it should be a valid integer\n"
        "batch_size is 0 | it should be greater than or equal to 1",
        "personas.k=many",
        "dtype=fp64",
        "epochs=two",
        "batch_size=0",
    ),
    "a section that is a value": bad_config("data is 5 | it should be a mapping of keys to values", "data=5"),
    "a component without its section": bad_config(
        "lr_scheduler is 'torch.optim | write lr_scheduler._component_=torch.optim.lr_scheduler.LinearLR",
        "lr_scheduler=torch.optim.lr_scheduler.LinearLR",
    ),
    "an override without a value": bad_config("override 'seed' | not of the form key=value | write key=value", "seed"),
    "an override that is no YAML": bad_config("override 'seed=[1' | expected ',' | quote the value", "seed=[1"),
    "a removal of no key": bad_config("~data.pth | no such key to remove | check the spelling", "~data.pth"),
    "a flag that there is not": bad_config(
        "command line | unknown flag --seed | use --config NAME and key=value", "--seed", "5"
    ),
    "a scale that its steps do not reach": bad_config(
        "data.rating_scale | max 5 is no whole number of steps of 0.3 above min 1 | set min, max and step",
        "data.rating_scale={min: 1, max: 5, step: 0.3}",
    ),
    "a range without numbers": bad_config(
        "data.cohort | max_interactions 3 is below min_interactions 5 | raise it",
        "data.cohort={min_interactions: 5, max_interactions: 3}",
    ),
    "a fraction of one": bad_config(
        "data.split.train_fraction is 1 | it should be less than 1", "data.split.train_fraction=1"
    ),
    "an infinite scale": bad_config(
        "data.rating_scale.max is inf | it should be a finite number", "data.rating_scale.max=.inf"
    ),
    "an agent of an unknown adapter set": bad_config(
        "agents.persona.adapters | no adapter set 'perona' | under adapter_sets: persona, single",
        "agents.persona.adapters=perona",
    ),
    "an adapter set of an unknown base": bad_config(
        "adapter_sets.persona.base | no base 'phi' | under bases: none", "adapter_sets.persona.base=phi"
    ),
    "an adapter set named like a path": bad_config(
        "adapter_sets: '../x' can't name a folder | use letters", text="output_dir: run\nadapter_sets: {../x: {}}\n"
    ),
    "rows of a set per persona": bad_config(
        "adapter_sets.persona | train on all of their rows | rows needs per: all", "adapter_sets.persona.rows=9"
    ),
    "a base without its tokenizer": bad_config(
        "key bases.other.tokenizer is missing | add bases.other.tokenizer\n"
        "key bases.other.checkpointer is missing | add bases.other.checkpointer",
        "bases.other.model._component_=x",
    ),
    "a stage that there is not": case(
        "persona_pipeline", "stages | no stage 'persona_train' | use some of persona_prepare", "stages=[persona_train]"
    ),
    "an output below a file": case(
        "persona_prepare",
        "notes.txt/run/data | can't write there (Not a directory) | set output_dir",
        "output_dir=notes.txt/run",
        files={"notes.txt": "mine"},
    ),
    "a file in a stage's place": case(
        "persona_cluster",
        "run/personas | can't write there (it is a file) | set output_dir",
        files={"run/personas": "mine"},
    ),
}

TEXTS = {
    "OpenAI without a key": case(
        "persona_distill",
        "https://api.openai.com | no key | export OPENAI_API_KEY=...",
        "distill.distiller=openai",
    ),
    "an address that is none": case(
        "persona_distill",
        "base_url | 'localhost:8000' is no address | such as http://localhost:8000/v1",
        "distill.distiller=openai",
        "distill.base_url=localhost:8000",
    ),
    "no file of profiles is set": case(
        "persona_distill", "distill.path | is not set | set distill.path to a CSV", "distill.distiller=file"
    ),
    "profiles that are not there": case(
        "persona_distill", "distill.path | profiles.csv not found | check the path", *OWN
    ),
    "a user without a profile": case(
        "persona_distill",
        "profiles.csv | 1 of 6 users of the cohort lack a profile: u | add their rows",
        *OWN,
        change=own_texts(lambda rows: rows[1:]),
    ),
    "two profiles of one user": case(
        "persona_distill",
        "profiles.csv line 8 | second profile of user u | keep one",
        *OWN,
        change=own_texts(lambda rows: [*rows, rows[0]]),
    ),
    "a profile that is too long": case(
        "persona_distill",
        "profiles.csv line 2 | profile has 30 words, more than 20 | set distill.max_words=30",
        *OWN,
        "distill.max_words=20",
        change=own_texts(lambda rows: rows[0].update(profile="word " * 30)),
    ),
    "a profile that has seen the test rows": case(
        "persona_distill",
        "profiles.csv line 2 | upto_position 99 is not a number from 0 to | must not have seen more",
        *OWN,
        change=own_texts(lambda rows: [{**row, "upto_position": 99 if row is rows[0] else ""} for row in rows]),
    ),
    "profiles in latin-1": case(
        "persona_distill",
        "profiles.csv line 2 | not UTF-8 (byte 0xe9) | save it as UTF-8",
        *OWN,
        files={"profiles.csv": b"user_id,profile\nu01,caf\xe9\n"},
    ),
    "profiles of an unknown kind": case(
        "persona_distill",
        "profiles.xlsx | unknown file type '.xlsx' | use .csv",
        "distill.distiller=file",
        "distill.path=profiles.xlsx",
        files={"profiles.xlsx": "PK"},
    ),
    "memories of test ratings": case(
        "persona_distill",
        "memories.csv | memories are of test interactions, such as user u | remove them",
        *OWN_MEMORIES,
        change=own_texts(memories=list),
    ),
    "a train rating without a memory": case(
        "persona_distill",
        "memories.csv | 1 of  | train interactions lack a memory, such as user u | add their rows",
        *OWN_MEMORIES,
        change=own_texts(memories=lambda rows: train_only(rows)[1:]),
    ),
    "a template that there is not": case(
        "persona_distill", "prompt.template | no template 'books' | use one of movies, generic", "prompt.template=books"
    ),
    "more personas than users": case(
        "persona_cluster",
        "personas.k | 9 personas need at least 9 users, there are 6 | set personas.k=6 or fewer",
        "personas.k=9",
    ),
    "more personas than different profiles": case(
        "persona_cluster",
        "personas.k | need 2 different profiles, the 6 users have 1 | set personas.k=1",
        change=edit_table(
            "run/memory/profiles.parquet", lambda t: t.set_column(2, "profile", pa.array(["I like war."] * len(t)))
        ),
    ),
    "an embedder without a key": case(
        "persona_cluster",
        "https://api.openai.com | no key | export OPENAI_API_KEY=...",
        "personas.embedder=openai",
    ),
    "an embedder without its model": case(
        "persona_cluster",
        "embedding.path | no folder of a model is given | download the model once",
        "personas.embedder=sentence-transformers",
    ),
    "a profile without words": case(
        "persona_cluster",
        "user u | 6 of 6 profiles without a word | write these profiles again",
        change=edit_table(
            "run/memory/profiles.parquet", lambda t: t.set_column(2, "profile", pa.array(["..."] * len(t)))
        ),
    ),
    "a user without a persona": case(
        "persona_raft",
        "user u | no persona for 1 of 6 users | tune run persona_cluster",
        change=drop_first("run/personas/personas.parquet", "user_id"),
    ),
    "a memory of a test rating": case(
        "persona_raft",
        "memories.parquet user u | a memory of no train interaction | tune run persona_distill",
        change=edit_table(
            "run/memory/memories.parquet",
            lambda t: t.set_column(2, "position", pc.add(t["position"], 100).cast(pa.int32())),
        ),
    ),
    "an item that was dropped": case(
        "persona_raft",
        "item early | no row in data/items.parquet | tune run persona_prepare",
        change=drop_first("run/data/items.parquet", "item_id"),
    ),
    "a template for prompts that there is not": case(
        "persona_raft", "prompt.template | no template 'books' | use one of movies", "prompt.template=books"
    ),
}

STAGE_FILES = {
    "no data yet": case(
        "persona_distill",
        "run/data/interactions.parquet | file not found | tune run persona_prepare",
        change=remove("run"),
        fresh=True,
    ),
    "no memory yet": case(
        "persona_cluster",
        "run/memory/profiles.parquet | file not found | tune run persona_distill",
        change=remove("run/memory"),
    ),
    "no personas yet": case(
        "persona_raft",
        "run/personas/personas.parquet | file not found | tune run persona_cluster",
        change=remove("run/personas"),
    ),
    "no samples yet": case(
        "persona_lora", "run/samples/prompt.json | file not found | tune run persona_raft", change=remove("run/samples")
    ),
    "no adapters yet": case(
        "persona_eval",
        "run/adapters/persona/manifest.json | file not found | tune run persona_lora",
        change=remove("run/adapters/persona"),
    ),
    "truncated interactions": case(
        "persona_distill",
        "run/data/interactions.parquet | not a readable Parquet file | tune run persona_prepare",
        change=cut("run/data/interactions.parquet"),
    ),
    "truncated profiles": case(
        "persona_cluster",
        "run/memory/profiles.parquet | not a readable Parquet file | tune run persona_distill",
        change=cut("run/memory/profiles.parquet"),
    ),
    "truncated personas": case(
        "persona_raft",
        "run/personas/personas.parquet | not a readable Parquet file | tune run persona_cluster",
        change=cut("run/personas/personas.parquet"),
    ),
    "truncated samples": case(
        "persona_lora",
        "run/samples/train.parquet | not a readable Parquet file | tune run persona_raft",
        change=cut("run/samples/train.parquet"),
    ),
    "an empty samples file": case(
        "persona_eval",
        "run/samples/test.parquet | not a readable | tune run persona_raft",
        change=lambda folder: (folder / "run/samples/test.parquet").write_bytes(b""),
    ),
    "users without tiers": case(
        "persona_distill",
        "run/data/users.parquet | column activity_tier is missing | tune run persona_prepare",
        change=drop_column("run/data/users.parquet", "activity_tier"),
    ),
    "samples without personas": case(
        "persona_lora",
        "run/samples/train.parquet | column persona is missing | tune run persona_raft",
        change=drop_column("run/samples/train.parquet", "persona"),
    ),
    "prompt settings cut short": case(
        "persona_lora",
        "run/samples/prompt.json | not JSON | tune run persona_raft",
        change=cut("run/samples/prompt.json"),
    ),
    "prompt settings without labels": case(
        "persona_lora",
        "run/samples/prompt.json | 'labels' | tune run persona_raft",
        change=edit_json("run/samples/prompt.json", lambda settings: settings.pop("labels")),
    ),
    "a sample of an unknown item": case(
        "persona_lora",
        "user u | item  | has no row in data/items.parquet | tune run persona_raft",
        change=edit_table("run/data/items.parquet", lambda t: t.slice(0, 1)),
    ),
    "a sample of an unknown user": case(
        "persona_lora",
        "user u | no row in data/users.parquet | tune run persona_raft",
        change=drop_first("run/data/users.parquet", "user_id"),
    ),
    "a sample without its memory": case(
        "persona_lora",
        "user u | no memory at position | tune run persona_raft",
        change=edit_table("run/memory/memories.parquet", lambda t: t.slice(0, 0)),
    ),
    "a sample whose user has no profile": case(
        "persona_lora",
        "user u | user has no profile | tune run persona_distill",
        change=drop_first("run/memory/profiles.parquet", "user_id"),
    ),
    "a rating without a label": case(
        "persona_lora",
        "samples | rating 3.25 has no label | the scale's labels are 0.5, 1",
        change=edit_table("run/samples/train.parquet", lambda t: t.set_column(3, "rating", pa.array([3.25] * len(t)))),
    ),
    "no row to train on": case(
        "persona_lora",
        "samples/train.parquet | no row to train on | raise data.split.train_fraction",
        change=edit_table("run/samples/train.parquet", lambda t: t.slice(0, 0)),
    ),
    "ratings from outside the cohort without ratings": case(
        "persona_eval",
        "run/data/outside.parquet | column rating is missing | tune run persona_prepare",
        change=drop_column("run/data/outside.parquet", "rating"),
    ),
    "an oracle cut short": case(
        "persona_eval",
        "run/data/oracle.parquet | not a readable | tune run persona_prepare",
        change=lambda folder: (folder / "run/data/oracle.parquet").write_bytes(b"PAR1"),
    ),
    "no ratings from outside the cohort": case(
        "persona_eval",
        "run/data/outside.parquet | file not found | tune run persona_prepare",
        change=remove("run/data/outside.parquet"),
    ),
    "an adapter cut short": case(
        "persona_eval",
        "run/adapters/persona/0/adapter.safetensors | can't be read | train it again",
        change=cut("run/adapters/persona/0/adapter.safetensors"),
    ),
    "an adapter that is gone": case(
        "persona_eval",
        "run/adapters/persona/0/adapter.safetensors | not found | tune run persona_lora",
        change=remove("run/adapters/persona/0/adapter.safetensors"),
    ),
    "an adapter that is not a number": case(
        "persona_eval",
        "run/adapters/persona/0/adapter.safetensors | is not finite | train the adapter again",
        change=edit_weights(
            "run/adapters/persona/0/adapter.safetensors", lambda weights: next(iter(weights.values())).fill_(torch.nan)
        ),
    ),
    "adapters of another rank": case(
        "persona_eval",
        "run/adapters/single/all/adapter.safetensors | does not fit the model (layers.0.attn | train it again",
        "model.lora_rank=2",
    ),
    "adapters that don't know a user": case(
        "persona_eval",
        "run/adapters/single | no adapter for user u | tune run persona_lora",
        change=drop_first("run/adapters/single/assignment.parquet", "user_id"),
    ),
    "adapters without assignment": case(
        "persona_eval",
        "run/adapters/single/assignment.parquet | file not found | tune run persona_lora",
        change=remove("run/adapters/single/assignment.parquet"),
    ),
}

BASES = {
    "a prompt that does not fit": bad_training(
        "user u | position | prompt does not fit | raise tokenizer.max_seq_len", "tokenizer.max_seq_len=40"
    ),
    "no checkpoint": bad_training(
        "gone | checkpoint folder not found | tune download | --output-dir gone", "checkpointer.checkpoint_dir=gone"
    ),
    "no weights": bad_training(
        "base/model.safetensors | file not found | get it with `tune download", change=remove("base/model.safetensors")
    ),
    "no config.json": bad_training(
        "base/config.json | file not found | get it with `tune download", change=remove("base/config.json")
    ),
    "no tokenizer": bad_training(
        "base/tokenizer.model | file not found | get it with `tune download", change=remove("base/tokenizer.model")
    ),
    "no special tokens": bad_training(
        "base/special_tokens.json | file not found | get it with `tune download",
        change=remove("base/special_tokens.json"),
    ),
    "no Phi-3": case(
        "persona_lora",
        "checkpoints/Phi-3 | checkpoint folder not found | tune download microsoft/Phi-3-mini-4k-instruct",
        "~model",
        "model={_component_: torchtune.models.phi3.lora_phi3_mini, lora_attn_modules: [q_proj]}",
        "checkpointer.checkpoint_dir=checkpoints/Phi-3",
        "tokenizer.path=checkpoints/Phi-3/tokenizer.model",
        "tokenizer.special_tokens_path=null",
    ),
    "weights cut short": bad_training(
        "base | model.safetensors | can't be read | download or make it again", change=cut("base/model.safetensors")
    ),
    "weights that are a pointer": bad_training(
        "base | can't be read | download or make it again",
        change=lambda folder: (folder / "base/model.safetensors").write_text(
            "version https://git-lfs.github.com/spec/v1\n"
        ),
    ),
    "weights that lack one": bad_training(
        "base | it lacks layers.0.attn.output_proj.weight | match the model section",
        change=edit_weights(
            "base/model.safetensors", lambda weights: weights.pop("model.layers.0.self_attn.o_proj.weight")
        ),
    ),
    "weights of another architecture": bad_training(
        "base | can't be read | check checkpointer.model_type", "checkpointer.model_type=LLAMA3"
    ),
    "a model type that there is not": bad_training(
        "checkpointer | PHI99 | check this section's values", "checkpointer.model_type=PHI99"
    ),
    "a config.json cut short": bad_training(
        "checkpointer | failed ( | check this section's values", change=cut("base/config.json")
    ),
    "a wider model": bad_training(
        "base | does not fit the model | match the model section to config.json", "model.embed_dim=64"
    ),
    "a larger vocabulary": bad_training(
        "base | output.weight: copying a param with shape torch.Size([400, 32]) | match the model section",
        "model.vocab_size=500",
    ),
    "a deeper model": bad_training(
        "base | it lacks layers.2. | match the model section to config.json", "model.num_layers=3"
    ),
    "a shallower model": bad_training(
        "base | it has layers.1. | match the model section to config.json", "model.num_layers=1"
    ),
    "heads of another size": bad_training(
        "base | num_attention_heads 4, model.num_heads 8 | match the model section to config.json",
        "model.num_heads=8",
        "model.num_kv_heads=4",
    ),
    "heads that do not divide the width": bad_training(
        "model | lora_phi3 failed ( | check this section's values", "model.num_heads=5"
    ),
    "no model section": bad_training(
        "model | this section with a _component_ is missing | personas-tune cp quickstart.yaml", "~model"
    ),
    "a model that there is not": bad_training(
        "model._component_ | lora_phi9 | check the dotted path", "model=torchtune.models.phi3.lora_phi9"
    ),
    "a package that there is not": bad_training(
        "model._component_ | torchtoon | check the dotted path", "model=torchtoon.lora_phi3"
    ),
    "a module where a component is wanted": bad_training(
        "model._component_ | not a callable | check the dotted path", "model=torchtune.models"
    ),
    "a key that the model does not take": bad_training(
        "model | unexpected keyword argument 'lora_rnk' | it takes lora_attn_modules, ", "model.lora_rnk=8"
    ),
    "a model without adapters": bad_training(
        "model | no adapter parameters | use a lora_* builder",
        "model._component_=torchtune.models.phi3.phi3",
        "~model.lora_attn_modules",
        "~model.apply_lora_to_mlp",
        "~model.apply_lora_to_output",
        "~model.lora_rank",
        "~model.lora_alpha",
        "~model.lora_dropout",
    ),
    "a rank of zero": bad_training("model | lora_phi3 failed ( | check this section's values", "model.lora_rank=0"),
    "a checkpointer without a folder": bad_training(
        "checkpointer | checkpoint_dir is None | set it to the folder", "~checkpointer.checkpoint_dir"
    ),
    "a checkpointer without files": bad_training(
        "checkpointer | failed ( | check this section's values", "~checkpointer.checkpoint_files"
    ),
    "a pattern of files without a number": bad_training(
        "checkpointer.checkpoint_files | no 'max_filename' | write [model.safetensors], or {filename_format",
        "checkpointer.checkpoint_files={filename_format: 'm-{}-of-{}.safetensors'}",
    ),
    "a file where a list of files is wanted": bad_training(
        "checkpointer.checkpoint_files | neither a list of files | write [model.safetensors]",
        "checkpointer.checkpoint_files=model.safetensors",
    ),
    "a tokenizer that is none": bad_training(
        "tokenizer | phi3_mini_tokenizer failed ( | check this section's values",
        change=lambda folder: (folder / "base/tokenizer.model").write_bytes(b"no model"),
    ),
    "a tokenizer that is something else": bad_training(
        "tokenizer | torch.nn.Identity is no usable chat tokenizer | use the base's own",
        "tokenizer._component_=torch.nn.Identity",
    ),
    "a context of no number": bad_training(
        "tokenizer | 'int' and 'str' | a whole number as max_seq_len", "tokenizer.max_seq_len=long"
    ),
    "a tokenizer without its file": bad_training(
        "tokenizer | failed ( | check this section's values", "~tokenizer.path"
    ),
    "the tokenizer of another base": bad_training(
        "base/tokenizer.model | writes token 32010, the model knows 400 | special_tokens_path",
        "~tokenizer.special_tokens_path",
    ),
    "a base that never was": case(
        "persona_eval", "checkpointer | PHI99 | check this section's values", "checkpointer.model_type=PHI99"
    ),
    "an optimizer that there is not": bad_training(
        "optimizer._component_ | AdamX | check the dotted path", "optimizer=torch.optim.AdamX"
    ),
    "a key that the optimizer does not take": bad_training(
        "optimizer | unexpected keyword argument 'lrr' | it takes params, lr", "optimizer.lrr=1"
    ),
    "a negative learning rate": bad_training(
        "optimizer | Invalid learning rate: -1 | check its values", "optimizer.lr=-1"
    ),
    "a scheduler that takes something else": bad_training(
        "lr_scheduler | unexpected keyword argument 'warmup' | it takes optimizer",
        "lr_scheduler={_component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup, warmup: 3}",
    ),
    "two components at once": case(
        "persona_lora",
        "optimizer | 'lrr' | it takes\nloss._component_ | CrossEntropy | check the dotted path",
        "optimizer.lrr=1",
        "loss=torch.nn.CrossEntropy",
    ),
    "a logger that is not installed": bad_training(
        "metric_logger | failed ( | check its values",
        "metric_logger={_component_: torchtune.training.metric_logging.CometLogger}",
    ),
    "a folder of logs that is a file": bad_training(
        "metric_logger | File exists | check its values", "metric_logger.log_dir=experiment.yaml"
    ),
    "a loss of something else": bad_training(
        "loss | MSELoss is no loss of tokens | use torch.nn.CrossEntropyLoss", "loss=torch.nn.MSELoss"
    ),
    "a loss that is not a mean": bad_training(
        "loss | gives a value per token | use torch.nn.CrossEntropyLoss", "loss.reduction=none"
    ),
    "a profiler that takes something else": bad_training(
        "profiler | unexpected keyword argument 'gpu' | it takes enabled",
        "profiler={_component_: torchtune.training.setup_torch_profiler, gpu: true}",
    ),
    "an untried device": bad_training("device | 'mps' has not been tried | use cpu or cuda", "device=mps"),
    "a device that there is not": bad_training("device | unknown device 'gpu' | use cpu or cuda", "device=gpu"),
    "more rows than there are": bad_training(
        "adapter_sets | 9999 rows asked for | lower rows or leave it out",
        "adapter_sets.single.rows=9999",
        "~adapter_sets.persona",
        "~agents",
    ),
    "no checkpoint to go on from": bad_training(
        ".persona.checkpoints | no complete checkpoint | leave resume_from_checkpoint out",
        "resume_from_checkpoint=true",
    ),
    "a checkpoint that is not there": bad_training(
        "gone/step_3 | no checkpoint there | resume_from_checkpoint=last", "resume_from_checkpoint=gone/step_3"
    ),
    "no corpus for a base": case(
        "persona_base",
        "gone/samples/prompt.json | file not found | tune run persona_raft",
        "base_training.corpora=[gone]",
    ),
    "a base without users to train on": case(
        "persona_base",
        "base_training.rows_per_step | 0 rows to train on | lower base_training.validation_users",
        "base_training.validation_users=6",
        "base_training.vocab_size=400",
    ),
    "a vocabulary that its texts can't fill": case(
        "persona_base",
        "base_training.vocab_size | no vocabulary of 100000 | Please set it to a value <=",
        "base_training.vocab_size=100000",
    ),
    "heads that can't share a base's width": case(
        "persona_base", "base_training | num_heads 7 | each head takes an even share", "base_training.num_heads=7"
    ),
}

CASES = {**LOGS, **KEYS, **TEXTS, **STAGE_FILES, **BASES}


@pytest.fixture
def folder(csv_run, tiny_checkpoint, tmp_path, monkeypatch):
    """A folder of the test's own: a finished experiment and the base it used, named by relative paths."""
    copytree(csv_run.root, tmp_path / "run")
    copytree(tiny_checkpoint, tmp_path / "base")
    for name in ("ratings.csv", "items.csv"):
        (tmp_path / name).write_bytes((csv_run.root.parent / name).read_bytes())
    write_yaml(tmp_path / "experiment.yaml", csv_experiment(Path(), Path("base")))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def state_of(folder):
    """Every file below a folder with its bytes, every folder with None."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_told_in_a_line_a_mistake_and_changes_nothing(name, folder):
    case = CASES[name]
    if case.fresh:
        rmtree(folder / "run")
    for file, content in case.files.items():
        if (folder / file).is_dir():
            rmtree(folder / file)
        (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)
    if case.change is not None and (folder / "run").exists():
        case.change(folder)
    before = state_of(folder)

    outcome = run_recipe(case.recipe, "experiment.yaml", "seed=4", *case.overrides)  # another seed: nothing is current

    lines = outcome.err.splitlines()
    assert outcome.status == 2, outcome
    assert len(lines) == len(case.lines), outcome.err
    for line, fragments in zip(lines, case.lines, strict=True):
        assert line.startswith("error: ")
        assert all(fragment in line for fragment in fragments), line
        assert fragments[-1] in line.partition("; ")[2], "the remedy is missing"
    assert state_of(folder) == before


def test_there_are_many_cases():
    assert len(CASES) > 100


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_gpu_that_is_not_there_is_asked_for_in_vain(folder):
    before = state_of(folder)
    outcome = run_recipe("persona_lora", "experiment.yaml", "seed=4", "device=cuda")
    assert outcome.status == 2
    assert outcome.err == "error: device: no CUDA device on this machine; set device=cpu dtype=fp32\n"
    assert state_of(folder) == before


@pytest.mark.parametrize(
    "recipe", ["persona_prepare", "persona_distill", "persona_cluster", "persona_raft", "persona_base"]
)
def test_of_several_processes_the_first_refuses_and_the_others_are_silent(recipe, folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = state_of(folder)
    for rank, expected in (
        ("0", "error: --nproc_per_node: this recipe runs in one process, not in 2; leave the flag out; persona_lora,"),
        ("1", ""),
    ):
        monkeypatch.setenv("RANK", rank)
        outcome = run_recipe(recipe, "experiment.yaml")
        assert outcome.status == 2
        assert outcome.err.startswith(expected)
        assert len(outcome.err.splitlines()) == (1 if expected else 0)
        assert outcome.out == ""
    assert state_of(folder) == before


def test_a_pipeline_stops_at_the_mistake_and_keeps_what_was_finished(folder):
    before = state_of(folder / "run")
    outcome = run_recipe("persona_pipeline", "experiment.yaml", "personas.k=9")
    assert outcome.status == 2
    error, note = outcome.err.splitlines()
    assert error.startswith("error: personas.k: 9 personas need at least 9 users")
    assert note == "persona_pipeline: persona_cluster failed; mend what it says; run the pipeline again to go on"
    assert state_of(folder / "run").keys() == before.keys()
