from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf
from tiny import base_sections, write_experiment
from torchtune import config as torchtune_config

from personas_tune.datasets import ChatTokenizer, RatingSource, persona_rating_dataset
from personas_tune.errors import ConfigError, DataError, MissingInputError, PromptError
from personas_tune.workspace import Workspace


@pytest.fixture
def tokenizer(tiny_checkpoint: Path):
    return torchtune_config.instantiate(OmegaConf.create(base_sections(tiny_checkpoint)["tokenizer"]))


def test_loss_falls_on_label_and_end_of_turn_only(tokenizer, experiment: Workspace) -> None:
    dataset = persona_rating_dataset(tokenizer, source=str(experiment.root))
    end_of_turn = tokenizer.special_tokens["<|end|>"]
    source = RatingSource(experiment.root)
    for sample, item in zip(source.samples("train"), dataset, strict=True):
        answer = [token for token in item["labels"] if token != -100]
        assert answer[-1] == end_of_turn
        assert tokenizer.decode(answer[:-1]) == source.label(sample)
        assert item["tokens"][-len(answer) :] == answer
        assert len(item["tokens"]) == len(item["labels"])


def test_tokens_are_those_of_torchtune_up_to_the_end_of_turn(tokenizer, experiment: Workspace) -> None:
    from torchtune.data import Message

    from personas_tune.prompts.render import render_prompt

    source = RatingSource(experiment.root)
    sample = source.samples("train")[3]
    messages = [
        Message(role=m["role"], content=m["content"])
        for m in render_prompt(source.template, source.parts(sample, "both"))
    ]
    whole, _ = tokenizer.tokenize_messages([*messages, Message(role="assistant", content=source.label(sample))])
    mine = persona_rating_dataset(tokenizer, source=str(experiment.root))[3]["tokens"]
    assert mine == whole[: len(mine)]
    assert tokenizer.special_tokens["<|end|>"] not in whole[len(mine) :]


def test_a_user_s_rows_share_everything_up_to_the_memories(tokenizer, experiment: Workspace) -> None:
    rows = [row.tokens for row in persona_rating_dataset(tokenizer, source=str(experiment.root)).rows[1:4]]
    shared = tokenizer.decode(rows[0][: next(i for i in range(1000) if len({row[i] for row in rows}) > 1)])
    assert "I like the river" in shared
    assert "Reply with one of 1, 2, 3, 4, 5" in shared


@pytest.mark.parametrize(
    ("memories", "profile_shown", "memory_shown"), [("short", True, False), ("long", False, True), ("both", True, True)]
)
def test_memories_choose_what_is_shown(tokenizer, experiment: Workspace, memories, profile_shown, memory_shown) -> None:
    dataset = persona_rating_dataset(tokenizer, source=str(experiment.root), memories=memories)
    text = tokenizer.decode(dataset[2]["tokens"])
    assert ("I like the river" in text) == profile_shown
    assert ("I gave i" in text) == memory_shown


def test_persona_selects_its_users(tokenizer, experiment: Workspace) -> None:
    sizes = [len(persona_rating_dataset(tokenizer, source=str(experiment.root), persona=p)) for p in (None, 0, 1)]
    assert sizes == [36, 18, 18]
    with pytest.raises(DataError, match="persona 9 has no sample; the personas are 0, 1"):
        persona_rating_dataset(tokenizer, source=str(experiment.root), persona=9)


def test_packed_is_true_or_false(tokenizer, experiment: Workspace) -> None:
    with pytest.raises(ConfigError, match=r"dataset.packed: 'false' can't be used; use true or false"):
        persona_rating_dataset(tokenizer, source=str(experiment.root), packed="false")


def test_packed_rows_hold_every_answer(tokenizer, experiment: Workspace) -> None:
    plain = persona_rating_dataset(tokenizer, source=str(experiment.root))
    packed = persona_rating_dataset(tokenizer, source=str(experiment.root), packed=True)
    answers = sum((item["labels"] != -100).sum().item() for item in packed)
    assert answers == sum(len(row.answer) for row in plain.rows)


