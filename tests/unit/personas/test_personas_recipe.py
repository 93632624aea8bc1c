import json

import numpy as np
import persona_cluster
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sentence_model import write_model

from personas_tune.config import load_experiment
from personas_tune.embedding import EmbeddingSettings
from personas_tune.errors import ClusteringError, ConfigError, DataError, JournalError, MissingInputError
from personas_tune.llm.journal import Journal
from personas_tune.llm.settings import ServerSettings
from personas_tune.personas.files import assign_new_users
from personas_tune.personas.profiles import final_profiles
from personas_tune.workspace import Workspace

TASTES = ("war films with soldiers and battles", "romance, letters and the sea", "comedy, slapstick and weddings")
COUNTS = (7, 5, 3)


def profile_rows():
    """Users of three tastes, each with an early profile of another taste and a final one of its own."""
    rows = []
    for user, taste in enumerate(np.repeat(np.arange(3), COUNTS).tolist()):
        other = TASTES[(taste + 1) % 3]
        rows.append((f"u{user:02}", 10, f"I like {other}"))
        rows.append((f"u{user:02}", 20, f"I like {TASTES[taste]}, film {user % 4}"))
    return rows


@pytest.fixture
def run(tmp_path):
    """Writes the profiles, runs the recipe, gives the workspace."""

    def run_recipe(*overrides, rows=None, name="one"):
        workspace = Workspace.at(tmp_path / name)
        if rows is not None:
            user_ids, uptos, texts = zip(*rows, strict=True) if rows else ((), (), ())
            table = pa.table(
                {
                    "user_id": pa.array(user_ids, pa.string()),
                    "upto_position": pa.array(uptos, pa.int32()),
                    "profile": pa.array(texts, pa.string()),
                    "distiller": pa.array(["file"] * len(rows), pa.string()),
                    "n_words": pa.array([5] * len(rows), pa.int32()),
                }
            )
            workspace.profiles.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, workspace.profiles)
        config = tmp_path / f"{name}.yaml"
        config.write_text(f"output_dir: {workspace.root}\n")
        persona_cluster.recipe_main.__wrapped__(load_experiment(str(config), list(overrides)))
        return workspace

    return run_recipe


def outputs(workspace):
    folder = workspace.root / "personas"
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_last_profile_of_each_user_counts():
    table = pa.table({"user_id": ["b", "a", "b"], "upto_position": [9, 4, 12], "profile": ["early", "only", "late"]})
    users = final_profiles(table)
    assert (users.user_ids, users.texts) == (["a", "b"], ["only", "late"])


def test_users_of_one_taste_share_a_persona(run):
    workspace = run("personas.k=3", rows=profile_rows())
    table = pq.read_table(workspace.personas)
    assert table.column_names == ["user_id", "persona", "distance", "x", "y"]
    assert table["user_id"].to_pylist() == [f"u{user:02}" for user in range(15)]
    assert table["persona"].to_pylist() == [0] * 7 + [1] * 5 + [2] * 3
    assert min(table["distance"].to_pylist()) >= 0


def test_the_elbow_finds_the_tastes_and_the_record_holds_the_whole_range(run):
    workspace = run("personas.k=elbow", "personas.k_max=7", rows=profile_rows())
    record = json.loads(workspace.clustering.read_text())
    assert record["k"] == record["elbow"] == 3
    assert record["rule"] == "elbow"
    assert record["sizes"] == [7, 5, 3]
    assert [row["k"] for row in record["range"]] == [1, 2, 3, 4, 5, 6, 7]
    inertias = [row["inertia"] for row in record["range"]]
    assert inertias == sorted(inertias, reverse=True)
    assert record["range"][0]["silhouette"] is None
    assert all(-1 <= row["silhouette"] <= 1 for row in record["range"][1:])
    assert np.array(record["centres"]).shape == (3, record["embedder"]["dim"])


def test_two_runs_give_equal_bytes(run):
    first, second = (outputs(run("personas.k=3", rows=profile_rows(), name=name)) for name in "ab")
    assert first == second
    assert set(first) == {
        "personas.parquet", "clustering.json", "elbow.png", "embedder/embedder.json",
        "embedder/vocabulary.json", "embedder/idf.npy", "embedder/components.npy",
    }  # fmt: skip


def test_an_earlier_profile_changes_nothing(run):
    rows = profile_rows()
    scrambled = [(user, upto, "canary" if upto == 10 else text) for user, upto, text in rows]
    assert outputs(run(rows=rows, name="a")) == outputs(run(rows=scrambled, name="b"))


