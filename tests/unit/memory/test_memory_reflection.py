import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from memory_tables import counted_users, interactions_table, items_table

from personas_tune.llm.calls import CHAT, Call, Chain, Request
from personas_tune.llm.replay import Finished, Waiting, replay
from personas_tune.memory.reflection import PROMPT_VERSION, ReflectionSettings, reflect_on, typical_answer
from personas_tune.memory.reflection_prompts import CONSOLIDATION_SCHEMA, REFLECTION_SCHEMA
from personas_tune.memory.stream import RatedItem, UserHistory, stream_histories
from personas_tune.memory.tables import Reflected, write_distilled

SETTINGS = ReflectionSettings(
    model="some-model",
    batch_size=3,
    max_words=2000,
    profile_words=20,
    memory_words=10,
    response_format="json_schema",
    sampling={"temperature": 0.2, "seed": 7},
    max_output_tokens=500,
    output_limit_name="max_completion_tokens",
    template="movies",
    top=5.0,
)
Model = Callable[[Request], dict[str, Any]]


class Answers:
    """Answers by request, as a journal keeps them."""

    def __init__(self) -> None:
        self.bodies: dict[str, list[str]] = defaultdict(list)

    def answers(self, request: str) -> Sequence[str]:
        return self.bodies[request]

    def add(self, call: Call, answer: dict[str, Any]) -> None:
        self.bodies[call.request.sha256].append(body_of(answer))


def body_of(answer: dict[str, Any]) -> str:
    message = {"role": "assistant", "content": json.dumps(answer)}
    return json.dumps({"choices": [{"index": 0, "finish_reason": "stop", "message": message}]})


def prompt_of(request: Request) -> str:
    return str(request.body["messages"][1]["content"])


def reflect(request: Request, profile: str = "I like {}.") -> dict[str, Any]:
    """A model that likes whatever it saw last."""
    prompt = prompt_of(request)
    if prompt.startswith("MY PROFILE\n"):
        return {"profile": "Shorter."}
    lines = prompt.split("OLDEST FIRST\n")[1].splitlines()
    last = lines[-1].split(" | ")[0].partition(". ")[2]
    memories = [{"item": number, "reason": f"Reason {number}."} for number in range(1, len(lines) + 1)]
    return {"memories": memories, "profile": profile.format(last)}


def verbose(request: Request) -> dict[str, Any]:
    return reflect(request, profile="I like {} " + "very " * 30)


def history_of(n: int, user_id: str = "u") -> UserHistory:
    return UserHistory(user_id, tuple(rated(position) for position in range(n)))


def rated(position: int) -> RatedItem:
    """An item of which every text and the rating are found nowhere else."""
    mark = f"c{position}c"
    mean = None if position % 2 else 3.9
    return RatedItem(
        f"i{mark}", position, 1 + position / 64, f"T{mark}", (f"G{mark}",), f"S{mark}", (f"P{mark}",), mean
    )


def run(
    history: UserHistory, settings: ReflectionSettings = SETTINGS, model: Model = reflect
) -> tuple[Reflected, list[Call]]:
    """The result of a chain that a model answers, and the calls that it made."""
    return drive(reflect_on(history, settings), lambda call: call.read(body_of(model(call.request))))


def drive(chain: Chain[Reflected], answer: Callable[[Call], Any]) -> tuple[Reflected, list[Call]]:
    calls = []
    try:
        call = next(chain)
        while True:
            calls.append(call)
            call = chain.send(answer(call))
    except StopIteration as stop:
        return stop.value, calls


def test_the_profile_grows_batch_by_batch() -> None:
    result, calls = run(history_of(7))
    assert result.profiles == (
        (0, "I have not rated any films yet."),
        (3, "I like Tc2c."),
        (6, "I like Tc5c."),
        (7, "I like Tc6c."),
    )
    shown = [prompt_of(call.request).splitlines()[1] for call in calls]
    assert shown == ["(nothing yet)", "I like Tc2c.", "I like Tc5c."]


def test_each_interaction_is_asked_about_once_and_in_order() -> None:
    _, calls = run(history_of(7))
    lines = [prompt_of(call.request).split("OLDEST FIRST\n")[1].splitlines() for call in calls]
    assert [[line.split(" | ")[0] for line in batch] for batch in lines] == [
        ["1. Tc0c", "2. Tc1c", "3. Tc2c"], ["1. Tc3c", "2. Tc4c", "3. Tc5c"], ["1. Tc6c"],
    ]  # fmt: skip


