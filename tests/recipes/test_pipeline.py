"""The whole pipeline on tiny data: what it writes, and what it does not do twice."""

import hashlib
import json
import math
import re
from collections import Counter

import pyarrow as pa
import pytest
import yaml
from pipelines import PREPARATION, files_below, read, rows, run_recipe, run_to_the_end, stage_folders, write_yaml
from safetensors.torch import load_file
from tiny import base_sections

from personas_tune.workspace import COLUMNS, MANIFEST

BOTH = pytest.mark.parametrize("name", ["csv_run", "world_run"])

TEXT, NUMBER, WHOLE, TEXTS = pa.string(), pa.float64(), pa.int32(), pa.list_(pa.string())
SAMPLE = {"user_id": TEXT, "item_id": TEXT, "position": WHOLE, "rating": NUMBER, "persona": WHOLE}
TIERS = {"activity_tier": WHOLE, "conformity_tier": WHOLE, "diversity_tier": WHOLE}
SCHEMAS = {
    "data/interactions": {
        "user_id": TEXT, "item_id": TEXT, "rating": NUMBER, "timestamp": pa.int64(), "position": WHOLE, "split": TEXT,
    },
    "data/outside": {"user_id": TEXT, "item_id": TEXT, "rating": NUMBER, "timestamp": pa.int64()},
    "data/items": {
        "item_id": TEXT, "title": TEXT, "year": WHOLE, "genres": TEXTS, "summary": TEXT, "cast": TEXTS,
        "mean_rating": NUMBER, "n_ratings": WHOLE,
    },
    "data/users": {
        "user_id": TEXT, "n_train": WHOLE, "n_test": WHOLE, "mean_rating": NUMBER, "activity": NUMBER,
        "conformity": NUMBER, "diversity": NUMBER, **TIERS,
    },
    "memory/profiles": {
        "user_id": TEXT, "upto_position": WHOLE, "profile": TEXT, "distiller": TEXT, "n_words": WHOLE,
    },
    "memory/memories": {"user_id": TEXT, "item_id": TEXT, "position": WHOLE, "rating": NUMBER, "memory": TEXT},
    "personas/personas": {"user_id": TEXT, "persona": WHOLE, "distance": NUMBER},
    "samples/train": {**SAMPLE, "memory_positions": pa.list_(pa.int32())},
    "samples/test": {**SAMPLE, "memory_positions": pa.list_(pa.int32())},
    "eval/predictions_persona": {
        **SAMPLE, "p": pa.list_(NUMBER), "expected": NUMBER, "argmax": NUMBER, "text": TEXT, "parsed": NUMBER,
    },
}  # fmt: skip
AGENTS = {"csv_run": ["base", "single", "persona", "persona_generate"], "world_run": ["base", "shuffled", "persona"]}
SETS = {"csv_run": ["persona", "single"], "world_run": ["persona", "single", "shuffled"]}
BASELINES = {
    "constant", "global_mean", "user_mean", "item_mean", "user_item_bias", "matrix_factorisation",
    "ridge_prompt_numbers",
}  # fmt: skip
PREPARED = {"data", "memory", "personas", "samples"}
ADAPTERS = {"adapters/persona", "adapters/single"}


@pytest.fixture
def run(request, name):
    return request.getfixturevalue(name)


def metrics_of(root):
    return json.loads((root / "eval" / "metrics.json").read_text(encoding="utf-8"))


def changed_stages(run, root, *overrides):
    """Stages that run again when the pipeline does, with ``root`` as its output."""
    before = stage_folders(root)
    again = run_to_the_end(run.config, f"output_dir={root}", *overrides)
    after = stage_folders(root)
    return {folder for folder, time in after.items() if before.get(folder) != time}, again.outcome.out


# What is there


@BOTH
@pytest.mark.parametrize("table", SCHEMAS)
def test_every_table_has_the_columns_of_the_contract(run, table):
    schema = read(run.root, table).schema
    assert {field: schema.field(field).type for field in SCHEMAS[table]} == SCHEMAS[table]


