from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from personas_tune.errors import PromptError
from personas_tune.prompts.labels import rating_labels
from personas_tune.prompts.render import (
    ItemText,
    PromptParts,
    describe_item,
    fit_prompt,
    label_of,
    render_prompt,
    shorter_versions,
)
from personas_tune.prompts.templates import MOVIES, TEMPLATES, TRAITS, find_template

HEAT = ItemText(
    title="Heat",
    year=1995,
    genres=("Action", "Crime"),
    mean_rating=3.876,
    n_ratings=12,
    summary="A thief and a policeman meet",
    cast=("Al Pacino", "Robert De Niro", "Val Kilmer", "Jon Voight"),
)
FULL = PromptParts(
    tiers=(3, 1, 2),
    profile="I like crime films. I dislike romance. I rate often.",
    labels=("1", "2", "3", "4", "5"),
    memories=("I gave Ronin 5.", "I gave Alien 4."),
    item=HEAT,
)

words = st.text("abc,;'-", min_size=1, max_size=6)
texts = st.lists(st.sampled_from(["I like war", "It rains", "So", "M. Night"]), min_size=1, max_size=4).map(". ".join)
items = st.builds(
    ItemText,
    title=words,
    year=st.none() | st.integers(1900, 2030),
    genres=st.lists(words, max_size=3).map(tuple),
    mean_rating=st.none() | st.floats(0.5, 5),
    n_ratings=st.integers(0, 50),
    summary=st.none() | texts | texts.map(lambda text: text + "!"),
    cast=st.lists(words, max_size=5).map(tuple),
)
prompts = st.builds(
    PromptParts,
    tiers=st.none() | st.tuples(*[st.integers(1, 3)] * 3),
    profile=st.none() | texts | texts.map(lambda text: text + "."),
    labels=st.just(("1", "2", "3")),
    memories=st.lists(words, max_size=3).map(tuple),
    item=items,
)


def text_of(parts, template=MOVIES):
    return "\n".join(message["content"] for message in render_prompt(template, parts))


# What a prompt says, and in which order


def test_a_prompt_has_the_papers_sections_in_its_order():
    system, user = render_prompt(MOVIES, FULL)
    assert system == {
        "role": "system",
        "content": (
            "You are a viewer on a film site. Rate each film exactly as this viewer would.\n"
            "I watch films all the time. My ratings follow the crowd. I mostly stay with favourite genres.\n"
            "I like crime films. I dislike romance. I rate often."
        ),
    }
    assert user == {
        "role": "user",
        "content": (
            "Rate the film from 1 (hated it) to 5 (loved it). Reply with one of 1, 2, 3, 4, 5 and nothing else.\n"
            "What I remember of films like it:\n- I gave Ronin 5.\n- I gave Alien 4.\n"
            "Film: Heat (1995). Action, Crime. Others give it 3.88 on average in 12 ratings. "
            "A thief and a policeman meet. With Al Pacino, Robert De Niro, Val Kilmer, Jon Voight."
        ),
    }


def test_a_missing_part_leaves_its_section_out():
    bare = PromptParts(tiers=None, profile=None, labels=("0.5", "1"), memories=(), item=ItemText("M"))
    system, user = (message["content"] for message in render_prompt(MOVIES, bare))
    assert system == MOVIES.role
    assert user == f"{MOVIES.instructions(('0.5', '1'))}\nFilm: M."


@pytest.mark.parametrize(
    ("item", "text"),
    [
        (ItemText("M"), "M."),
        (ItemText("M", 1931), "M (1931)."),
        (ItemText("M", genres=("Crime",)), "M. Crime."),
        (ItemText("M", mean_rating=4.0, n_ratings=1), "M. Others give it 4.00 on average in 1 rating."),
        (ItemText("M", mean_rating=4.0, n_ratings=2), "M. Others give it 4.00 on average in 2 ratings."),
        (ItemText("M", mean_rating=None, n_ratings=2), "M."),
        (ItemText("M", summary="Who is it"), "M. Who is it."),
        (ItemText("M", summary="Who is it?"), "M. Who is it?"),
        (ItemText("M", cast=("Peter Lorre",)), "M. With Peter Lorre."),
        (ItemText("M", 1931, ("Crime",), 4.2, 9, "Hunt!", ("A", "B")),
         "M (1931). Crime. Others give it 4.20 on average in 9 ratings. Hunt! With A, B."),
    ],
)  # fmt: skip
def test_an_item_is_told_in_one_line(item, text):
    assert describe_item(item, "With") == text