def test_a_memory_is_the_fact_and_the_reason() -> None:
    result, _ = run(history_of(4))
    assert result.memories[0] == (
        "u", "ic0c", 0, 1.0, "I gave Tc0c 1 of 5; others give it 3.9. Reason 1.",
    )  # fmt: skip
    assert result.memories[1] == ("u", "ic1c", 1, 1.015625, "I gave Tc1c 1.01562 of 5. Reason 2.")
    assert [row[2] for row in result.memories] == [0, 1, 2, 3]


def test_a_user_without_train_rows_makes_no_call() -> None:
    result, calls = run(UserHistory("u", ()))
    assert calls == []
    assert result == Reflected("u", ((0, "I have not rated any films yet."),), ())


def test_a_profile_over_its_budget_is_shortened_before_the_next_batch() -> None:
    result, calls = run(history_of(4), model=verbose)
    assert [text for _, text in result.profiles[1:]] == ["Shorter.", "Shorter."]
    first_lines = [prompt_of(call.request).splitlines()[:2] for call in calls]
    long = "I like Tc2c " + " ".join(["very"] * 30)
    assert first_lines[:3] == [
        ["MY PROFILE SO FAR", "(nothing yet)"], ["MY PROFILE", long], ["MY PROFILE SO FAR", "Shorter."],
    ]  # fmt: skip
    assert prompt_of(calls[1].request).endswith("\n\nSHORTEN IT TO AT MOST 20 WORDS")
    assert len(calls) == 4


@pytest.mark.parametrize("model", [reflect, verbose])
@pytest.mark.parametrize("batch_size", [1, 3, 10])
def test_no_call_knows_of_a_later_interaction(model: Model, batch_size: int) -> None:
    history = history_of(11)
    _, calls = run(history, replace(SETTINGS, batch_size=batch_size), model)
    n_seen = 0
    for call in calls:
        sent = json.dumps(call.request.body)
        if "SO FAR" in sent:
            n_seen = min(n_seen + batch_size, len(history.rated))
        for item in history.rated[n_seen:]:
            assert f"c{item.position}c" not in sent
            assert f"RATING: {item.rating:g} " not in sent
    assert n_seen == len(history.rated)


def test_earlier_calls_are_the_same_whatever_is_rated_later() -> None:
    _, calls = run(history_of(9))
    later = tuple(replace(item, title="Other", rating=5.0) for item in history_of(9).rated[6:])
    _, others = run(UserHistory("u", history_of(6).rated + later))
    names, other_names = ([call.request.sha256 for call in each] for each in (calls, others))
    assert names[:2] == other_names[:2]
    assert names[2] != other_names[2]


def test_nothing_of_test_rows_is_in_any_call_or_table(tmp_path: Path) -> None:
    rows = [("u", f"i{n}", 3.0, n, "train") for n in range(5)] + [("u", "iCANARY", 1.125, 5, "test")]
    log = interactions_table(rows)
    items = [{"item_id": f"i{n}", "mean_rating": 3.0} for n in range(5)]
    canary = {"item_id": "iCANARY", "summary": "CANARY", "cast": ["CANARY"], "genres": ["CANARY"], "mean_rating": 1.625}
    paths = [tmp_path / f"{name}.parquet" for name in ("interactions", "items", "users")]
    for path, table in zip(paths, (log, items_table([*items, canary]), counted_users(log)), strict=True):
        pq.write_table(table, path)
    (history,) = stream_histories(*paths)
    result, calls = run(history, model=verbose)
    write_distilled([result], tmp_path / "profiles", tmp_path / "memories", "openai")
    texts = [json.dumps(call.request.body) for call in calls]
    texts += [str(pq.read_table(tmp_path / name).to_pylist()) for name in ("profiles", "memories")]
    assert len(texts) == 4 + 2
    assert not any(mark in text for text in texts for mark in ("CANARY", "1.125", "1.625", "1.6"))


def test_the_body_has_what_the_settings_say() -> None:
    _, (call, *_) = run(history_of(1))
    body = call.request.body_after(None)
    messages = body.pop("messages")
    assert [message["role"] for message in messages] == ["system", "user"]
    assert body == {
        "model": "some-model", "temperature": 0.2, "seed": 7, "max_completion_tokens": 500,
        "response_format": {
            "type": "json_schema", "json_schema": {"name": "reflection", "strict": True, "schema": REFLECTION_SCHEMA},
        },
    }  # fmt: skip
    assert (call.request.path, call.request.version) == (CHAT, PROMPT_VERSION)


def test_a_consolidation_has_a_form_of_its_own() -> None:
    _, calls = run(history_of(1), model=verbose)
    form = calls[1].request.body["response_format"]["json_schema"]
    assert form == {"name": "consolidation", "strict": True, "schema": CONSOLIDATION_SCHEMA}


