"""Agents in this process: they say what `persona_eval` wrote, know no more than its prompts, and meet new users."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pipelines import read, rows, run_recipe, without_an_adapter
from safetensors.torch import load_file, save_file

from personas_tune.adapters.base_model import build_on_meta, load_tokenizer
from personas_tune.agents import Agent, ItemText, load_agent
from personas_tune.agents.settings import find_agent
from personas_tune.datasets import RatingDataset, RatingSource
from personas_tune.errors import (
    AdapterError,
    ConfigError,
    DataError,
    DistillError,
    MissingInputError,
    PersonasTuneError,
    PromptError,
)
from personas_tune.workspace import MANIFEST

NEW = ItemText("The Unseen", 1999, ("War",), mean_rating=3.4, n_ratings=12)


@pytest.fixture(scope="module")
def persona(csv_run):
    return load_agent(csv_run.root, "persona")


@pytest.fixture(scope="module")
def other_runs(csv_run, tmp_path_factory):
    """Copies of the run whose samples were made otherwise; nothing else is run again."""
    made = {}

    def make(*overrides):
        if overrides not in made:
            made[overrides] = Path(shutil.copytree(csv_run.root, tmp_path_factory.mktemp("other") / "run"))
            outcome = run_recipe("persona_raft", csv_run.config, f"output_dir={made[overrides]}", *overrides)
            assert outcome.status == 0, outcome.err
        return made[overrides]

    return make


class Listener:
    """Stands for a model: keeps the prompts that it is asked, and answers evenly."""

    def __init__(self):
        self.samples, self.prompts = [], []

    def __call__(self, dataset, assignment, labels):
        self.samples, self.prompts = dataset.samples, [row.prompt for row in dataset.rows]
        return np.full((len(dataset), len(labels)), 1 / len(labels))


def listening(root, name="base", **options):
    """An agent without a model, and what it hears."""
    settings, listener = find_agent(root, name), Listener()
    sections = settings.base_sections
    tokenizer = load_tokenizer(sections["tokenizer"], build_on_meta(sections["model"], "fp32"))
    return Agent(settings, tokenizer, None, listener, **options), listener, tokenizer


def prompts_of(root, tokenizer, split, memories="both"):
    source = RatingSource(root)
    samples = source.samples(split)
    return samples, [row.prompt for row in RatingDataset(tokenizer, source, samples, memories).rows]


@pytest.mark.parametrize("name", ["base", "single", "persona", "persona_generate"])
def test_an_agent_says_what_persona_eval_wrote(csv_run, name):
    agent = load_agent(csv_run.root, name)
    by_user = {}
    for row in rows(csv_run.root, f"eval/predictions_{name}"):
        by_user.setdefault(row["user_id"], []).append(row)
    pairs = [(user, [row["item_id"] for row in each]) for user, each in by_user.items()]
    for ratings, (user, each) in zip(agent.rate_many(pairs), by_user.items(), strict=True):
        p = np.array([row["p"] for row in each])
        np.testing.assert_allclose(ratings.p, p, atol=1e-6)
        np.testing.assert_allclose(agent.rate(user, [each[0]["item_id"]]).p, p[:1], atol=1e-6)
        np.testing.assert_allclose(ratings.expected, [row["expected"] for row in each], atol=1e-5)
        assert ratings.most_likely.tolist() == [row["argmax"] for row in each]
        assert (ratings.user_id, ratings.items) == (user, tuple(row["item_id"] for row in each))


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("retrieval.k=3", "retrieval.before_target=false", "retrieval.min_similarity=0.1"),
        ("retrieval.query=user_and_item", "prompt.profile=before_target"),
        ("retrieval.neighbours=4",),
        ("retrieval.neighbours=4", "retrieval.before_target=false", "retrieval.k=0"),
    ],
    ids=lambda overrides: " ".join(overrides) or "as it was",
)
def test_test_prompts_are_those_of_the_samples_token_for_token(csv_run, other_runs, overrides):
    root = other_runs(*overrides)
    agent, listener, tokenizer = listening(root)
    samples, prompts = prompts_of(root, tokenizer, "test")
    by_user = {}
    for sample in samples:
        by_user.setdefault(sample.user_id, []).append(sample.item_id)
    agent.rate_many(list(by_user.items()))
    assert listener.prompts == prompts
    assert [sample.memory_positions for sample in listener.samples] == [sample.memory_positions for sample in samples]
    if "retrieval.k=0" not in overrides:
        assert any(sample.memory_positions for sample in samples)


RAFT = ("retrieval.k=3", "retrieval.before_target=false", "retrieval.min_similarity=0.1")


@pytest.mark.parametrize("overrides", [RAFT, (*RAFT, "retrieval.neighbours=4")], ids=["memories", "neighbours"])
def test_what_a_user_said_of_an_item_is_not_shown_when_that_item_is_asked_for(other_runs, overrides):
    root = other_runs(*overrides)
    agent, listener, tokenizer = listening(root)
    samples, prompts = prompts_of(root, tokenizer, "train")
    for sample, prompt in zip(samples, prompts, strict=True):
        agent.rate(sample.user_id, [sample.item_id])
        assert listener.prompts == [prompt]


def test_nor_when_it_is_given_by_its_title_and_year(other_runs):
    root = other_runs(*RAFT)
    agent, listener, tokenizer = listening(root)
    samples, prompts = prompts_of(root, tokenizer, "train")
    source = RatingSource(root)
    for sample, prompt in zip(samples, prompts, strict=True):
        item = source.items[sample.item_id]
        agent.rate(sample.user_id, [item, ItemText(f" {item.title.upper()} ", item.year)])
        assert listener.prompts[0] == prompt
        assert all(sample.position not in asked.memory_positions for asked in listener.samples)
    met = agent.meet([(NEW, 5), (agent.items[0], 2)])
    agent.rate(met, [NEW, replace(NEW, mean_rating=3.1), replace(NEW, year=2001)])
    assert [0 in asked.memory_positions for asked in listener.samples] == [False, False, True]
    with pytest.raises(DataError, match="rated twice"):
        agent.meet([(NEW, 5), (replace(NEW, mean_rating=3.1), 4)])
    with pytest.raises(DataError, match="rated twice"):
        agent.meet([(agent.items[0], 5), (source.items[agent.items[0]], 4)])


@pytest.mark.parametrize("overrides", [(), ("retrieval.neighbours=4",)], ids=str)
def test_no_prompt_knows_a_test_rating(other_runs, tmp_path, overrides):
    root = Path(shutil.copytree(other_runs(*overrides), tmp_path / "run"))
    agent, listener, _ = listening(root)
    test = rows(root, "samples/test")
    pairs = [(row["user_id"], [row["item_id"], NEW]) for row in test]
    agent.rate_many(pairs)
    before = listener.prompts
    for path in ("samples/test", "data/interactions"):
        table = read(root, path)
        is_test = (
            [True] * len(table) if path.startswith("samples") else [s == "test" for s in table["split"].to_pylist()]
        )
        changed = [0.5 if t else r for t, r in zip(is_test, table["rating"].to_pylist(), strict=True)]
        at = table.column_names.index("rating")
        pq.write_table(table.set_column(at, "rating", pa.array(changed)), root / f"{path}.parquet")
    agent, listener, _ = listening(root)
    agent.rate_many(pairs)
    assert listener.prompts == before


@pytest.mark.parametrize("overrides", [(), ("retrieval.query=user_and_item", "prompt.profile=before_target")], ids=str)
def test_a_new_user_with_a_cohort_users_ratings_is_that_user(csv_run, other_runs, overrides):
    root = other_runs(*overrides)
    agent, listener, tokenizer = listening(root)
    samples, prompts = prompts_of(root, tokenizer, "test")
    tiers = {
        row["user_id"]: tuple(row[f"{trait}_tier"] for trait in ("activity", "conformity", "diversity"))
        for row in rows(root, "data/users")
    }
    personas = {row["user_id"]: row for row in rows(root, "personas/personas")}
    for user in sorted(tiers):
        own = [row for row in rows(root, "samples/train") if row["user_id"] == user]
        met = agent.meet([(row["item_id"], row["rating"]) for row in own], tiers=tiers[user])
        assert met.persona == personas[user]["persona"]
        assert met.distance == pytest.approx(personas[user]["distance"], abs=1e-6)
        texts = [row["memory"] for row in rows(root, "memory/memories") if row["user_id"] == user]
        assert list(met.memories) == texts
        agent.rate(met, [sample.item_id for sample in samples if sample.user_id == user])
        assert listener.prompts == [p for p, s in zip(prompts, samples, strict=True) if s.user_id == user]


def test_a_new_users_neighbours_are_found_by_the_given_ratings(other_runs):
    root = other_runs("retrieval.neighbours=4")
    agent, listener, _ = listening(root)
    cohort = rows(root, "samples/test")[0]
    agent.rate(cohort["user_id"], [cohort["item_id"]])
    before = listener.prompts
    items = agent.items
    high = agent.meet([(item, 5) for item in items[:6]])
    low = agent.meet([(item, 1) for item in items[:6]])
    agent.rate_many([(high, [items[8]]), (low, [items[8]]), (high, [NEW])])
    said = [sample.neighbours for sample in listener.samples]
    assert said[0].rating > said[1].rating + 1
    assert said[2].n == 0
    agent.rate(cohort["user_id"], [cohort["item_id"]])
    assert listener.prompts == before
    with pytest.raises(DataError, match="no rating to find like-minded users by; give one or more"):
        agent.meet(profile="I like War films.")


def test_a_new_user_gets_the_adapter_of_the_nearest_persona(persona, csv_run):
    users = rows(csv_run.root, "personas/personas")
    items = persona.items[:3]
    for number in sorted({row["persona"] for row in users}):
        central = min((row for row in users if row["persona"] == number), key=lambda row: row["distance"])["user_id"]
        profile = [row for row in rows(csv_run.root, "memory/profiles") if row["user_id"] == central][-1]["profile"]
        met = persona.meet(profile=profile)
        assert met.persona == number
        assert met.adapter == f"persona/{number}"
    assert persona.rate(met, items).p.shape == (3, len(persona.labels))
    single = load_agent(csv_run.root, "single")
    assert single.meet(profile=profile).adapter == "single/all"
    assert listening(csv_run.root)[0].meet(profile=profile).adapter is None


def test_new_items_stand_in_prompts_as_they_are_given(csv_run):
    agent, listener, tokenizer = listening(csv_run.root)
    user = agent.users[0]
    known = agent.items[0]
    same = RatingSource(csv_run.root).items[known]
    ratings = agent.rate(user, [known, same, NEW, replace(NEW, year=2001), NEW])
    assert ratings.items == (known, same.title, "The Unseen", "The Unseen", "The Unseen")
    assert listener.prompts[2] == listener.prompts[4] != listener.prompts[3]
    assert "The Unseen (1999). War. Others give it 3.40" in tokenizer.decode(listener.prompts[2])
    assert listener.prompts[0] == listener.prompts[1]
    assert len(agent.items) == len(rows(csv_run.root, "data/items"))


def test_one_users_prefix_is_read_once(persona):
    read_tokens = []
    model = persona._score.args[0].model
    hook = model.tok_embeddings.register_forward_hook(lambda _, args, __: read_tokens.append(args[0].numel()))
    user, items = persona.users[0], persona.items[:12]
    try:
        together = persona.rate(user, items)
        n_together = sum(read_tokens)
        read_tokens.clear()
        alone = np.concatenate([persona.rate(user, [item]).p for item in items])
        n_alone = sum(read_tokens)
    finally:
        hook.remove()
    np.testing.assert_allclose(together.p, alone, atol=1e-6)
    dataset, labels = [], persona.labels
    persona_score, persona._score = persona._score, lambda *asked: dataset.append(asked[0]) or persona_score(*asked)
    try:
        persona.rate(user, items)
    finally:
        persona._score = persona_score
    prompts = [row.prompt for row in dataset[0].rows]
    n_shared = next(i for i in range(len(prompts[0])) if len({prompt[i] for prompt in prompts}) > 1)
    answers = sum(len(persona._tokenizer.answer_tokens(label)) for label in labels)
    longest = max(map(len, prompts))
    assert n_together <= n_shared + len(items) * (longest - n_shared + answers)
    assert n_together < n_alone / 2


def test_bounds_on_memory_change_no_answer(csv_run, persona):
    small = load_agent(csv_run.root, "persona", max_tokens_per_forward=64, device="cpu", dtype="fp32")
    pairs = [(user, persona.items[:4]) for user in persona.users[:3]]
    for one, other in zip(small.rate_many(pairs), persona.rate_many(pairs), strict=True):
        np.testing.assert_allclose(one.p, other.p, atol=1e-6)


def test_a_config_stands_for_its_folder(csv_run, persona):
    user, items = persona.users[0], persona.items[:2]
    of_config = load_agent(csv_run.config, "persona")
    assert np.array_equal(of_config.rate(user, items).p, persona.rate(user, items).p)
    assert of_config.name == "persona"


def test_nothing_asked_is_nothing_answered(persona):
    assert persona.rate_many([]) == []
    assert persona.rate(persona.users[0], []).p.shape == (0, len(persona.labels))


def test_an_agent_added_at_evaluation_is_found_and_settings_of_training_are_kept(csv_run, tmp_path):
    root = Path(shutil.copytree(csv_run.root, tmp_path / "run"))
    outcome = run_recipe(
        "persona_eval", csv_run.config, f"output_dir={root}", "agents={brief: {adapters: persona, memories: short}}"
    )
    assert outcome.status == 0, outcome.err
    agent = load_agent(root, "brief")
    row = rows(root, "eval/predictions_brief")[0]
    np.testing.assert_allclose(agent.rate(row["user_id"], [row["item_id"]]).p[0], row["p"], atol=1e-6)
    with pytest.raises(ConfigError, match=r"model.lora_alpha is 16, its adapters were trained with 8"):
        load_agent(root, "brief", overrides=["model.lora_alpha=16"])


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "overrides", "kind", "words"),
    [
        ("persna", (), ConfigError, "no agent 'persna'; did you mean persona?"),
        ("zzz", (), ConfigError, "no agent 'zzz'; agents: base, persona, persona_generate, single"),
        (
            "persona",
            ("agents.persona.calibrate=true",),
            MissingInputError,
            "hasn't been calibrated; run `tune run persona",
        ),
        (None, (), ConfigError, "no agent None"),
        ("persona", "device=cpu", ConfigError, "overrides is no list"),
        ("persona", ("agents.persona.adapters=persna",), ConfigError, "no adapter set 'persna'"),
        ("persona", ("device=warp",), ConfigError, "unknown device 'warp'"),
    ],
)
def test_mistaken_agents_are_told_in_one_line(csv_run, name, overrides, kind, words):
    with pytest.raises(kind) as error:
        load_agent(csv_run.root, name, overrides=overrides)
    assert words in one_line(error)


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ("torchtune_config.yaml", "no trained experiment in this folder"),
        ("samples", "run `tune run persona_raft --config ...` first"),
        ("adapters/persona/manifest.json", "run `tune run persona_lora --config ...` first"),
        ("memory/profiles.parquet", "run `tune run persona_distill --config ...` first"),
    ],
)
def test_a_missing_stage_is_named(csv_run, copy_of, gone, words):
    root = copy_of(csv_run)
    shutil.rmtree(root / gone) if (root / gone).is_dir() else (root / gone).unlink()
    with pytest.raises(PersonasTuneError) as error:
        load_agent(root, "persona")
    assert words in str(error.value)


def test_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(MissingInputError, match="no such folder"):
        load_agent(tmp_path / "runs" / "quickstrat", "persona")
    with pytest.raises(ConfigError, match=r"did you mean quickstart.yaml"):
        load_agent("quikstart.yaml", "persona")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"max_tokens_per_forward": 0}, "evaluation.max_tokens_per_forward"),
        ({"dtype": "fp8"}, "dtype"),
        ({"dtype": "fp16"}, "dtype"),
        ({"device": "warp"}, "unknown device 'warp'"),
    ],
    ids=str,
)
def test_mistaken_arguments_are_told_in_one_line(csv_run, given, words):
    with pytest.raises(ConfigError) as error:
        load_agent(csv_run.root, "persona", **given)
    assert words in one_line(error)


def test_mistaken_users_items_and_ratings_are_told_in_one_line(persona, csv_run):
    user, item = persona.users[0], persona.items[0]

    def rate(*items):
        return lambda: persona.rate(user, items)

    def meet(*ratings, **given):
        return lambda: persona.meet(ratings, **given)

    bad = "lone \ud800"
    cases = [
        (lambda: persona.rate(user[:-1], [item]), DataError, f"no user '{user[:-1]}'"),
        (lambda: persona.rate([user], [item]), DataError, f"no user ['{user}']"),
        (lambda: persona.rate(7, [item]), DataError, "no user 7"),
        (lambda: persona.rate(user, item), DataError, "it is no list; give a list of items"),
        (lambda: persona.rate(user, NEW), DataError, "it is no list; give a list of items"),
        (lambda: persona.rate_many([user, item]), DataError, "it is no pair; give [(user, items), ...]"),
        (rate("earl00"), DataError, "no item 'earl00'"),
        (rate({"title": "A"}), DataError, "no item {'title': 'A'}"),
        (rate([item]), DataError, f"no item ['{item}']"),
        (rate(None), DataError, "no item None"),
        (rate(ItemText("")), DataError, "an item without a title"),
        (rate(ItemText(None)), DataError, "an item without a title"),
        (rate(ItemText(bad)), DataError, "can't be encoded"),
        (rate(ItemText("A", genres=["War"])), DataError, "genres is no tuple"),
        (rate(ItemText("A", genres=(1,))), DataError, "genres: 1 is no text"),
        (rate(ItemText("A", cast=(bad,))), DataError, "can't be encoded"),
        (rate(ItemText("A", summary=3)), DataError, "summary: 3 is no text"),
        (rate(ItemText("A", year="1999")), DataError, "year is '1999'"),
        (rate(ItemText("A", n_ratings=-1)), DataError, "n_ratings is -1"),
        (rate(ItemText("A", n_ratings=None)), DataError, "n_ratings is None"),
        (rate(ItemText("A", mean_rating=float("nan"))), DataError, "mean_rating is nan"),
        (rate(ItemText("A", mean_rating="3")), DataError, "mean_rating is '3'; give a number from 0.5 to 5"),
        (rate(ItemText("A", mean_rating=300.0)), DataError, "mean_rating is 300.0"),
        (meet((item, 7)), PromptError, "ratings: rating 7 has no label; the scale's labels are 0.5, 1"),
        (meet((item, "5")), DataError, "rating '5' is no number"),
        (meet((item, float("nan"))), DataError, "rating nan is no number"),
        (meet((item, None)), DataError, "rating None is no number"),
        (meet(item, 5), DataError, "it is no pair; give [(item, rating), ...]"),
        (meet((item, 3), (item, 4)), DataError, "rated twice"),
        (meet(), DataError, "nothing is known of the user; give a few, or profile=..."),
        (meet((item, 3), memories=[]), DistillError, "0 memories of 1 ratings"),
        (meet((item, 3), memories="x"), DataError, "memories is no list"),
        (meet((item, 3), memories=[None]), DataError, "None is no text"),
        (meet((item, 3), memories=[bad]), DataError, "can't be encoded"),
        (meet((item, 3), profile=" "), DataError, "' ' is no text"),
        (meet(profile=5), DataError, "5 is no text"),
        (meet(profile="zzzz"), PersonasTuneError, "without a word that the embedder knows"),
        *((meet((item, 3), tiers=tiers), DataError, "each 1, 2 or 3")
          for tiers in ((0, 9, 7), (1, 2), (1.0, 2.0, "x"), "123", None)),
    ]  # fmt: skip
    n_users = len(persona.users)
    for call, kind, words in cases:
        with pytest.raises(kind) as error:
            call()
        assert words in one_line(error)
    assert len(persona.users) == n_users
    with pytest.raises(DataError, match="did you mean u"):
        persona.rate(f"{user[:-1]}x", [item])
    foreign = listening(csv_run.root)[0].meet(profile="I like War films.")
    with pytest.raises(DataError, match="hasn't met the user"):
        persona.rate(foreign, [item])


def test_what_can_be_read_once_only_is_read_once(persona):
    user, items = persona.users[0], persona.items[:2]
    once = persona.rate(user, (item for item in items))
    assert once.items == tuple(items)
    assert np.array_equal(once.p, persona.rate(user, items).p)
    (same,) = persona.rate_many(pair for pair in [(user, iter(items))])
    assert np.array_equal(same.p, once.p)
    assert persona.meet(pair for pair in [(items[0], np.float32(4))]).memories


def test_prompts_are_written_in_portions_that_change_no_answer(csv_run, monkeypatch):
    agent, listener, _ = listening(csv_run.root)
    pairs = [(user, agent.items[:5]) for user in agent.users[:3]]
    agent.rate_many(pairs)
    prompts, heard = listener.prompts, []
    monkeypatch.setattr("personas_tune.agents.agent.ROWS_AT_ONCE", 4)
    score = agent._score
    monkeypatch.setattr(
        agent, "_score", lambda *asked: heard.append([r.prompt for r in asked[0].rows]) or score(*asked)
    )
    assert [ratings.p.shape for ratings in agent.rate_many(pairs)] == [(5, len(agent.labels))] * 3
    assert [len(portion) for portion in heard] == [4, 4, 4, 3]
    assert [prompt for portion in heard for prompt in portion] == prompts


def test_a_calibrated_agent_says_what_persona_eval_wrote(csv_run, copy_of):
    root = copy_of(csv_run)
    agents = ("agents.mended={adapters: persona, calibrate: true}", "evaluation.calibration_share=0.5")
    outcome = run_recipe("persona_eval", csv_run.config, f"output_dir={root}", *agents)
    assert outcome.status == 0, outcome.err
    agent, own = load_agent(root, "mended"), load_agent(root, "persona")
    by_user = {}
    for row in rows(root, "eval/predictions_mended"):
        by_user.setdefault(row["user_id"], []).append(row)
    for user, each in by_user.items():
        items = [row["item_id"] for row in each]
        np.testing.assert_allclose(agent.rate(user, items).p, [row["p"] for row in each], atol=1e-6)
        assert np.abs(agent.rate(user, items).p - own.rate(user, items).p).max() > 0.01
    assert agent.rate(user, []).p.shape == (0, len(agent.labels))
    with pytest.raises(DataError, match=r"calibrated with memories None, which is 'short' now; run .* persona_eval"):
        load_agent(root, "mended", overrides=["agents.mended.memories=short"])
    kept = root / "eval" / "calibration_mended.json"
    record = json.loads(kept.read_text())
    kept.write_text(json.dumps({**record, "labels": [1, 2]}))
    with pytest.raises(DataError, match="of other labels"):
        load_agent(root, "mended")
    kept.write_text(json.dumps(record))
    manifest = root / "adapters" / "persona" / MANIFEST
    manifest.write_text(manifest.read_text() + "\n")
    with pytest.raises(DataError, match="calibrated before its adapters were trained"):
        load_agent(root, "mended")
    kept.unlink()
    with pytest.raises(MissingInputError, match=r"hasn't been calibrated; run `tune run persona_eval"):
        load_agent(root, "mended")


def test_adapters_of_another_clustering_are_given_to_no_new_user(csv_run, copy_of):
    root = copy_of(csv_run)
    path = root / "personas" / "personas.parquet"
    table = pq.read_table(path)
    other = pa.array([1 - persona for persona in table["persona"].to_pylist()], pa.int32())
    pq.write_table(table.set_column(table.column_names.index("persona"), "persona", other), path)
    agent = load_agent(root, "persona")
    with pytest.raises(
        AdapterError, match=r"adapter set persona was trained on another clustering; run .*persona_lora"
    ):
        agent.meet([(agent.items[0], 5)])
    assert agent.rate(agent.users[0], agent.items[:1]).p.shape == (1, len(agent.labels))
    assert load_agent(root, "single").meet([(agent.items[0], 5)]).adapter == "single/all"


def test_a_user_without_an_adapter_is_told(csv_run, copy_of):
    root = copy_of(csv_run)
    without_an_adapter(root)
    with pytest.raises(AdapterError) as error:
        load_agent(root, "persona")
    assert (
        f"no adapter for user {min(rows(root, 'samples/test'), key=lambda row: row['user_id'])['user_id']}"
        in one_line(error)
    )


def test_another_bases_weights_are_refused(csv_run, tiny_checkpoint, tmp_path):
    other = Path(shutil.copytree(tiny_checkpoint, tmp_path / "base"))
    elsewhere = [f"checkpointer.checkpoint_dir={other}"]
    assert load_agent(csv_run.root, "persona", overrides=elsewhere).name == "persona"
    weights = load_file(other / "model.safetensors")
    save_file({name: weight * 1.01 for name, weight in weights.items()}, other / "model.safetensors")
    with pytest.raises(AdapterError, match=r"trained on another base: its model\.safetensors was not this one"):
        load_agent(csv_run.root, "persona", overrides=elsewhere)
    assert load_agent(csv_run.root, "base", overrides=elsewhere).name == "base"


@pytest.mark.parametrize("text", ["{}", "[]", '{"settings": {}}', '{"settings": 3}', "null"])
@pytest.mark.parametrize("stage", ["samples", "personas", "memory", "eval", "adapters/persona"])
def test_records_that_lack_something_are_told_in_one_line(csv_run, copy_of, stage, text):
    root = copy_of(csv_run)
    (root / stage / MANIFEST).write_text(text)
    if (stage, text) == ("eval", '{"settings": {}}'):  # what was trained with counts
        assert load_agent(root, "persona").name == "persona"
        return

    def meet():
        agent = listening(root, "persona" if stage.startswith("adapters") else "base")[0]
        agent.meet([(agent.items[0], 5)])

    with pytest.raises(DataError) as error:
        meet()
    assert f"{stage}/{MANIFEST}: no " in one_line(error)


def test_texts_that_a_language_model_wrote_are_not_imitated_unasked(csv_run, copy_of):
    root = copy_of(csv_run)
    manifest = root / "memory" / MANIFEST
    record = json.loads(manifest.read_text())
    record["settings"]["distill"]["distiller"] = "openai"
    manifest.write_text(json.dumps(record))
    agent, listener, _ = listening(root)
    ratings = [(item, 4) for item in agent.items[:2]]
    with pytest.raises(DistillError, match=r"written by openai, which isn't called for a new user"):
        agent.meet(ratings)
    given = agent.meet(ratings, profile="I like War films.", memories=["Good.", "Better."])
    assert (given.profile, given.memories) == ("I like War films.", ("Good.", "Better."))
    agent.rate(given, agent.items[2:5])
    assert any(sample.memory_positions for sample in listener.samples)
    assert len(agent.meet(ratings, by_template=True).memories) == 2


def test_paid_embedders_are_not_called_unasked(csv_run, copy_of):
    root = copy_of(csv_run)
    for stage, section in (("samples", "retrieval"), ("personas", "personas")):
        manifest = root / stage / MANIFEST
        record = json.loads(manifest.read_text())
        record["settings"][section]["embedder"] = "openai"
        manifest.write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=r"retrieval.embedder=openai: embedding what the journal doesn't know"):
        listening(root)
    agent, _, _ = listening(root, "single")  # shows profiles only
    with pytest.raises(ConfigError, match=r"personas.embedder=openai"):
        agent.meet(profile="I like War films.")
    listening(root, allow_paid_calls=True)  # nothing is embedded yet; the stored embedder is lsa after all


def test_new_users_have_no_place_in_a_shuffled_set(world_run):
    agent = load_agent(world_run.root, "shuffled")
    with pytest.raises(AdapterError, match="deals users out at random"):
        agent.meet(profile="I like War films.", by_template=True)