@given(prompts, items, st.lists(words, max_size=3).map(tuple))
def test_what_a_users_samples_share_stands_first(parts, other_item, other_memories):
    one, other = (
        render_prompt(MOVIES, parts),
        render_prompt(MOVIES, replace(parts, item=other_item, memories=other_memories)),
    )
    assert one[0] == other[0]
    shared = MOVIES.instructions(parts.labels)
    assert one[1]["content"].startswith(shared)
    assert other[1]["content"].startswith(shared)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=lambda template: template.name)
def test_every_template_has_words_for_every_tier_and_takes_any_scale(template):
    assert set(template.traits) == set(TRAITS)
    assert all(len(set(sentences)) == 3 for sentences in template.traits.values())
    labels = rating_labels(0.5, 5, 0.5)
    text = template.instructions(labels)
    assert "from 0.5 " in text
    assert "to 5 " in text
    assert ", ".join(labels) in text
    assert "{" not in text_of(FULL, template)


def test_the_generic_template_speaks_of_no_films():
    assert "film" not in text_of(replace(FULL, profile=None, memories=()), find_template("generic")).lower()


def test_an_unknown_template_is_answered_with_the_known_ones():
    with pytest.raises(PromptError, match=r"prompt\.template: no template 'books'; use one of movies, generic"):
        find_template("books")


# Shortening


def test_a_prompt_is_given_up_in_the_documented_order():
    given_up = [
        replace(FULL, item=replace(HEAT, cast=HEAT.cast[:3])),
        replace(FULL, item=replace(HEAT, cast=())),
    ]
    given_up += [replace(given_up[-1], memories=FULL.memories[:n]) for n in (1, 0)]
    given_up += [replace(given_up[-1], item=replace(HEAT, cast=(), summary=None))]
    given_up += [
        replace(given_up[-1], profile=profile)
        for profile in ("I like crime films. I dislike romance.", "I like crime films.")
    ]
    assert list(shorter_versions(FULL)) == given_up


@given(prompts)
def test_every_shorter_version_is_a_shorter_text(parts):
    lengths = [len(text_of(version)) for version in [parts, *shorter_versions(parts)]]
    assert all(after < before for before, after in pairwise(lengths))


@given(prompts)
def test_what_decides_the_rating_is_never_given_up(parts):
    for version in shorter_versions(parts):
        assert version.labels == parts.labels
        assert version.tiers == parts.tiers
        kept = ("title", "year", "genres", "mean_rating", "n_ratings")
        assert all(getattr(version.item, name) == getattr(parts.item, name) for name in kept)
        assert (version.profile is None) == (parts.profile is None)
        if parts.profile:
            first = parts.profile.split(". ")[0].rstrip(".")
            assert version.profile.startswith(first)
        assert parts.memories[: len(version.memories)] == version.memories  # the most similar stay longest
        assert parts.item.cast[: len(version.item.cast)] == version.item.cast


@given(prompts)
def test_the_last_version_holds_nothing_more_to_give_up(parts):
    last = [parts, *shorter_versions(parts)][-1]
    assert last.item.cast == last.memories == ()
    assert not last.item.summary
    assert len((last.profile or "").split(". ")) == 1
    assert list(shorter_versions(last)) == []


@given(prompts, st.integers(0, 400))
def test_the_longest_version_that_fits_is_taken(parts, budget):
    def fits(version):
        return len(text_of(version)) <= budget

    versions = [parts, *shorter_versions(parts)]
    fitting = [version for version in versions if fits(version)]
    if not fitting:
        with pytest.raises(PromptError, match="user u1: prompt does not fit"):
            fit_prompt(parts, fits, where="user u1")
        return
    assert fit_prompt(parts, fits, where="user u1") == (fitting[0], fitting[0] is not parts)


def test_a_prompt_that_fits_is_left_as_it_is():
    assert fit_prompt(FULL, lambda parts: True, where="x") == (FULL, False)


# The answer


@pytest.mark.parametrize(
    "scale", [(1, 5, 1), (0.5, 5, 0.5), (0, 100, 1), (-1, 1, 0.1), (1_000_000, 1_000_002, 1), (0, 0.00002, 0.00001)]
)
def test_every_rating_of_a_scale_has_its_label(scale):
    labels = rating_labels(*scale)
    assert [label_of(float(label), labels) for label in labels] == labels
    assert [label_of(scale[0] + scale[2] * step, labels) for step in range(len(labels))] == labels  # sums round


def test_a_rating_off_the_scale_has_none():
    with pytest.raises(PromptError, match=r"rating 4\.5 has no label; the scale's labels are 1, 2, 3"):
        label_of(4.5, ["1", "2", "3"])