def test_other_servers_get_another_response_format_and_limit() -> None:
    settings = replace(SETTINGS, response_format="json_object", output_limit_name="max_tokens", sampling={})
    _, calls = run(history_of(1), settings, verbose)
    for call in calls:
        body = call.request.body_after(None)
        assert body["response_format"] == {"type": "json_object"}
        assert body["max_tokens"] == 500
        assert set(body) == {"model", "messages", "response_format", "max_tokens"}
    _, calls = run(history_of(1), replace(settings, response_format="none"), verbose)
    for call in calls:
        assert set(call.request.body_after(None)) == {"model", "messages", "max_tokens"}


def test_how_long_an_answer_may_be_is_no_part_of_a_requests_name() -> None:
    """Or a proxy before OpenAI, which takes the old name of the limit, would have all answers paid again."""
    _, (call,) = run(history_of(1))
    _, (other,) = run(history_of(1), replace(SETTINGS, output_limit_name="max_tokens", max_output_tokens=900))
    assert call.request.sha256 == other.request.sha256
    assert call.request.body_after("too short") != other.request.body_after("too short")


def test_sampling_can_not_replace_what_is_asked() -> None:
    sampling = {"model": "other", "messages": "none", "max_completion_tokens": 1}
    _, (call,) = run(history_of(1), replace(SETTINGS, sampling=sampling))
    assert call.request.body["model"] == "some-model"
    assert call.request.body_after(None)["max_completion_tokens"] == 500
    assert len(call.request.body["messages"]) == 2


def test_expected_output_tokens_follow_from_the_budgets() -> None:
    _, calls = run(history_of(4), model=verbose)
    # 1.4 tokens a word; reasons at 0.7 of 10 words, profiles at 0.8 of 20
    assert [call.expected_output_tokens for call in calls] == [52, 23, 33, 23]
    _, calls = run(history_of(4), replace(SETTINGS, max_output_tokens=40))
    assert [call.expected_output_tokens for call in calls] == [40, 33]


def test_typical_answers_drive_a_chain_through_all_of_its_reflections() -> None:
    _, calls = drive(reflect_on(history_of(7), SETTINGS), lambda call: typical_answer(call, SETTINGS))
    assert [prompt_of(call.request).count("MY RATING") for call in calls] == [3, 3, 1]
    assert len(prompt_of(calls[1].request).splitlines()[1].split()) == 16  # 0.8 of 20 words
    _, calls = run(history_of(1), model=verbose)
    assert len(typical_answer(calls[1], SETTINGS).split()) == 16


def test_whitespace_of_a_model_is_squeezed() -> None:
    def spaced(request: Request) -> dict[str, Any]:
        return {"memories": [{"item": 1, "reason": " It is\n\n grim. "}], "profile": "I like it.\n\n- A lot.\t"}

    result, _ = run(history_of(1), model=spaced)
    assert result.profiles[-1] == (1, "I like it. - A lot.")
    assert result.memories[0][-1].endswith("others give it 3.9. It is grim.")


def test_a_chain_waits_for_its_first_unanswered_call_and_goes_on_from_there() -> None:
    answers = Answers()
    waited_for = []
    while isinstance(outcome := replay(reflect_on(history_of(7), SETTINGS), answers), Waiting):
        waited_for.append(outcome.call.request.sha256)
        answers.add(outcome.call, reflect(outcome.call.request))
    expected, calls = run(history_of(7))
    assert outcome == Finished(expected)
    assert waited_for == [call.request.sha256 for call in calls]


def test_an_unusable_answer_leaves_the_chain_where_it_is_with_a_complaint() -> None:
    answers = Answers()
    waiting = replay(reflect_on(history_of(2), SETTINGS), answers)
    assert isinstance(waiting, Waiting)
    good = reflect(waiting.call.request)
    answers.add(waiting.call, {**good, "memories": good["memories"][:1]})
    again = replay(reflect_on(history_of(2), SETTINGS), answers)
    assert isinstance(again, Waiting)
    assert again.call.request == waiting.call.request
    assert again.complaints == ("in memories, item 2 is missing",)
    answers.add(waiting.call, good)
    assert replay(reflect_on(history_of(2), SETTINGS), answers) == Finished(run(history_of(2))[0])


@given(st.integers(0, 23), st.integers(1, 10), st.booleans())
def test_every_interaction_has_a_memory_and_every_batch_a_profile_within_its_budget(
    n: int, batch_size: int, is_verbose: bool
) -> None:
    result, calls = run(history_of(n), replace(SETTINGS, batch_size=batch_size), verbose if is_verbose else reflect)
    assert [upto for upto, _ in result.profiles] == sorted({*range(0, n, batch_size), n})
    assert all(0 < len(text.split()) <= SETTINGS.profile_words for _, text in result.profiles)
    assert [row[2] for row in result.memories] == list(range(n))
    assert len(calls) == -(-n // batch_size) * (1 + is_verbose)