def test_the_schemas_here_cover_all_columns_of_the_contract():
    covered = {name.partition("/")[2].partition("_")[0]: set(schema) for name, schema in SCHEMAS.items()}
    assert covered.pop("train") == covered.pop("test") == set(COLUMNS["samples"])
    covered.pop("outside")
    # memory_positions is what a prompt shows, not what was predicted
    assert {name: set(columns) for name, columns in COLUMNS.items() if name != "samples"} == covered


@BOTH
def test_every_file_of_the_contract_is_there(run, name):
    written = set(files_below(run.root))
    expected = {f"{table}.parquet" for table in SCHEMAS}
    expected |= {f"eval/predictions_{agent}.parquet" for agent in AGENTS[name]}
    expected |= {"personas/clustering.json", "personas/elbow.png", "samples/prompt.json", "samples/index/index.json"}
    expected |= {"eval/metrics.json", "eval/table.md", "report/index.html"}
    for adapter_set in SETS[name]:
        for adapter in ["all"] if adapter_set == "single" else ["0", "1"]:
            folder = f"adapters/{adapter_set}/{adapter}"
            expected |= {f"{folder}/{file}.safetensors" for file in ("adapter", "adapter_model")}
            expected |= {f"{folder}/adapter_config.json", f"{folder}/training.json"}
        expected.add(f"adapters/{adapter_set}/assignment.parquet")
    assert expected <= written
    assert ("data/oracle.parquet" in written) == (name == "world_run")
    assert not [path for path in run.root.rglob("*") if path.name.endswith(".tmp")]


@BOTH
def test_every_stage_has_a_manifest_with_the_hashes_of_what_it_read_and_wrote(run, name):
    folders = {"eval", "report", *PREPARED, *(f"adapters/{adapter_set}" for adapter_set in SETS[name])}
    assert set(stage_folders(run.root)) == folders
    for folder in folders:
        manifest = json.loads((run.root / folder / MANIFEST).read_text(encoding="utf-8"))
        assert manifest["seed"] == 3
        assert {"torch", "torchtune", "python", "personas_tune"} <= set(manifest["versions"])
        assert manifest["settings"]
        here = {path for path in files_below(run.root) if path.startswith(f"{folder}/")}
        assert {f"{folder}/{file}" for file in manifest["outputs"]} == here
        hashed = {run.root / folder / file: digest for file, digest in manifest["outputs"].items()}
        for path, digest in {**hashed, **manifest["inputs"]}.items():
            with open(path, "rb") as stream:
                assert hashlib.file_digest(stream, "sha256").hexdigest() == digest


@BOTH
def test_the_tables_fit_together(run, name):
    interactions = rows(run.root, "data/interactions")
    users = {row["user_id"]: row for row in rows(run.root, "data/users")}
    assert len(users) == 6
    keys = ("user_id", "item_id", "position", "rating")
    for split in ("train", "test"):
        wanted = [[row[key] for key in keys] for row in interactions if row["split"] == split]
        assert wanted == [[row[key] for key in keys] for row in rows(run.root, f"samples/{split}")]
        counts = Counter(row[0] for row in wanted)
        assert counts == {user: row[f"n_{split}"] for user, row in users.items()}
    personas = {row["user_id"]: row["persona"] for row in rows(run.root, "personas/personas")}
    assert set(personas) == set(users)
    assert set(personas.values()) == {0, 1}
    memories = [[row[key] for key in keys] for row in rows(run.root, "memory/memories")]
    assert memories == [[row[key] for key in keys] for row in interactions if row["split"] == "train"]
    assert {row["item_id"] for row in interactions} == {row["item_id"] for row in rows(run.root, "data/items")}
    assert not set(users) & {row["user_id"] for row in rows(run.root, "data/outside")}
    labels = json.loads((run.root / "samples" / "prompt.json").read_text(encoding="utf-8"))["labels"]
    for agent in AGENTS[name]:
        predicted = rows(run.root, f"eval/predictions_{agent}")
        test = rows(run.root, "samples/test")
        assert [[row[key] for key in SAMPLE] for row in predicted] == [[row[key] for key in SAMPLE] for row in test]
        for row in predicted:
            assert len(row["p"]) == len(labels)
            assert math.isclose(sum(row["p"]), 1, abs_tol=1e-6)
            expected = sum(float(label) * p for label, p in zip(labels, row["p"], strict=True))
            assert math.isclose(row["expected"], expected, rel_tol=1e-6)
            assert (row["text"] is None) == (agent != "persona_generate")


