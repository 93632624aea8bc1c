import json

import numpy as np
import persona_raft
import pytest

from personas_tune.errors import ConfigError, DataError, MissingInputError
from personas_tune.retrieval.samples import MemorySearch
from personas_tune.retrieval.texts import item_text

QUERIES = ("item", "user_and_item")


def brute_force_positions(experiment, sample, search, k, is_allowed):
    """Item against items, by numpy on vectors embedded one text at a time."""
    items = {item["item_id"]: item_text(item) for item in experiment.items}

    def vector(item_id):
        return search.embedder.embed([items[item_id]]).vectors[0].astype(np.float64)

    query = vector(sample["item_id"])
    own = [row for row in experiment.memories if row["user_id"] == sample["user_id"] and is_allowed(row["position"])]
    ranked = sorted((-(vector(row["item_id"]) * query).sum(), row["position"]) for row in own)
    return [position for _, position in ranked[:k]]


@pytest.mark.parametrize("before_target", [False, True])
def test_every_sample_sees_what_brute_force_finds(make_experiment, before_target):
    experiment = make_experiment().write()
    experiment.run(persona_raft, "retrieval.k=3", "retrieval.dim=8", f"retrieval.before_target={before_target}")
    search = MemorySearch.load(experiment.workspace.root / "samples" / "index")
    for sample in experiment.samples("train") + experiment.samples("test"):
        target = sample["position"]
        expected = brute_force_positions(
            experiment, sample, search, 3, lambda p, t=target: p < t if before_target else p != t
        )
        assert sample["memory_positions"] == expected


@pytest.mark.parametrize("query", QUERIES)
def test_no_sample_sees_itself_or_a_test_row_or_with_before_target_the_future(make_experiment, query):
    experiment = make_experiment().write().run(persona_raft, "retrieval.k=99", f"retrieval.query={query}")
    train = {(row["user_id"], row["position"]) for row in experiment.interactions if row["split"] == "train"}
    samples = experiment.samples("train") + experiment.samples("test")
    for sample in samples:
        assert sample["position"] not in sample["memory_positions"]
        assert all((sample["user_id"], position) in train for position in sample["memory_positions"])
    assert {len(sample["memory_positions"]) for sample in samples} == {7, 8}

    experiment.run(persona_raft, "retrieval.k=99", f"retrieval.query={query}", "retrieval.before_target=true")
    for sample in experiment.samples("train"):
        assert sorted(sample["memory_positions"]) == list(range(sample["position"]))


def test_samples_keep_rows_order_and_personas(make_experiment):
    experiment = make_experiment().write().run(persona_raft)
    for split in ("train", "test"):
        expected = [row for row in experiment.interactions if row["split"] == split]
        samples = experiment.samples(split)
        for name in ("user_id", "item_id", "position", "rating"):
            assert [sample[name] for sample in samples] == [row[name] for row in expected]
        assert all(sample["persona"] == int(sample["user_id"][1:]) % 2 for sample in samples)
        assert all(len(sample["memory_positions"]) == 1 for sample in samples)


def test_prompt_settings_travel_with_the_samples(make_experiment):
    scale = "data.rating_scale={min: 0.5, max: 2, step: 0.5}"
    experiment = (
        make_experiment().write().run(persona_raft, scale, "prompt.profile=before_target", "prompt.template=generic")
    )
    assert json.loads(experiment.workspace.prompt_settings.read_text()) == {
        "template": "generic",
        "profile": "before_target",
        "labels": ["0.5", "1", "1.5", "2"],
    }


@pytest.mark.parametrize("query", QUERIES)
def test_what_lies_in_the_test_rows_changes_no_vocabulary_and_no_train_sample(make_experiment, query):
    clean, leaky = make_experiment("clean"), make_experiment("leaky")
    for row in leaky.interactions:
        if row["split"] == "test":
            row["rating"] = 6 - row["rating"]
    assert leaky.test_only_items, "the world must have items that occur in test rows only"
    for item in leaky.test_only_items:
        item.update(title="Zyzzyva", summary="canary of the test", mean_rating=1.0, genres=["Leak"])
    for experiment in (clean, leaky):
        experiment.write().run(persona_raft, f"retrieval.query={query}", "retrieval.k=2")
    before, after = clean.files("samples"), leaky.files("samples")
    assert {name for name in before if before[name] != after[name]} == {"test.parquet"}
    vocabulary = json.loads(after["index/embedder/vocabulary.json"])
    assert not {"zyzzyva", "canary", "leak"} & set(vocabulary)


