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
    assert qlora.is_quantised
    assert not found.is_quantised
    assert origin(folder, quantize_base=True).is_quantised


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
        (None, "{}", None),
    ],
)
def test_the_licence_is_what_the_bases_card_or_config_says(card, config, expected, folder):
    (folder / "config.json").write_text(config)
    if card is not None:
        (folder / "README.md").write_text(card)
    found = find_license(folder)
    assert (found and found.id) == expected
    if expected == "other":
        assert (found.title, found.link) == ("llama", "LICENSE")


def test_another_base_of_the_same_names_is_refused(folder):
    file = folder / "config.json"
    require_same_base([file], {"/elsewhere/config.json": sha256_of_file(file)}, where="adapters/persona")
    require_same_base([file], {"/elsewhere/model.safetensors": "x"}, where="adapters/persona")
    with pytest.raises(AdapterError, match=r"adapters/persona: trained on another base: its config\.json was not this"):
        require_same_base([file], {"/elsewhere/config.json": "0" * 64}, where="adapters/persona")