@BOTH
def test_the_table_names_every_agent_and_baseline_and_is_printed(run, name):
    table = (run.root / "eval" / "table.md").read_text(encoding="utf-8")
    assert table in run.outcome.out
    assert str(run.root / "eval" / "table.md") in run.outcome.out
    metrics = metrics_of(run.root)
    assert [agent["name"] for agent in metrics["agents"]] == AGENTS[name]
    assert {baseline["name"] for baseline in metrics["baselines"]} == BASELINES
    assert (metrics["oracle"] is not None) == (name == "world_run")
    first_cells = [line.split("|")[1].split()[0] for line in table.splitlines() if line.startswith("| ")]
    named = [*AGENTS[name], *BASELINES, *(["bayes_optimal"] if name == "world_run" else [])]
    assert set(named) <= set(first_cells)
    n = read(run.root, "samples/test").num_rows
    for row in [*metrics["agents"], *metrics["baselines"]]:
        assert row["n"] == n
        assert (row["n_parsed"] == n) or row["name"] == "persona_generate"
    assert {"historical_average": "outside", "traits": "train", "seed": 3}.items() <= metrics["settings"].items()


@BOTH
def test_every_adapter_of_a_set_was_trained_on_its_own_users_and_differs_from_the_others(run, name):
    samples = rows(run.root, "samples/train")
    for adapter_set in SETS[name]:
        folder = run.root / "adapters" / adapter_set
        assignment = {row["user_id"]: row["adapter"] for row in rows(folder, "assignment")}
        assert set(assignment) == {row["user_id"] for row in samples}
        weights = {path.name: load_file(path / "adapter.safetensors") for path in folder.iterdir() if path.is_dir()}
        assert set(weights) == set(assignment.values())
        per_adapter = Counter(assignment[row["user_id"]] for row in samples)
        for adapter, state in weights.items():
            assert all((weight != 0).any() for weight in state.values()), "lora_b starts at zero"
            trained = json.loads((folder / adapter / "training.json").read_text(encoding="utf-8"))
            if adapter_set == "single":
                per_persona = Counter(row["persona"] for row in samples)
                assert trained["rows"] == max(per_persona.values()) if name == "csv_run" else trained["rows"]
            else:
                assert trained["rows"] == per_adapter[adapter]
            assert trained["steps"] == -(-trained["rows"] // 8)
        if len(weights) == 2:
            assert all((weights["0"][key] != weights["1"][key]).any() for key in weights["0"])
    shuffled = run.root / "adapters" / "shuffled"
    if shuffled.exists():
        dealt = Counter(row["adapter"] for row in rows(shuffled, "assignment"))
        assert dealt == Counter(row["adapter"] for row in rows(run.root / "adapters" / "persona", "assignment"))


def test_the_peft_folder_names_the_fused_projection_and_holds_finite_weights(csv_run):
    folder = csv_run.root / "adapters" / "persona" / "0"
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["target_modules"] == ["qkv_proj"]
    assert (config["r"], config["lora_alpha"]) == (8, 16)  # q and k of rank 4 stacked
    weights = load_file(folder / "adapter_model.safetensors")
    assert {name.split(".")[4] for name in weights} == {"0", "1"}
    assert all(weight.isfinite().all() for weight in weights.values())


def test_the_metric_logger_gets_a_line_a_step(csv_run):
    lines = (csv_run.root / "logs" / "training.txt").read_text(encoding="utf-8").splitlines()
    steps = Counter(re.search(r"loss/(\S+):", line)[1] for line in lines)
    folder = csv_run.root / "adapters"
    assert steps == {
        name: json.loads((folder / name / "training.json").read_text(encoding="utf-8"))["steps"]
        for name in ("persona/0", "persona/1", "single/all")
    }
    assert all(re.search(r"lr:0\.01 rows_per_second:\d", line) for line in lines)


# What is not done twice


@BOTH
def test_a_second_run_says_that_every_stage_is_up_to_date_and_changes_no_byte(run, name):
    def state():
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.root.rglob("*") if path.is_file()}

    before = state()
    again = run_to_the_end(run.config)
    assert state() == before
    sections = re.split(r"^\[\d/6\] (\w+)$", again.outcome.out, flags=re.MULTILINE)[1:]
    said = {stage: text.count("up to date") for stage, text in zip(sections[::2], sections[1::2], strict=True)}
    once = ("persona_prepare", "persona_distill", "persona_cluster", "persona_raft", "persona_eval")
    assert said == {**dict.fromkeys(once, 1), "persona_lora": len(SETS[name])}
    assert (run.root / "eval" / "table.md").read_text(encoding="utf-8") in again.outcome.out


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("evaluation.n_resamples=199", {"eval", "report"}),
        ("adapter_sets.single.rows=20", {"adapters/single", "eval", "report"}),
        ("retrieval.k=2", {"samples", *ADAPTERS, "eval", "report"}),
        ("personas.k=3", {"personas", "samples", *ADAPTERS, "eval", "report"}),
    ],
)
def test_changing_a_setting_runs_again_what_depends_on_it_and_nothing_else(csv_run, copy_of, override, expected):
    root = copy_of(csv_run)
    before = files_below(root)
    changed, out = changed_stages(csv_run, root, override)
    assert changed == expected
    assert out.count("up to date") == len({"eval", *PREPARED, *ADAPTERS} - expected)
    after = files_below(root)
    for name in before:
        if not name.startswith(tuple(f"{stage}/" for stage in expected)):
            assert after[name] == before[name]


