import json

import numpy as np
import persona_raft
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from personas_tune.collaborative.neighbours import neighbour_ratings
from personas_tune.embedding import EmbeddingSettings
from personas_tune.errors import ConfigError, DataError, MissingInputError
from personas_tune.llm.settings import ServerSettings
from personas_tune.retrieval.samples import MemorySearch
from personas_tune.retrieval.texts import ProfilesInTime, RetrievalTexts, item_text, item_texts

QUERIES = ("item", "user_and_item")


def by_server(server):
    return ["retrieval.embedder=openai", f"embedding.base_url={server.base_url}", "embedding.inputs_per_request=8"]


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


def test_items_are_embedded_by_a_server_and_each_is_paid_for_once(make_experiment, openai_server, capsys):
    server, experiment = openai_server(), make_experiment().write()
    experiment.run(persona_raft, "retrieval.k=3", *by_server(server))
    settings = EmbeddingSettings(ServerSettings("any", server.base_url), experiment.workspace.journal(None))
    search = MemorySearch.load(experiment.workspace.root / "samples" / "index", settings)
    assert (search.index.space.embedder, search.index.space.dim) == ("openai", 64)
    for sample in experiment.samples("train")[:12] + experiment.samples("test")[:6]:
        own = sample["position"]
        expected = brute_force_positions(experiment, sample, search, 3, lambda p, own=own: p != own)
        assert sample["memory_positions"] == expected
    seen = {row["item_id"] for row in experiment.interactions}
    texts = {item_text(item) for item in experiment.items if item["item_id"] in seen}
    assert sum(entry["usage"]["prompt_tokens"] for entry in server.billed()) == sum(len(text) // 4 for text in texts)

    n_billed, first = len(server.billed()), experiment.files("samples")
    capsys.readouterr()
    experiment.run(persona_raft, "retrieval.k=3", *by_server(server), "embedding.timeout_s=9", "retrieval.dim=9")
    assert "up to date" in capsys.readouterr().out
    (experiment.workspace.root / "samples" / "manifest.json").unlink()
    experiment.run(persona_raft, "retrieval.k=3", *by_server(server))
    assert experiment.files("samples") == first
    experiment.run(persona_raft, "retrieval.k=2", *by_server(server))
    assert len(server.billed()) == n_billed


def test_one_more_user_pays_for_its_own_texts_alone(make_experiment, openai_server):
    server, experiment = openai_server(), make_experiment()
    overrides = ["retrieval.query=user_and_item", *by_server(server)]
    kinds = ("interactions", "memories", "profiles", "personas")
    all_rows = {kind: getattr(experiment, kind) for kind in kinds}
    for kind in kinds:
        setattr(experiment, kind, [row for row in all_rows[kind] if row["user_id"] != "u5"])
    experiment.write().run(persona_raft, *overrides)
    n_billed, before = len(server.billed()), experiment.samples("train")
    for kind in kinds:
        setattr(experiment, kind, all_rows[kind])
    experiment.write().run(persona_raft, *overrides)
    assert [row for row in experiment.samples("train") if row["user_id"] != "u5"] == before

    items = item_texts(pa.Table.from_pylist(experiment.items))
    texts = RetrievalTexts("user_and_item", items, ProfilesInTime(pa.Table.from_pylist(experiment.profiles)))

    def texts_of(is_asked):
        rows = {kind: pa.Table.from_pylist([row for row in all_rows[kind] if is_asked(row)]) for kind in kinds}
        return {*texts.keys(rows["memories"]), *texts.queries(rows["interactions"])}

    new = texts_of(lambda row: row["user_id"] == "u5") - texts_of(lambda row: row["user_id"] != "u5")
    paid = sum(entry["usage"]["prompt_tokens"] for entry in server.billed()[n_billed:])
    assert paid == sum(len(text) // 4 for text in new)


def test_an_item_without_a_text_is_never_sent(make_experiment, openai_server):
    server, experiment = openai_server(), make_experiment()
    wordless = experiment.interactions[0]["item_id"]
    item = next(item for item in experiment.items if item["item_id"] == wordless)
    item.update(title="...", summary=None, genres=[], cast=[], year=None)
    experiment.write().run(persona_raft, "retrieval.k=99", *by_server(server))
    for sample in experiment.samples("train") + experiment.samples("test"):
        assert (sample["memory_positions"] == []) == (sample["item_id"] == wordless)


def test_users_that_the_distiller_left_out_have_no_samples(make_experiment, capsys):
    whole, partial = make_experiment("whole").write(), make_experiment("partial")
    for kind in ("personas", "memories", "profiles"):
        setattr(partial, kind, [row for row in getattr(partial, kind) if row["user_id"] not in ("u2", "u4")])
    partial.write().workspace.left_out.write_text(json.dumps({"u4": "refused", "u2": "3 answers were no JSON"}))
    whole.run(persona_raft, "retrieval.query=user_and_item", "retrieval.dim=99")
    capsys.readouterr()
    partial.run(persona_raft, "retrieval.query=user_and_item", "retrieval.dim=99")
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "samples: 2 users without a profile (u2, u4) and their 24 interactions are left out"
    assert len(printed) == 4
    for split in ("train", "test"):
        kept = [row for row in whole.samples(split) if row["user_id"] not in ("u2", "u4")]
        columns = ("user_id", "item_id", "position", "rating", "persona")
        assert [[row[c] for c in columns] for row in partial.samples(split)] == [
            [row[c] for c in columns] for row in kept
        ]
        assert all(len(row["memory_positions"]) == 1 for row in partial.samples(split))
    partial.run(persona_raft, "retrieval.query=user_and_item", "retrieval.dim=99")
    assert "up to date" in capsys.readouterr().out


def test_who_is_left_out_is_an_input_of_the_samples(make_experiment, capsys):
    experiment = make_experiment().write()
    experiment.workspace.left_out.write_text("{}")
    experiment.run(persona_raft)
    experiment.workspace.left_out.write_text('{"u0": "refused"}')
    with pytest.raises(DataError, match=r"user u0 .*a memory of no train interaction"):
        experiment.run(persona_raft)
    experiment.workspace.left_out.write_text('["u0"]')
    with pytest.raises(
        DataError, match=r"left_out.json: not a mapping of users to reasons; run `tune run persona_dist"
    ):
        experiment.run(persona_raft)


def test_a_user_without_a_persona_who_is_not_listed_is_an_error(make_experiment):
    experiment = make_experiment()
    experiment.personas = experiment.personas[2:]
    experiment.memories = [row for row in experiment.memories if row["user_id"] not in ("u0", "u1")]
    experiment.write().workspace.left_out.write_text('{"u0": "refused"}')
    with pytest.raises(DataError, match="user u1: no persona for 1 of 5 users"):
        experiment.run(persona_raft)


def test_a_missing_stage_is_named_with_its_recipe(make_experiment):
    experiment = make_experiment().write()
    experiment.workspace.personas.unlink()
    with pytest.raises(MissingInputError, match=r"personas.parquet: file not found; run `tune run persona_cluster"):
        experiment.run(persona_raft)


def test_an_embedder_without_its_model_leaves_nothing_behind(make_experiment):
    experiment = make_experiment().write()
    with pytest.raises(ConfigError, match=r"embedding\.path: no folder of a model is given"):
        experiment.run(persona_raft, "retrieval.embedder=sentence-transformers")
    assert sorted(path.name for path in experiment.workspace.root.iterdir()) == ["data", "memory", "personas"]


def test_user_and_item_needs_profiles_and_item_does_not(make_experiment):
    experiment = make_experiment().write()
    experiment.workspace.profiles.unlink()
    experiment.run(persona_raft)
    with pytest.raises(MissingInputError, match=r"profiles.parquet: file not found; run `tune run persona_distill"):
        experiment.run(persona_raft, "retrieval.query=user_and_item")


def test_rows_of_both_splits_get_what_their_neighbours_say(make_experiment):
    experiment = make_experiment().write()
    outside = pa.table({"user_id": ["v"] * 9, "item_id": [f"i{n:02}" for n in range(9)], "rating": [1.0, 3.0, 5.0] * 3})
    pq.write_table(outside, experiment.workspace.outside)
    experiment.run(persona_raft, "retrieval.neighbours=3")
    of_split = {name: pa.Table.from_pylist(experiment.samples(name)) for name in ("train", "test")}
    for rows in of_split.values():
        options = {"before_target": False, "low": 1, "high": 5}
        ratings, n_neighbours = neighbour_ratings(rows, of_split["train"], outside, 3, **options)
        assert rows["neighbours_rating"].to_pylist() == ratings.tolist()
        assert rows["n_neighbours"].to_pylist() == n_neighbours.tolist()
