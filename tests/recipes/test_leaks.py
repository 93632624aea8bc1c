"""Nothing of a test rating, and nothing that only test rows know, reaches what is learnt from or fitted.

Every experiment here is made twice, as it is and spoiled: in the spoiled one every rating behind the cut is
another, every such time is later, and the items that occur behind the cut only carry words that occur nowhere
else. Whatever a train prompt is made of must be the same in both, byte for byte.
"""

import copy
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pipelines import PREPARATION, SmallLog, csv_experiment, read, rows, run_to_the_end, small_log, write_yaml

from personas_tune.datasets import RatingSource
from personas_tune.evaluation.baselines import fit_baselines
from personas_tune.prompts.render import render_prompt

CANARY = "zyzzyvax"
HONEST_AVERAGES = ("outside", "train", "none")


def spoil_ratings(log: SmallLog, user_ids: set[str]) -> SmallLog:
    """Another rating and a later time for every row behind these users' cut, in the same order."""
    spoiled = copy.deepcopy(log)
    for row in spoiled.rows_to_predict(user_ids):
        row["rating"] = 5.5 - row["rating"]
        row["timestamp"] += 500_000
    return spoiled


def plant_canaries(log: SmallLog) -> SmallLog:
    """Words that occur nowhere else, in all that is known of the late items."""
    spoiled = copy.deepcopy(log)
    for item in spoiled.late_items:
        item.update(
            title=f"{CANARY}title",
            year=2031,
            genres=f"{CANARY}genre|{CANARY}kind",
            summary=f"The {CANARY}word of the {CANARY}tale",
            cast=f"{CANARY}name",
        )
    return spoiled


def make(folder: Path, log: SmallLog, *overrides: str) -> Path:
    """Run everything before the training on a log; give the experiment's folder."""
    log.write(folder)
    config = write_yaml(folder / "experiment.yaml", csv_experiment(folder, checkpoint=folder / "none"))
    return run_to_the_end(config, PREPARATION, "personas.k_max=3", *overrides).root


def cohort_of(log: SmallLog, folder: Path) -> set[str]:
    """The users whom the seed draws: known only after a first run."""
    return {row["user_id"] for row in rows(make(folder, log, "stages=[persona_prepare]"), "data/users")}


def learnt_from(root: Path) -> dict[str, bytes]:
    """Every file that is fitted on the log or shown to a model in training."""
    names = [
        path
        for stage in ("memory", "personas", "samples")
        for path in (root / stage).rglob("*")
        if path.is_file() and path.name != "manifest.json" and path != root / "samples" / "test.parquet"
    ]
    names += [root / "data" / "users.parquet", root / "data" / "outside.parquet"]
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(names)}


def words_in(root: Path) -> str:
    """All text of the files that :func:`learnt_from` names, tables unpacked."""
    texts = []
    for name, content in learnt_from(root).items():
        if name.endswith(".parquet"):
            texts.append(json.dumps(rows(root, name.removesuffix(".parquet"))))
        else:
            texts.append(content.decode("utf-8", errors="ignore"))
    return "\n".join(texts)


def prompts(root: Path, split: str) -> list[str]:
    """What an agent with all memories reads, a text a sample."""
    source = RatingSource(root)
    return [
        "\n".join(message["content"] for message in render_prompt(source.template, source.parts(sample, "both")))
        for sample in source.samples(split)
    ]


def averages(root: Path) -> dict[str, tuple[float | None, int]]:
    return {row["item_id"]: (row["mean_rating"], row["n_ratings"]) for row in rows(root, "data/items")}


def train_rows(root: Path) -> list[dict]:
    return [row for row in rows(root, "data/interactions") if row["split"] == "train"]


def assert_memories_are_of_other_train_rows(root: Path, *, before_target: bool) -> None:
    learnt = {(row["user_id"], row["position"]) for row in train_rows(root)}
    samples = [*rows(root, "samples/train"), *rows(root, "samples/test")]
    assert any(sample["memory_positions"] for sample in samples)
    for sample in samples:
        seen = sample["memory_positions"]
        assert sample["position"] not in seen
        assert all((sample["user_id"], position) in learnt for position in seen)
        assert not before_target or all(position < sample["position"] for position in seen)