def test_a_damaged_file_is_made_again_and_what_follows_stays(csv_run, copy_of):
    root = copy_of(csv_run)
    before = files_below(root)
    (root / "personas" / "personas.parquet").write_bytes(b"cut off")
    changed, _ = changed_stages(csv_run, root)
    assert changed == {"personas", "report"}  # the report reads manifests, which name paths: here those of a copy
    assert files_below(root) == before


def test_fewer_personas_leave_no_adapter_of_the_old_ones(csv_run, copy_of):
    root = copy_of(csv_run)
    run_to_the_end(csv_run.config, f"output_dir={root}", "personas.k=1", "stages=[persona_cluster,persona_raft]")
    run_to_the_end(csv_run.config, f"output_dir={root}", "personas.k=1", recipe="persona_lora")
    adapters = [path.parent.name for path in (root / "adapters" / "persona").glob("*/adapter.safetensors")]
    assert adapters == ["0"]


def test_the_pipeline_stops_at_the_first_stage_that_fails(csv_run, tmp_path):
    outcome = run_recipe("persona_pipeline", csv_run.config, f"output_dir={tmp_path / 'out'}", "personas.k=99")
    assert outcome.status == 2
    mistake, after = outcome.err.splitlines()[-2:]
    assert mistake.startswith("error: personas.k: 99 personas need at least 99 users, there are 6")
    assert after.startswith("persona_pipeline: persona_cluster failed")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["data", "memory"]


# Validation, and a base of one's own


