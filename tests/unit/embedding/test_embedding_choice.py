import json
from dataclasses import replace
from pathlib import Path

import pytest
from sentence_model import write_model

from personas_tune.embedding import EmbeddingSettings, deciding_settings, load_embedder, make_embedder
from personas_tune.embedding.api import ApiModel
from personas_tune.embedding.lsa import Lsa
from personas_tune.embedding.sentences import SentenceModel
from personas_tune.embedding.vectors import Space, require_same_space
from personas_tune.errors import ConfigError, DataError
from personas_tune.llm.budget import Prices
from personas_tune.llm.settings import ServerSettings
from personas_tune.schema import Embedding

SECTION = {"embedder": "any", "dim": 8, "k": 3}
SETTINGS = EmbeddingSettings(ServerSettings("ada", "http://localhost:1/v1"), Path("journal.sqlite"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


def test_an_embedder_is_found_by_its_name():
    assert make_embedder("lsa", dim=8, seed=1, reads="tastes", settings=SETTINGS) == Lsa(8, 1, "tastes")
    assert make_embedder("openai", dim=8, seed=1, reads="tastes", settings=SETTINGS) == ApiModel(SETTINGS)
    settings = replace(SETTINGS, path="here", device="cuda")
    assert make_embedder("sentence-transformers", 8, 1, settings=settings) == SentenceModel("here", "cuda")


def test_an_unknown_embedder_is_told_with_those_that_there_are():
    with pytest.raises(ConfigError, match="no embedder word2vec; use lsa, openai or sentence-transformers"):
        make_embedder("word2vec", dim=8, seed=0)


@pytest.mark.parametrize("name", ["openai", "sentence-transformers"])
def test_an_embedder_without_its_means_is_told(name):
    with pytest.raises(ConfigError, match=f"embedder {name} needs a server and a journal, or a model's folder"):
        make_embedder(name, dim=8, seed=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"space": {"embedder": "word2vec", "dim": 1, "fit": "0"}}', "no embedder 'word2vec' is known"),
        ('{"space": {"embedder": "sentence-transformers", "dim": 1, "fit": "0"}}', "no path in it"),
        ('{"space": {"embedder": "openai"}}', "unreadable embedder"),
        ('{"space": []}', "unreadable embedder"),
        ("[]", "unreadable embedder"),
        ("{", "unreadable embedder"),
    ],
)  # fmt: skip
def test_a_damaged_description_is_told_with_the_remedy(tmp_path, content, message):
    (tmp_path / "embedder.json").write_text(content)
    with pytest.raises(DataError, match=f"embedder.json: {message}.*run the stage that wrote it again"):
        load_embedder(tmp_path, SETTINGS)


def test_limits_prices_and_addresses_decide_nothing():
    server = ServerSettings(
        "ada", "http://elsewhere/v1", 5, 60, 1000, 1.0, 0, Prices(input=1), max_usd=1, max_tokens=9
    )  # fmt: skip
    other = replace(
        SETTINGS, server=server, journal=Path("b"), inputs_per_request=2, stated_base_url="x", path="y", device="cuda"
    )
    for name in ("openai", "lsa"):
        assert deciding_settings(name, SECTION, other) == deciding_settings(name, SECTION, SETTINGS)
        assert ApiModel(other).description == ApiModel(SETTINGS).description


def test_the_model_and_its_dimensions_decide_for_openai_and_dim_does_not():
    keys = {
        json.dumps(deciding_settings("openai", {**SECTION, "dim": dim}, settings), sort_keys=True)
        for dim in (8, 9)
        for settings in (
            SETTINGS,
            replace(SETTINGS, dimensions=8),
            replace(SETTINGS, server=replace(SETTINGS.server, model="b")),
        )
    }
    assert len(keys) == 3
    assert deciding_settings("openai", SECTION, SETTINGS) == {
        "embedder": "any",
        "k": 3,
        "embedding": {"model": "ada", "dimensions": None, "version": "embeddings-1"},
    }


def test_for_lsa_the_section_itself_decides():
    assert deciding_settings("lsa", SECTION, SETTINGS) == SECTION


def test_what_lies_in_the_folder_decides_for_sentence_transformers(model):
    decided = deciding_settings("sentence-transformers", SECTION, replace(SETTINGS, path=str(model)))
    assert decided == {"embedder": "any", "k": 3, "embedding": {"sha256": SentenceModel(str(model)).sha256}}


def test_vectors_of_different_embedders_are_never_compared(model):
    spaces = [
        make_embedder("sentence-transformers", 16, 0, settings=replace(SETTINGS, path=str(model))).fit(["war"]).space,
        make_embedder("lsa", 16, 0).fit(["war"]).space,
        Space("openai", 16, "0"),
    ]
    for space in spaces:
        for other in spaces:
            if other is not space:
                with pytest.raises(DataError, match="can't be compared"):
                    require_same_space(space, other, where="here")


def test_every_key_of_the_schema_finds_its_place():
    section = Embedding(
        model="m", base_url="http://me:secret@host/v1", prices={"input": 2}, dimensions=4, inputs_per_request=5,
        path="p", concurrency=7, max_usd=3, timeout_s=9,
    ).model_dump()  # fmt: skip
    made = EmbeddingSettings.of(section, stated_base_url="${oc.env:URL}", journal=Path("j"), device="cuda")
    assert (made.dimensions, made.inputs_per_request, made.path, made.device) == (4, 5, "p", "cuda")
    assert (made.server.model, made.server.base_url, made.server.concurrency) == ("m", "http://me:secret@host/v1", 7)
    assert made.server.prices is not None
    assert (made.server.prices.input, made.server.max_usd, made.server.timeout_s) == (2, 3, 9)
    assert (made.stated_base_url, made.journal) == ("${oc.env:URL}", Path("j"))


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        (None, None),
        ("${oc.env:URL}", "${oc.env:URL}"),
        ("http://localhost:8000/v1", "http://localhost:8000/v1"),
        ("https://me:secret@host:8/v1", "https://host:8/v1"),
        ("https://host/v1?key=secret#secret", "https://host/v1"),
        ("https://a@b:secret@host/v1", "https://host/v1"),
        ("https://me:secret@${oc.env:HOST}/v1", "https://${oc.env:HOST}/v1"),
        ("http://[host", ""),
    ],
)
def test_an_address_is_kept_without_secrets(address, shown):
    section = {"model": "m", "dimensions": None, "inputs_per_request": 1, "path": None}
    made = EmbeddingSettings.of(section, stated_base_url=address, journal=Path("j"), device="cpu")
    assert made.stated_base_url == shown