@st.composite
def experiments(draw) -> tuple[SmallLog, list[str]]:
    """A random log and honest settings."""
    log = small_log(seed=draw(st.integers(0, 10_000)), n_users=draw(st.integers(9, 16)))
    return log, [
        f"seed={draw(st.integers(0, 99))}",
        f"data.historical_average={draw(st.sampled_from(HONEST_AVERAGES))}",
        f"data.split.test_rows={draw(st.sampled_from(['null', '20']))}",
        f"retrieval.query={draw(st.sampled_from(['item', 'user_and_item']))}",
        f"retrieval.k={draw(st.integers(1, 3))}",
        f"retrieval.before_target={draw(st.booleans())}",
        f"prompt.profile={draw(st.sampled_from(['final', 'before_target']))}",
        f"personas.k={draw(st.integers(1, 3))}",
    ]


@settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # a log is its seed: nothing to shrink
    suppress_health_check=[HealthCheck.too_slow],
)
@given(experiments())
def test_nothing_behind_the_cut_is_learnt_from_and_no_sample_sees_its_own_memory(
    experiment: tuple[SmallLog, list[str]],
) -> None:
    log, overrides = experiment
    with tempfile.TemporaryDirectory() as folder:
        clean = make(Path(folder) / "clean", log, *overrides)
        cohort = {row["user_id"] for row in rows(clean, "data/users")}
        spoiled = make(Path(folder) / "spoiled", plant_canaries(spoil_ratings(log, cohort)), *overrides)

        assert learnt_from(spoiled) == learnt_from(clean)
        assert prompts(spoiled, "train") == prompts(clean, "train")
        assert train_rows(spoiled) == train_rows(clean)
        assert averages(spoiled) == averages(clean)
        assert CANARY not in words_in(spoiled)
        assert not any(CANARY in prompt for prompt in prompts(spoiled, "train"))
        # They were there to be found.
        late = [row for row in rows(spoiled, "samples/test") if row["item_id"].startswith("late")]
        assert sum(f"{CANARY}title" in prompt for prompt in prompts(spoiled, "test")) == len(late) > 0
        assert_memories_are_of_other_train_rows(clean, before_target="retrieval.before_target=True" in overrides)


@pytest.fixture(scope="module")
def log() -> SmallLog:
    return small_log(seed=5, n_users=14)


