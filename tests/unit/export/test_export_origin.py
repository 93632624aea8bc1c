"""What a base is called, under which licence, and whether it is the one of the adapters."""

import json
from pathlib import Path

import pytest

from personas_tune.errors import AdapterError
from personas_tune.export.origin import find_license, find_origin, require_same_base
from personas_tune.workspace import sha256_of_file

MINI = "torchtune.models.phi3.lora_phi3_mini"


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "my_base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def origin(folder, component=MINI, given=None, **model):
    return find_origin({"_component_": component, **model}, {"checkpoint_dir": str(folder)}, given)


def test_a_folder_of_its_own_name_is_no_checkpoint_of_the_hub(folder):
    found = origin(folder)
    assert (found.name, found.loadable) == ("my_base", str(folder))


def test_a_folder_of_the_hubs_name_is_the_hubs(folder):
    found = origin(folder.rename(folder.parent / "Phi-3-mini-4k-instruct"))
    assert found.name == found.loadable == "microsoft/Phi-3-mini-4k-instruct"
    qlora = origin(folder.parent / "Phi-3-mini-4k-instruct", "torchtune.models.phi3.qlora_phi3_mini")
    assert qlora.name == "microsoft/Phi-3-mini-4k-instruct"


def test_what_tune_download_noted_counts_and_a_given_name_counts_more(folder):
    (folder / "original_repo_id.json").write_text(json.dumps({"repo_id": "me/mine"}))
    assert origin(folder).name == "me/mine"
    assert origin(folder, given="you/yours").loadable == "you/yours"
    (folder / "original_repo_id.json").write_text("[]")
    assert origin(folder).name == "my_base"


@pytest.mark.parametrize(
    ("card", "config", "expected"),
    [
        ("---\nlicense: mit\n---\n# x\n", "{}", "mit"),
        ("no metadata", '{"license": "apache-2.0"}', "apache-2.0"),
        ("---\nlicense: [a, b]\n---\n", "{}", None),
        ("---\n{broken\n---\n", "[]", None),
        ("---\nlicense: other\nlicense_name: llama\nlicense_link: LICENSE\n---\n", "{}", "other"),
        ("---\nlicense: other\nlicense_link: https://example.org/terms\n---\n", "{}", "other"),
        (None, "{}", None),
    ],
)
def test_the_licence_is_what_the_bases_card_or_config_says(card, config, expected, folder):
    (folder / "config.json").write_text(config)
    if card is not None:
        (folder / "README.md").write_text(card)
    found = find_license(folder)
    assert (found and found.id) == expected
    if expected == "other":  # a file of the base's folder can't be followed from an adapter's card
        assert (found.title, found.link) in (("llama", None), (None, "https://example.org/terms"))


@pytest.mark.parametrize(
    ("config", "window"),
    [
        ({"sliding_window": 2047}, 2047),
        ({"sliding_window": None}, None),
        ({"sliding_window": 4096, "use_sliding_window": False}, None),
        ({}, None),
    ],
)
def test_the_window_is_that_of_the_config(config, window, folder):
    (folder / "config.json").write_text(json.dumps(config))
    assert origin(folder).window == window


def test_another_base_of_the_same_names_is_refused(folder):
    file = folder / "config.json"
    require_same_base([file], {"/elsewhere/config.json": sha256_of_file(file)}, where="adapters/persona")
    require_same_base([file], {"/elsewhere/of_another_name.json": sha256_of_file(file)}, where="adapters/persona")
    with pytest.raises(AdapterError, match=r"adapters/persona: trained on another base: its config\.json was not this"):
        require_same_base([file], {"/elsewhere/config.json": "0" * 64}, where="adapters/persona")


def test_a_file_that_training_never_saw_is_refused_whatever_its_name(folder):
    config, twin = folder / "config.json", folder / "weights.safetensors"
    twin.write_bytes(b"other weights")
    trained_with = {"/base/config.json": sha256_of_file(config), "/base/model.safetensors": "0" * 64}
    with pytest.raises(AdapterError, match=r"its weights\.safetensors was not this one; .*none has this one's sha256"):
        require_same_base([config, twin], trained_with, where="adapters/persona")
