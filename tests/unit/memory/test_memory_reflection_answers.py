import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from personas_tune.llm.calls import Rejected
from personas_tune.memory.reflection_answers import Consolidation, Reflection, read_consolidation, read_reflection
from personas_tune.memory.reflection_prompts import CONSOLIDATION_SCHEMA, REFLECTION_SCHEMA

GOOD = {
    "memories": [{"item": 1, "reason": "It is grim."}, {"item": 2, "reason": "It is warm."}],
    "profile": "I like grim films.",
}


def body_of(content: object, finish_reason: str | None = "stop", **message: object) -> str:
    choice = {
        "index": 0,
        "finish_reason": finish_reason,
        "message": {"role": "assistant", "content": content, **message},
    }
    return json.dumps({"id": "x", "object": "chat.completion", "choices": [choice]})


def read(content: object, n_items: int = 2, max_words: int = 2000, **rest: Any) -> tuple[tuple[str, ...], str]:
    text = content if isinstance(content, str) else json.dumps(content)
    return read_reflection(body_of(text, **rest), n_items=n_items, memory_words=10, max_words=max_words)


def shorten(content: object, max_words: int = 2000) -> str:
    text = content if isinstance(content, str) else json.dumps(content)
    return read_consolidation(body_of(text), profile_words=5, max_words=max_words)


def complaint_about(content: object, **rest: Any) -> str:
    with pytest.raises(Rejected) as caught:
        read(content, **rest)
    return str(caught.value)


def with_reasons(*reasons: tuple[object, str]) -> dict[str, object]:
    return {**GOOD, "memories": [{"item": item, "reason": reason} for item, reason in reasons]}


def test_a_good_answer_is_read() -> None:
    assert read(GOOD) == (("It is grim.", "It is warm."), "I like grim films.")


def test_reasons_come_in_the_order_of_the_items() -> None:
    assert read(with_reasons((2, "Two."), (1, "One.")))[0] == ("One.", "Two.")


@pytest.mark.parametrize(
    "frame",
    [
        "```json\n{}\n```", "```\n{}```", "Here it is:\n{}\nI hope it helps.", "\ufeff{}",
        "<think>\nA set {{of}} thoughts.\n</think>\n\n{}", "So {{...}}.\n</think>{}",
    ],
)  # fmt: skip
def test_words_fences_and_thoughts_around_the_object_are_passed_over(frame: str) -> None:
    assert read(frame.format(json.dumps(GOOD))) == read(GOOD)


def test_line_breaks_within_texts_are_let_through_and_squeezed() -> None:
    text = json.dumps(with_reasons((1, "It  is@grim.\u2028"), (2, "It is\u0000 warm.")) | {"profile": " I like@@it. "})
    assert read(text.replace("@", "\n")) == (("It is grim.", "It is warm."), "I like it.")


def test_half_a_character_is_dropped() -> None:
    assert read({**GOOD, "profile": "I like it \ud83d."})[1] == "I like it ."


def test_a_number_in_quotes_is_a_number() -> None:
    assert read(with_reasons(("1", "One."), (2.0, "Two.")))[0] == ("One.", "Two.")


@pytest.mark.parametrize(
    ("memories", "what"),
    [
        ([(1, "a")], "in memories, item 2 is missing"),
        ([(1, "a"), (2, "b"), (1, "c")], "in memories, item 1 is there more than once"),
        ([(1, "a"), (2, "b"), (3, "c")], "in memories, item 3 is unknown"),
        ([(0, "a"), (1, "b")], "in memories, item 2 is missing; in memories, item 0 is unknown"),
        ([], "in memories, items 1, 2 are missing"),
        ([(1, "a"), (2, " \n")], "the reason of item 2 is empty"),
        ([(1, "..."), (2, "")], "the reason of items 1, 2 is empty"),
        ([(1, "a " * 21), (2, "a " * 20)], "the reason of item 1 is longer than 10 words"),
    ],
)
def test_wrong_memories_are_named(memories: list[tuple[object, str]], what: str) -> None:
    assert complaint_about(with_reasons(*memories)) == what


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("I can't.", "it is not one valid JSON object"),
        ('{"memories": [', "it is not one valid JSON object"),
        ("[]", "it is not one valid JSON object"),
        ('{"a":' * 100_000 + "}", "it is not one valid JSON object"),
        ("", "it is empty"),
        (" \n", "it is empty"),
        ({"profile": "x"}, "its JSON is not of the form asked for (memories is missing)"),
        ({**GOOD, "mood": 1}, "its JSON is not of the form asked for (mood was not asked for)"),
        ({**GOOD, "profile": ["x"]}, "its JSON is not of the form asked for (profile is not a string)"),
        ({**GOOD, "memories": {}}, "its JSON is not of the form asked for (memories is not a list)"),
        (
            with_reasons((1, "a")) | {"memories": ["x", {"item": "one", "reason": None}]},
            "its JSON is not of the form asked for (memories, entry 1 is not an object, memories, entry 2, item is not "
            "a whole number, memories, entry 2, reason is not a string)",
        ),
        ({**GOOD, "profile": "\t"}, "the profile is empty"),
        (with_reasons((1, "")) | {"profile": ""}, "in memories, item 2 is missing; the reason of item 1 is empty; "
         "the profile is empty"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(content: object, what: str) -> None:
    assert complaint_about(content) == what


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("<html>Bad gateway</html>", "the server's answer is not a chat completion (<html>Bad gateway</html>)"),
        ('{"error": "busy"}', 'the server\'s answer is not a chat completion ({"error": "busy"})'),
        ('{"choices": []}', 'the server\'s answer is not a chat completion ({"choices": []})'),
        ('{"choices": [{"message": null}]}', "it is empty"),
        (body_of(None), "it is empty"),
        (body_of(None, refusal="I won't."), "it was refused (I won't.)"),
        (body_of("x", finish_reason="content_filter"), "it was refused (content filter)"),
        (
            body_of(json.dumps(GOOD), finish_reason="length"),
            "it was cut off before its end; write shorter reasons and a shorter profile",
        ),
    ],
)
def test_what_a_server_did_not_deliver_is_said(body: str, what: str) -> None:
    with pytest.raises(Rejected) as caught:
        read_reflection(body, n_items=2, memory_words=10, max_words=2000)
    assert str(caught.value) == what