def test_two_runs_give_equal_bytes(make_experiment):
    first, second = (make_experiment(name).write().run(persona_raft).files("samples") for name in "ab")
    assert first == second
    assert {"train.parquet", "test.parquet", "prompt.json", "index/keys.npy", "index/embedder/idf.npy"} < set(first)
    assert not [name for name in first if name.endswith((".faiss", ".pkl"))]


def test_a_second_run_changes_nothing_and_a_new_setting_does(make_experiment, capsys):
    experiment = make_experiment().write().run(persona_raft)
    experiment.run(persona_raft)
    assert "up to date" in capsys.readouterr().out
    experiment.run(persona_raft, "retrieval.k=2")
    assert len(experiment.samples("test")[0]["memory_positions"]) == 2


def test_without_memories_every_sample_sees_none(make_experiment):
    experiment = make_experiment()
    experiment.memories = []
    experiment.write().run(persona_raft)
    assert all(sample["memory_positions"] == [] for sample in experiment.samples("train") + experiment.samples("test"))
    assert set(experiment.files("samples")) == {"train.parquet", "test.parquet", "prompt.json"}


def test_with_k_0_no_text_is_needed(make_experiment):
    experiment = make_experiment()
    for item in experiment.items:
        item.update(title="", summary=None, genres=[], cast=[], year=None)
    experiment.write().run(persona_raft, "retrieval.k=0")
    assert all(sample["memory_positions"] == [] for sample in experiment.samples("train"))
    with pytest.raises(DataError, match="holds a word; items need titles"):
        experiment.run(persona_raft, "retrieval.k=1")


def test_a_user_without_memories_sees_none_and_the_others_do(make_experiment):
    experiment = make_experiment()
    experiment.memories = [row for row in experiment.memories if row["user_id"] != "u3"]
    experiment.write().run(persona_raft)
    for sample in experiment.samples("train"):
        assert len(sample["memory_positions"]) == (sample["user_id"] != "u3")


def test_an_item_without_a_known_word_finds_nothing_and_is_not_found(make_experiment):
    experiment = make_experiment()
    wordless = experiment.interactions[0]["item_id"]
    item = next(item for item in experiment.items if item["item_id"] == wordless)
    item.update(title="...", summary=None, genres=[], cast=[], year=None)
    experiment.write().run(persona_raft, "retrieval.k=99")
    unseen = {(row["user_id"], row["position"]) for row in experiment.memories if row["item_id"] == wordless}
    for sample in experiment.samples("train") + experiment.samples("test"):
        assert (sample["memory_positions"] == []) == (sample["item_id"] == wordless)
        assert not {(sample["user_id"], position) for position in sample["memory_positions"]} & unseen


def test_a_memory_of_a_test_row_is_refused(make_experiment):
    experiment = make_experiment()
    test_row = next(row for row in experiment.interactions if row["split"] == "test")
    experiment.memories.append(
        {**experiment.memories[0], **{k: test_row[k] for k in ("user_id", "item_id", "position")}}
    )
    experiment.write()
    with pytest.raises(DataError, match=r"user u0 position 8 .*a memory of no train interaction"):
        experiment.run(persona_raft)
    assert not (experiment.workspace.root / "samples").exists()


def test_two_memories_of_one_interaction_are_refused(make_experiment):
    experiment = make_experiment()
    experiment.memories.append(experiment.memories[3])
    with pytest.raises(DataError, match=r"user u0 position 3 .*two memories"):
        experiment.write().run(persona_raft)


def test_a_user_without_a_persona_is_named(make_experiment):
    experiment = make_experiment()
    del experiment.personas[2]
    with pytest.raises(DataError, match="user u2: no persona for 1 of 6 users"):
        experiment.write().run(persona_raft)


def test_a_missing_stage_is_named_with_its_recipe(make_experiment):
    experiment = make_experiment().write()
    experiment.workspace.personas.unlink()
    with pytest.raises(MissingInputError, match=r"personas.parquet: file not found; run `tune run persona_cluster"):
        experiment.run(persona_raft)


def test_an_embedder_that_is_not_built_leaves_nothing_behind(make_experiment):
    experiment = make_experiment().write()
    with pytest.raises(ConfigError, match="not built yet"):
        experiment.run(persona_raft, "retrieval.embedder=openai")
    assert sorted(path.name for path in experiment.workspace.root.iterdir()) == ["data", "memory", "personas"]


def test_user_and_item_needs_profiles_and_item_does_not(make_experiment):
    experiment = make_experiment().write()
    experiment.workspace.profiles.unlink()
    experiment.run(persona_raft)
    with pytest.raises(MissingInputError, match=r"profiles.parquet: file not found; run `tune run persona_distill"):
        experiment.run(persona_raft, "retrieval.query=user_and_item")