@pytest.fixture(scope="module")
def cohort(log: SmallLog, tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    return cohort_of(log, tmp_path_factory.mktemp("cohort"))


@pytest.mark.parametrize("average", HONEST_AVERAGES)
def test_changing_every_test_rating_changes_no_byte_but_the_test_rows(log, cohort, average, tmp_path) -> None:
    override = f"data.historical_average={average}"
    clean = make(tmp_path / "clean", log, override)
    spoiled = make(tmp_path / "spoiled", spoil_ratings(log, cohort), override)
    assert (spoiled / "data" / "items.parquet").read_bytes() == (clean / "data" / "items.parquet").read_bytes()
    assert learnt_from(spoiled) == learnt_from(clean)
    for split in ("train", "test"):
        assert prompts(spoiled, split) == prompts(clean, split)
    ratings = [[row["rating"] for row in rows(root, "samples/test")] for root in (clean, spoiled)]
    assert all(one != other for one, other in zip(*ratings, strict=True))


def test_with_the_average_of_all_every_test_rating_leaks_as_the_setting_says(log, cohort, tmp_path) -> None:
    clean = make(tmp_path / "clean", log, "data.historical_average=all")
    spoiled = make(tmp_path / "spoiled", spoil_ratings(log, cohort), "data.historical_average=all")
    tested = {row["item_id"] for row in rows(clean, "samples/test")}
    sums = [
        {item: mean * n for item, (mean, n) in averages(root).items() if mean is not None} for root in (clean, spoiled)
    ]
    changes = {}
    for before, after in zip(rows(clean, "samples/test"), rows(spoiled, "samples/test"), strict=True):
        changes[before["item_id"]] = changes.get(before["item_id"], 0) + after["rating"] - before["rating"]
    for item in tested:
        assert sums[1][item] - sums[0][item] == pytest.approx(changes[item], abs=1e-9)
    assert sum(change != 0 for change in changes.values()) > len(tested) / 2
    assert prompts(spoiled, "train") != prompts(clean, "train")
    assert learnt_from(spoiled) != learnt_from(clean)


def test_with_traits_of_all_the_genres_of_test_rows_reach_the_users_as_the_setting_says(log, tmp_path) -> None:
    clean = make(tmp_path / "clean", log, "data.traits=all")
    spoiled = make(tmp_path / "spoiled", plant_canaries(log), "data.traits=all")
    assert rows(spoiled, "data/users") != rows(clean, "data/users")


def test_under_a_global_time_cut_nothing_behind_it_leaks_either(log, cohort, tmp_path) -> None:
    """All users live at one time here, so that the cut falls inside every history."""
    at_once = copy.deepcopy(log)
    for user_id in {row["user_id"] for row in at_once.ratings}:
        mine = [row for row in at_once.ratings if row["user_id"] == user_id]
        for position, row in enumerate(mine):
            row["timestamp"] = 1000 + int(1000 * position / len(mine))
    override = "data.split.by=global_time"
    clean = make(tmp_path / "clean", at_once, override)
    behind = {(row["user_id"], row["item_id"]) for row in rows(clean, "data/interactions") if row["split"] == "test"}
    assert {row["user_id"] for row in rows(clean, "data/users")} == cohort
    spoiled_log = copy.deepcopy(at_once)
    for row in spoiled_log.ratings:
        if (row["user_id"], row["item_id"]) in behind:
            row.update(rating=5.5 - row["rating"], timestamp=row["timestamp"] + 10)
    spoiled = make(tmp_path / "spoiled", plant_canaries(spoiled_log), override)
    assert learnt_from(spoiled) == learnt_from(clean)
    assert prompts(spoiled, "train") == prompts(clean, "train")
    assert averages(spoiled) == averages(clean)
    assert CANARY not in words_in(spoiled)


def test_no_baseline_reads_a_test_rating(log, cohort, tmp_path) -> None:
    predicted = []
    for name, changed in (("clean", log), ("spoiled", spoil_ratings(log, cohort))):
        root = make(tmp_path / name, changed)
        labels = [float(label) for label in RatingSource(root).labels]
        interactions = read(root, "data/interactions")
        train = interactions.filter(np.array(interactions["split"].to_pylist()) == "train")
        tables = [read(root, table) for table in ("data/outside", "samples/test", "data/items", "data/users")]
        outside, test, items, users = tables
        baselines = fit_baselines(
            train, outside, test, items, users, read(root, "samples/train"),
            labels=labels, historical_average="outside", seed=0,
        )  # fmt: skip
        predicted.append({key: (baseline.predicted.tolist(), baseline.tuned) for key, baseline in baselines.items()})
    assert predicted[0] == predicted[1]


def test_with_before_target_a_prompt_shows_no_rating_of_its_own_position_or_later(log, cohort, tmp_path) -> None:
    """Within train: the last ratings before the cut may shape nothing that a sample before them is shown.

    Only the tiers of the traits, which are measured on the whole train part, may still differ.
    """
    overrides = ["prompt.profile=before_target", "retrieval.before_target=true", "distill.batch_size=2"]
    clean = make(tmp_path / "clean", log, *overrides)
    first_changed = {row["user_id"]: max(1, row["n_train"] - 4) for row in rows(clean, "data/users")}
    changed = copy.deepcopy(log)
    for user_id in cohort:
        mine = [row for row in changed.ratings if row["user_id"] == user_id]
        for row in mine[first_changed[user_id] :]:
            row["rating"] = 5.5 - row["rating"]
    spoiled = make(tmp_path / "spoiled", changed, *overrides)

    def shown(root: Path) -> list[tuple]:
        source = RatingSource(root)
        parts = [(sample, source.parts(sample, "both")) for sample in source.samples("train")]
        return [
            (sample.name, part.profile, part.memories, part.item)
            for sample, part in parts
            if sample.position <= first_changed[sample.user_id]
        ]

    assert shown(spoiled) == shown(clean)
    assert prompts(spoiled, "train") != prompts(clean, "train")