def test_a_generation_of_too_many_words_is_rejected() -> None:
    n_words = len(json.dumps(GOOD).split())
    assert read(GOOD, max_words=n_words)
    assert complaint_about(GOOD, max_words=n_words - 1) == f"it has {n_words} words; write at most {n_words - 1}"
    with pytest.raises(Rejected, match="it has 3 words; write at most 2"):
        shorten({"profile": "I do."}, max_words=2)


def test_a_reflection_of_one_item_is_read() -> None:
    assert read(with_reasons((1, "One.")), n_items=1)[0] == ("One.",)


def test_a_shortened_profile_keeps_to_its_budget() -> None:
    assert shorten({"profile": " I like war\nand crime. "}) == "I like war and crime."
    with pytest.raises(Rejected, match=r"^the profile has 6 words; shorten it to at most 5$"):
        shorten({"profile": "I like war and crime too."})
    with pytest.raises(Rejected, match=r"^the profile is empty$"):
        shorten({"profile": "..."})


def test_a_complaint_stays_short() -> None:
    many = {f"key {number} {'x' * 1000}": 1 for number in range(1000)}
    assert len(complaint_about({**GOOD, **many})) < 500
    assert len(complaint_about(with_reasons(*((number, "") for number in range(10**9, 10**9 + 1000))))) < 500
    assert len(complaint_about("", refusal="No. " * 1000)) < 500


@pytest.mark.parametrize(("form", "schema"), [(Reflection, REFLECTION_SCHEMA), (Consolidation, CONSOLIDATION_SCHEMA)])
def test_the_schema_that_is_sent_is_that_of_the_model_that_checks(
    form: type[BaseModel], schema: dict[str, object]
) -> None:
    made = form.model_json_schema()
    assert _plain(made, made.get("$defs", {})) == schema


def _plain(node: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(node, list):
        return [_plain(each, definitions) for each in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return _plain(definitions[node["$ref"].split("/")[-1]], definitions)
    return {
        key: _plain(value, definitions) for key, value in node.items() if key not in ("title", "description", "$defs")
    }


def objects_of(schema: Any) -> list[dict[str, Any]]:
    nodes = schema if isinstance(schema, list) else list(schema.values()) if isinstance(schema, dict) else []
    own = [schema] if isinstance(schema, dict) and schema.get("type") == "object" else []
    return own + [found for node in nodes for found in objects_of(node)]


@pytest.mark.parametrize(("schema", "n_objects"), [(REFLECTION_SCHEMA, 2), (CONSOLIDATION_SCHEMA, 1)])
def test_the_schema_keeps_to_the_rules_of_strict_output(schema: dict[str, Any], n_objects: int) -> None:
    objects = objects_of(schema)
    assert len(objects) == n_objects
    for each in objects:
        assert each["additionalProperties"] is False
        assert each["required"] == list(each["properties"])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["\ud800", "length", "..."]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["choices", "message", "content", "refusal", "memories", "item", "reason", "profile", "\ud800"]
            )
            | st.text(max_size=3),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)
ENTRY = st.fixed_dictionaries(
    {"item": st.integers(0, 3) | JSON, "reason": st.text(max_size=40) | JSON}, optional={"x": JSON}
)
FORM = st.fixed_dictionaries({"memories": st.lists(ENTRY, max_size=4) | JSON, "profile": st.text() | JSON})
CONTENT = (
    st.text() | JSON.map(json.dumps) | FORM.map(json.dumps) | st.tuples(st.text(), FORM.map(json.dumps)).map("".join)
)
MESSAGE = st.fixed_dictionaries({"content": CONTENT}, optional={"refusal": JSON})
CHOICE = st.fixed_dictionaries(
    {"message": MESSAGE | JSON}, optional={"finish_reason": st.sampled_from(["stop", None]) | JSON}
)
BODY = st.text() | JSON.map(json.dumps) | CHOICE.map(lambda choice: json.dumps({"choices": [choice]}))


@given(BODY)
def test_any_body_is_read_or_rejected_in_a_line_that_can_be_sent(body: str) -> None:
    readers: list[Callable[[str], object]] = [
        lambda text: read_reflection(text, n_items=2, memory_words=5, max_words=100),
        lambda text: read_consolidation(text, profile_words=5, max_words=100),
    ]
    for reader in readers:
        try:
            value = reader(body)
        except Rejected as rejected:
            value = str(rejected)
            assert 0 < len(value) < 1000
            assert len(value.splitlines()) == 1
        json.dumps(value, ensure_ascii=False).encode()


@given(st.lists(st.tuples(st.integers(0, 4), st.text(max_size=30)), max_size=5), st.text(max_size=30))
def test_an_answer_is_read_only_if_it_has_each_item_once_and_texts(
    entries: list[tuple[int, str]], profile: str
) -> None:
    try:
        reasons, read_profile = read(with_reasons(*entries) | {"profile": profile}, n_items=3)
    except Rejected:
        return
    assert sorted(item for item, _ in entries) == [1, 2, 3]
    assert len(reasons) == 3
    assert all(text.strip() for text in (*reasons, read_profile))