def test_a_second_run_does_nothing(run, capsys):
    run(rows=profile_rows())
    before = capsys.readouterr().out
    assert "15 users in 4 personas" in before
    run()
    assert "up to date" in capsys.readouterr().out


def test_new_users_join_the_nearest_persona_without_a_new_fit(run):
    workspace = run("personas.k=3", rows=profile_rows())
    personas, distances = assign_new_users(workspace, ["x", "y"], ["weddings and slapstick", "battles of soldiers"])
    assert personas.tolist() == [2, 0]
    assert (distances >= 0).all()
    old = [text for _, upto, text in profile_rows() if upto == 20]
    table = pq.read_table(workspace.personas)
    personas, distances = assign_new_users(workspace, table["user_id"].to_pylist(), old)
    assert personas.tolist() == table["persona"].to_pylist()
    assert distances.tolist() == table["distance"].to_pylist()


def test_a_new_user_without_a_known_word_is_refused(run):
    workspace = run(rows=profile_rows())
    with pytest.raises(ClusteringError, match="user y: 1 of 2 profiles without a word that the embedder knows"):
        assign_new_users(workspace, ["x", "y"], ["war", "xylophone"])


def test_centres_of_another_fit_are_refused(run):
    here, there = run(rows=profile_rows(), name="a"), run(rows=profile_rows()[4:], name="b")
    here.clustering.write_bytes(there.clustering.read_bytes())
    with pytest.raises(DataError, match="can't be compared"):
        assign_new_users(here, ["x"], ["war"])
    here.clustering.write_text("{}")
    with pytest.raises(DataError, match="no centres of an embedder"):
        assign_new_users(here, ["x"], ["war"])


@pytest.mark.parametrize(
    ("overrides", "rows", "error", "message"),
    [
        (["personas.k=16"], profile_rows(), ClusteringError, "16 personas need at least 16 users, there are 15"),
        (["personas.k=2"], [("a", 1, "same"), ("b", 1, "same")], ClusteringError, "the 2 users have 1"),
        (["personas.k=elbow"], [("a", 1, "war"), ("b", 1, "love")], ClusteringError, "no elbow"),
        ([], [("a", 1, "war"), ("b", 1, "  "), ("c", 1, None)], ClusteringError, "user b, c: 2 of 3 profiles"),
        ([], [], ClusteringError, "no user has a profile"),
        (["personas.embedder=sentence-transformers"], profile_rows(), ConfigError, "embedding.path: no folder"),
        ([], None, MissingInputError, "persona_distill"),
    ],
)  # fmt: skip
def test_what_can_not_be_clustered_is_told_in_a_line_and_leaves_nothing(run, tmp_path, overrides, rows, error, message):
    with pytest.raises(error, match=message) as caught:
        run(*overrides, rows=rows)
    assert len(caught.value.lines) == 1
    assert not (tmp_path / "one" / "personas").exists()


def files_below(workspace):
    return [path for path in workspace.root.rglob("*") if path.is_file()]


