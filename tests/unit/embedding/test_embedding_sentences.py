import shutil
import sys

import numpy as np
import pytest
from sentence_model import DIM, LONGEST, write_model

from personas_tune.embedding import load_embedder
from personas_tune.embedding.sentences import SentenceModel
from personas_tune.embedding.vectors import embed_repeated
from personas_tune.errors import ConfigError, DataError

TEXTS = ["war love", "quiet love", "space rocket war", "painter", "river comedy quiet love war"]


@pytest.fixture(scope="session")
def shared_model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def model(shared_model, tmp_path):
    """A copy of the model, to be spoilt."""
    return shutil.copytree(shared_model, tmp_path / "model")


@pytest.fixture
def embedder(model):
    return SentenceModel(str(model)).fit(TEXTS)


def write_files(embedder, folder):
    folder.mkdir()
    for name, content in embedder.files().items():
        (folder / name).write_bytes(content)
    return folder


def test_vectors_have_unit_length_and_the_models_dimension(embedder):
    vectors = embedder.embed(TEXTS).vectors
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(TEXTS), DIM) == (len(TEXTS), embedder.space.dim)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert len(np.unique(vectors.round(4), axis=0)) == len(TEXTS)


def test_vectors_are_those_of_the_library_itself(embedder, model):
    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformer(str(model), device="cpu", local_files_only=True).encode(TEXTS)
    np.testing.assert_allclose(embedder.embed(TEXTS).vectors, theirs, atol=1e-6)


def test_two_loads_give_equal_bytes(model):
    first, second = (SentenceModel(str(model)).fit(TEXTS).embed(TEXTS) for _ in range(2))
    assert first.vectors.tobytes() == second.vectors.tobytes()
    assert first.space == second.space


def test_company_changes_no_more_than_the_last_digits(embedder):
    together = embedder.embed(TEXTS * 15).vectors
    assert embed_repeated(embedder, TEXTS * 15).vectors.tobytes() == together.tobytes()
    alone = np.concatenate([embedder.embed([text]).vectors for text in TEXTS])
    np.testing.assert_allclose(together[: len(TEXTS)], alone, atol=1e-6)


def test_a_text_of_blanks_has_no_direction(embedder):
    embeddings = embedder.embed(["", "war", " \n"])
    assert embeddings.is_known.tolist() == [False, True, False]
    assert embedder.embed([]).vectors.shape == (0, DIM)


def test_texts_of_blanks_alone_can_not_be_fitted(model):
    with pytest.raises(DataError, match="none of the 2 texts to embed holds a word"):
        SentenceModel(str(model)).fit([" ", ""])


def test_a_text_longer_than_the_model_reads_is_told(embedder, capsys):
    words = ["war"] * (LONGEST - 2)  # beside the first and the last token
    whole, longer = embedder.embed([" ".join(words), " ".join([*words, "love", "love"]), "river"]).vectors[:2]
    assert whole.tobytes() == longer.tobytes()
    assert "1 of 3 texts are longer than the 12 tokens that the model reads (the longest 14)" in capsys.readouterr().err
    embedder.embed([" ".join(words)])
    assert capsys.readouterr().err == ""


def test_the_fit_is_that_of_settings_words_and_weights(model, tmp_path):
    fit = SentenceModel(str(model)).sha256
    (model / "README.md").write_text("Read me.")
    (model / ".cache").mkdir()
    (model / ".cache" / "lock.json").write_text("{}")
    assert SentenceModel(str(model)).sha256 == fit
    assert SentenceModel(str(shutil.copytree(model, tmp_path / "moved"))).sha256 == fit
    for name in ("vocab.txt", "1_Pooling/config.json", "model.safetensors"):
        kept = (model / name).read_bytes()
        (model / name).write_bytes(kept + b" ")
        assert SentenceModel(str(model)).sha256 != fit
        (model / name).write_bytes(kept)
    assert SentenceModel(str(model)).sha256 == fit


def test_a_loaded_embedder_gives_identical_vectors(embedder, tmp_path):
    loaded = load_embedder(write_files(embedder, tmp_path / "stored"))
    assert loaded.space == embedder.space
    assert loaded.embed(TEXTS).vectors.tobytes() == embedder.embed(TEXTS).vectors.tobytes()


def test_another_model_in_the_folder_is_refused(embedder, model, tmp_path):
    stored = write_files(embedder, tmp_path / "stored")
    (model / "config.json").write_text((model / "config.json").read_text() + "\n")
    with pytest.raises(DataError, match=r"embedder.json: another model lies in .*model than the one that made"):
        load_embedder(stored)
    shutil.rmtree(model)
    with pytest.raises(ConfigError, match="model is no folder"):
        load_embedder(stored)


@pytest.mark.parametrize("path", ["all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"])
def test_a_name_of_the_hub_is_refused_as_no_folder(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"embedding.path: {path} is no folder; download the model once"):
        SentenceModel(path).fit(TEXTS)


def test_a_missing_path_is_told():
    with pytest.raises(ConfigError, match=r"embedding\.path: no folder of a model is given"):
        SentenceModel(None).fit(TEXTS)


def test_a_folder_without_a_model_is_told(tmp_path):
    with pytest.raises(ConfigError, match="holds no model"):
        SentenceModel(str(tmp_path)).fit(TEXTS)


def test_weights_in_pickles_alone_are_refused_and_never_read(model):
    (model / "pytorch_model.bin").write_bytes(b"no pickle at all")
    SentenceModel(str(model)).fit(TEXTS)  # safetensors lie beside it
    (model / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"pytorch_model.bin is a pickle, which may run any code.*safetensors"):
        SentenceModel(str(model)).fit(TEXTS)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "modules.json", "tokenizer.json"])
def test_a_damaged_model_is_told_in_a_line(model, name):
    (model / name).write_bytes((model / name).read_bytes()[:40])
    with pytest.raises(ConfigError, match=r"^embedding.path .*model: the model can't be loaded") as caught:
        SentenceModel(str(model)).fit(TEXTS)
    assert len(caught.value.lines) == 1


def test_an_unknown_device_is_told_in_a_line(model):
    with pytest.raises(ConfigError, match=r"can't be loaded .*check the folder and device=nonsense"):
        SentenceModel(str(model), device="nonsense").fit(TEXTS)


def test_the_missing_extra_is_named(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ConfigError, match=r"pip install 'personas-tune\[sentence-transformers\]'"):
        SentenceModel(str(model)).fit(TEXTS)