def test_half_star_answers_end_where_the_turn_ends(tokenizer, tmp_path: Path) -> None:
    workspace = write_experiment(tmp_path / "half", ["0.5", "1", "1.5", "4", "4.5"])
    dataset = persona_rating_dataset(tokenizer, source=str(workspace.root))
    source = RatingSource(workspace.root)
    decoded = {tokenizer.decode(row.answer[:-1]) for row in dataset.rows}
    assert decoded == {source.label(sample) for sample in source.samples("train")}
    chat = ChatTokenizer(tokenizer)
    assert chat.answer_tokens("4") != chat.answer_tokens("4.5")[: len(chat.answer_tokens("4"))]


def test_long_prompts_are_shortened_but_never_the_answer(tokenizer, experiment: Workspace) -> None:
    full = persona_rating_dataset(tokenizer, source=str(experiment.root))
    tokenizer.max_seq_len = max(len(row.tokens) for row in full.rows) - 5
    short = persona_rating_dataset(tokenizer, source=str(experiment.root))
    assert 0 < short.n_shortened < len(short)
    assert all(len(row.tokens) <= tokenizer.max_seq_len for row in short.rows)
    assert [row.answer for row in short.rows] == [row.answer for row in full.rows]


def test_a_sample_that_cannot_fit_is_named(tokenizer, experiment: Workspace) -> None:
    tokenizer.max_seq_len = 40
    with pytest.raises(PromptError, match=r"user u0, item i\d+ \(position 0\): prompt does not fit"):
        persona_rating_dataset(tokenizer, source=str(experiment.root))


def test_a_missing_stage_is_named_with_its_recipe(tokenizer, experiment: Workspace) -> None:
    experiment.memories.unlink()
    with pytest.raises(MissingInputError, match="tune run persona_distill"):
        persona_rating_dataset(tokenizer, source=str(experiment.root))


def test_before_target_shows_the_profile_as_it_stood(experiment: Workspace) -> None:
    experiment.prompt_settings.write_text('{"template": "movies", "profile": "before_target", "labels": ["1", "5"]}')
    source = RatingSource(experiment.root)
    sample = source.samples("train")[2]
    assert "I have seen 0 films" in (source.parts(sample, "both").profile or "")
    assert "I have seen 6 films" in (source.parts(source.samples("test")[0], "both").profile or "")


def test_before_target_shows_no_profile_where_none_was_written_yet(tokenizer, experiment: Workspace) -> None:
    profiles = pq.read_table(experiment.profiles)
    pq.write_table(profiles.filter(pc.field("upto_position") > 0), experiment.profiles)  # the final ones only
    experiment.prompt_settings.write_text(
        '{"template": "movies", "profile": "before_target", "labels": ["1", "2", "3", "4", "5"]}'
    )
    source = RatingSource(experiment.root)
    assert not source.parts(source.samples("train")[2], "both").profile
    assert "I have seen 6 films" in (source.parts(source.samples("test")[0], "both").profile or "")


def test_labels_off_the_scale_are_refused(experiment: Workspace) -> None:
    experiment.prompt_settings.write_text('{"template": "movies", "profile": "final", "labels": ["8", "9"]}')
    source = RatingSource(experiment.root)
    with pytest.raises(PromptError, match="the scale's labels are 8, 9"):
        source.label(source.samples("train")[0])


def test_rows_of_one_prefix_name_share_their_profile(tokenizer, experiment: Workspace) -> None:
    experiment.prompt_settings.write_text('{"template": "movies", "profile": "before_target", "labels": ["1"]}')
    before = RatingSource(experiment.root)
    names = {before.prefix_name(sample) for sample in before.samples("train")}
    assert len(names) == 6  # six users, whose profile stands at position 0 until all six train rows are seen
    experiment.prompt_settings.write_text('{"template": "movies", "profile": "final", "labels": ["1"]}')
    final = RatingSource(experiment.root)
    assert {final.prefix_name(s) for s in final.samples("train")} == {
        final.prefix_name(s) for s in final.samples("test")
    }
    assert {before.prefix_name(s) for s in before.samples("test")} == {
        final.prefix_name(s) for s in final.samples("test")
    }
    assert names.isdisjoint({before.prefix_name(sample) for sample in before.samples("test")})