def test_profiles_are_embedded_by_a_server_and_each_is_paid_for_once(run, openai_server, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "canary-in-the-key")
    server = openai_server(api_key="canary-in-the-key")
    overrides = ["personas.embedder=openai", f"embedding.base_url={server.base_url}", "personas.k=3"]
    workspace = run(*overrides, rows=profile_rows())
    texts = list(dict.fromkeys(text for _, upto, text in profile_rows() if upto == 20))
    assert [entry["usage"]["prompt_tokens"] for entry in server.billed()] == [sum(len(text) // 4 for text in texts)]
    assert pq.read_table(workspace.personas)["persona"].to_pylist() == [0] * 7 + [1] * 5 + [2] * 3
    first = outputs(workspace)
    assert {"clustering.json", "embedder/embedder.json"} < set(first)

    run(*overrides, "embedding.concurrency=2", "personas.dim=9", "embedding.prices={input: 1}", "embedding.max_usd=1")
    assert "up to date" in capsys.readouterr().out
    (workspace.root / "personas" / "manifest.json").unlink()
    run(*overrides)
    assert outputs(workspace) == first
    assert len(server.billed()) == 1

    run(*overrides, rows=[*profile_rows(), ("u99", 20, "I like the sea and letters, and romance")])
    assert [entry["usage"]["prompt_tokens"] for entry in server.billed()[1:]] == [9]
    assert pq.read_table(workspace.personas)["persona"].to_pylist()[-1] == 1
    assert not [path for path in files_below(workspace) if b"canary-in-the-key" in path.read_bytes()]


def test_the_space_of_a_servers_vectors_is_in_the_record(run, openai_server):
    server = openai_server(dimensions=24)
    address = server.base_url.replace("http://", "http://me:hidden-word@")
    workspace = run("personas.embedder=openai", f"embedding.base_url={address}", "personas.k=3", rows=profile_rows())
    space = json.loads(workspace.clustering.read_text())["embedder"]
    stored = json.loads((workspace.personas.parent / "embedder" / "embedder.json").read_text())
    assert (space["embedder"], space["dim"]) == ("openai", 24)
    assert stored["space"] == space
    assert stored["base_url"] == server.base_url
    settings = json.loads((workspace.root / "personas" / "manifest.json").read_text())["settings"]["personas"]
    assert settings["embedder"] == "openai"
    assert settings["embedding"]["model"] == "text-embedding-ada-002"
    assert not [path for path in files_below(workspace) if b"hidden-word" in path.read_bytes()]


def test_new_users_join_by_a_server_and_only_their_texts_are_paid_for(run, openai_server):
    server = openai_server()
    overrides = ["personas.embedder=openai", f"embedding.base_url={server.base_url}", "personas.k=3"]
    workspace = run(*overrides, rows=profile_rows())
    settings = EmbeddingSettings(ServerSettings("any", server.base_url), workspace.journal(None))
    old = [text for _, upto, text in profile_rows() if upto == 20][-2:]
    personas, _ = assign_new_users(
        workspace, ["x", "y", "z"], ["I like weddings, slapstick and comedy", *old], settings
    )
    assert personas.tolist() == [2, 2, 2]
    assert [entry["usage"]["prompt_tokens"] for entry in server.billed()[1:]] == [9]
    with pytest.raises(ConfigError, match="embedder openai needs a server and a journal"):
        assign_new_users(workspace, ["x"], old[:1])
    with pytest.raises(ClusteringError, match="user x: 1 of 1 profiles without a word"):
        assign_new_users(workspace, ["x"], [" "], settings)


def test_another_recipe_on_the_journal_is_told(run, openai_server, tmp_path):
    server, journal = openai_server(), tmp_path / "elsewhere" / "paid.sqlite"
    overrides = ["personas.embedder=openai", f"embedding.base_url={server.base_url}", f"distill.journal={journal}"]
    with Journal.open(journal), pytest.raises(JournalError, match=r"paid\.sqlite: .* is using it"):
        run(*overrides, rows=profile_rows())
    assert not (tmp_path / "one" / "personas").exists()
    workspace = run(*overrides)
    assert journal.stat().st_size > 0
    assert not workspace.journal(None).exists()


def test_profiles_are_embedded_by_a_model_on_this_machine(run, tmp_path):
    model = write_model(tmp_path / "model")
    overrides = ["personas.embedder=sentence-transformers", f"embedding.path={model}", "personas.k=2"]
    rows = [("a", 1, "war war"), ("b", 1, "war"), ("c", 1, "quiet love"), ("d", 1, "love quiet")]
    workspace = run(*overrides, rows=rows)
    personas = pq.read_table(workspace.personas)["persona"].to_pylist()
    assert personas[0] == personas[1] != personas[2] == personas[3]
    assert json.loads(workspace.clustering.read_text())["embedder"]["dim"] == 16
    assert assign_new_users(workspace, ["x"], ["war war war"])[0].tolist() == personas[:1]

    before = outputs(workspace)
    moved = model.rename(tmp_path / "moved")
    run(*overrides[:1], f"embedding.path={moved}", "personas.k=2")
    assert outputs(workspace) == before
    write_model(tmp_path / "other", seed=1)
    run(*overrides[:1], f"embedding.path={tmp_path / 'other'}", "personas.k=2")
    assert outputs(workspace)["clustering.json"] != before["clustering.json"]


def test_one_user_can_be_one_persona(run):
    workspace = run("personas.k=1", rows=[("a", 3, "war and peace")])
    alone = {"user_id": "a", "persona": 0, "distance": 0.0, "x": 0.0, "y": 0.0}
    assert pq.read_table(workspace.personas).to_pylist() == [alone]
    record = json.loads(workspace.clustering.read_text())
    assert (record["elbow"], record["words"], record["stability"]["mean"]) == (None, {"0": []}, 1.0)