def test_validation_share_holds_out_each_users_last_rows_and_reports_their_loss(csv_run, copy_of):
    root = copy_of(csv_run)
    overrides = [f"output_dir={root}", "validation_share=0.25", "epochs=2", "~adapter_sets.single", "~agents.single"]
    run = run_to_the_end(csv_run.config, *overrides, recipe="persona_lora")
    log = (root / "logs" / "training.txt").read_text(encoding="utf-8")
    per_user = Counter(row["user_id"] for row in rows(root, "samples/train"))
    assignment = {row["user_id"]: row["adapter"] for row in rows(root, "adapters/persona/assignment")}
    for adapter in ("0", "1"):
        trained = json.loads((root / f"adapters/persona/{adapter}/training.json").read_text(encoding="utf-8"))
        mine = [n for user, n in per_user.items() if assignment[user] == adapter]
        assert trained["rows"] == sum(n - int(n * 0.25) for n in mine)
        assert len(trained["validation_losses"]) == 2
        for loss in trained["validation_losses"]:
            assert math.isfinite(loss)
            assert f"validation_loss/persona/{adapter}:{loss}" in log
            assert f"validation loss {loss:.4f}" in run.outcome.out + run.outcome.err


@pytest.fixture(scope="module")
def own_base(csv_run, tmp_path_factory):
    """A one-layer base that `persona_base` trained on the test rows of the CSV experiment."""
    folder = tmp_path_factory.mktemp("own_base")
    options = {
        "corpora": [str(csv_run.root)], "vocab_size": 400, "embed_dim": 16, "num_layers": 1, "num_heads": 2,
        "num_kv_heads": 2, "intermediate_dim": 32, "max_seq_len": 1024, "rows_per_step": 16, "rows_per_user": 4,
        "warmup_steps": 1, "validation_users": 1, "tokenizer_stride": 1,
    }  # fmt: skip
    config = write_yaml(folder / "base.yaml", {"output_dir": str(folder), "seed": 3, "base_training": options})
    return run_to_the_end(config, recipe="persona_base")


def test_persona_base_trains_a_base_and_a_second_run_does_nothing(own_base):
    base = own_base.root / "base"
    names = {"config.json", "model.safetensors", "special_tokens.json", "tokenizer.model", MANIFEST}
    assert {path.name for path in base.iterdir()} == names
    assert re.search(r"step (\d+): loss \d+\.\d+, validation RMSE \d\.\d+", own_base.outcome.out + own_base.outcome.err)
    before = files_below(own_base.root)
    assert "up to date" in run_to_the_end(own_base.config, recipe="persona_base").outcome.out
    assert files_below(own_base.root) == before


def test_the_pipeline_runs_on_a_base_that_persona_base_made(csv_run, copy_of, own_base, tmp_path):
    root = copy_of(csv_run)
    base = own_base.root / "base"
    experiment = yaml.safe_load(csv_run.config.read_text(encoding="utf-8"))
    shape = {"embed_dim": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "intermediate_dim": 32}
    experiment.update(base_sections(base, **shape), output_dir=str(root))
    experiment["agents"] = {"base": {}, "persona": {"adapters": "persona"}}
    del experiment["adapter_sets"]["single"]
    before = stage_folders(root)
    run_to_the_end(write_yaml(tmp_path / "own.yaml", experiment))
    changed = {folder for folder, time in stage_folders(root).items() if before.get(folder) != time}
    assert changed == {"adapters/persona", "eval", "report"}
    assert len(load_file(root / "adapters/persona/0/adapter.safetensors")) == 4
    assert [agent["name"] for agent in metrics_of(root)["agents"]] == ["base", "persona"]


def test_only_the_named_stages_are_run(csv_run, tmp_path):
    run_to_the_end(csv_run.config, f"output_dir={tmp_path / 'out'}", PREPARATION)
    assert set(stage_folders(tmp_path / "out")) == PREPARED
