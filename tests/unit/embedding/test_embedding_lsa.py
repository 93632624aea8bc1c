import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics.pairwise import cosine_similarity
from threadpoolctl import threadpool_limits

from personas_tune.embedding import load_embedder, make_embedder
from personas_tune.embedding.lsa import Lsa
from personas_tune.embedding.vectors import Space, embed_repeated, require_same_space
from personas_tune.errors import DataError, MissingInputError

TEXTS = [
    "A rebel pilot joins a war among the stars",
    "A quiet romance between two painters",
    "Stars and rockets: a comedy about a failed launch",
    "Two painters at war over one commission",
    "A rocket pilot falls in love",
]
WORDS = [f"word{i}" for i in range(600)]


def random_texts(n_texts, n_words=40, seed=0):
    draws = np.random.default_rng(seed).zipf(1.4, size=(n_texts, n_words)) % len(WORDS)
    return [" ".join(WORDS[i] for i in row) for row in draws]


def write_files(embedder, folder):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in embedder.files().items():
        (folder / name).write_bytes(content)


def test_vectors_have_unit_length_and_are_float32():
    vectors = Lsa(dim=3, seed=0).fit(TEXTS).embed(TEXTS).vectors
    assert vectors.dtype == np.float32
    assert vectors.shape == (5, 3)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_with_every_dimension_cosines_are_those_of_the_tfidf_rows():
    rows = TfidfVectorizer(token_pattern=r"(?u)\b\w+\b", sublinear_tf=True).fit_transform(TEXTS)
    vectors = Lsa(dim=50, seed=0).fit(TEXTS).embed(TEXTS).vectors
    np.testing.assert_allclose(vectors @ vectors.T, cosine_similarity(rows), atol=1e-6)


def test_leading_dimensions_agree_with_an_exact_truncated_svd():
    topics = [f"{topic} {topic}{i % 5} word{i}" for i in range(80) for topic in ("war", "love", "space")[: 1 + i % 3]]
    texts = [*topics, *random_texts(5)]
    rows = TfidfVectorizer(sublinear_tf=True).fit_transform(texts)
    exact = TruncatedSVD(3, algorithm="arpack", random_state=0).fit_transform(rows)
    vectors = Lsa(dim=3, seed=0).fit(texts).embed(texts).vectors
    np.testing.assert_allclose(vectors @ vectors.T, cosine_similarity(exact), atol=1e-3)


def test_two_texts_without_a_common_word_are_at_right_angles_when_fitted_alone():
    vectors = Lsa(dim=2, seed=0).fit(["red", "blue"]).embed(["red", "blue", "red blue"]).vectors
    np.testing.assert_allclose(
        vectors @ vectors.T, [[1, 0, 0.5**0.5], [0, 1, 0.5**0.5], [0.5**0.5, 0.5**0.5, 1]], atol=1e-6
    )


def test_the_dimension_is_cut_to_the_rank_of_the_texts():
    assert make_embedder("lsa", dim=64, seed=0).fit(TEXTS).space.dim == 5
    assert make_embedder("lsa", dim=64, seed=0).fit([*TEXTS[:2], *TEXTS[:2]]).space.dim == 2
    assert make_embedder("lsa", dim=64, seed=0).fit(["one"]).space.dim == 1


def test_the_number_of_threads_changes_no_byte():
    texts = random_texts(600)

    def bytes_with(n_threads):
        with threadpool_limits(n_threads):
            embedder = Lsa(dim=32, seed=0).fit(texts)
            return embedder.files(), embedder.embed(texts).vectors.tobytes()

    assert bytes_with(1) == bytes_with(4)


def test_another_seed_or_another_text_is_another_fit():
    texts = random_texts(200)
    fits = {
        Lsa(dim=8, seed=0).fit(texts).space.fit,
        Lsa(dim=8, seed=1).fit(texts).space.fit,
        Lsa(dim=8, seed=0).fit([*texts, "word1 word2"]).space.fit,
    }
    assert len(fits) == 3
    assert Lsa(dim=8, seed=0).fit(texts).space.fit in fits


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from([*WORDS[:8], "unseen", "", "é"]), max_size=5).map(" ".join), min_size=1, max_size=6
    )
)
def test_a_text_has_the_same_vector_in_any_company(texts):
    together = FITTED.embed(texts).vectors
    alone = np.concatenate([FITTED.embed([text]).vectors for text in texts])
    assert together.tobytes() == alone.tobytes()
    assert embed_repeated(FITTED, texts).vectors.tobytes() == together.tobytes()


FITTED = Lsa(dim=6, seed=0).fit(random_texts(30))


def test_a_text_without_a_known_word_has_no_direction():
    embeddings = Lsa(dim=4, seed=0).fit(TEXTS).embed(["xylophone", "", "pilot xylophone"])
    assert embeddings.is_known.tolist() == [False, False, True]
    assert not embeddings.vectors[:2].any()


def test_reading_tastes_tells_who_likes_what():
    texts = ["I love war. I dislike romance.", "I love romance. I dislike war.", "I enjoy war and hate romance"]
    words = Lsa(dim=4, seed=0).fit(texts).embed(texts[:2]).vectors
    np.testing.assert_allclose(words[0], words[1], atol=1e-6)
    tastes = Lsa(dim=4, seed=0, reads="tastes").fit(texts).embed(texts).vectors
    assert tastes[0] @ tastes[1] < 0.1
    assert tastes[0] @ tastes[2] > 0.5


def test_a_loaded_fit_reads_as_it_was_fitted(tmp_path):
    embedder = Lsa(dim=4, seed=0, reads="tastes").fit([*TEXTS, "I like war", "I dislike war"])
    write_files(embedder, tmp_path)
    texts = ["I like war but dislike stars", "I dislike war"]
    assert load_embedder(tmp_path).embed(texts).vectors.tobytes() == embedder.embed(texts).vectors.tobytes()


def test_unknown_words_change_nothing():
    embedder = Lsa(dim=4, seed=0).fit(TEXTS)
    plain, decorated = embedder.embed(["love and war", "love zebra and war"]).vectors
    assert plain.tobytes() == decorated.tobytes()


def test_the_vocabulary_holds_the_fitted_words_only():
    embedder = Lsa(dim=2, seed=0).fit(["M is a film", "Amélie, film"])
    embedder.embed(["canary"])
    assert embedder.vocabulary == ["a", "amelie", "film", "is", "m"]


def test_a_loaded_fit_gives_identical_vectors(tmp_path):
    embedder = Lsa(dim=4, seed=0).fit(TEXTS)
    write_files(embedder, tmp_path)
    loaded = load_embedder(tmp_path)
    assert loaded.space == embedder.space
    assert loaded.embed(TEXTS).vectors.tobytes() == embedder.embed(TEXTS).vectors.tobytes()


@pytest.mark.parametrize("name", ["embedder.json", "vocabulary.json", "idf.npy", "components.npy"])
def test_a_damaged_or_missing_file_is_named(tmp_path, name):
    write_files(Lsa(dim=4, seed=0).fit(TEXTS), tmp_path)
    content = (tmp_path / name).read_bytes()
    for damaged in (content[: len(content) // 2], content[:-9] + bytes([content[-9] ^ 1]) + content[-8:], b""):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(DataError, match=str(tmp_path)):
            load_embedder(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(MissingInputError, match=name):
        load_embedder(tmp_path)


def test_a_file_of_another_fit_is_refused(tmp_path):
    write_files(Lsa(dim=4, seed=0).fit(TEXTS), tmp_path)
    (tmp_path / "idf.npy").write_bytes(Lsa(dim=4, seed=0).fit([*TEXTS, "a war"]).files()["idf.npy"])
    with pytest.raises(DataError, match="aren't those of fit lsa/4/"):
        load_embedder(tmp_path)


def test_vectors_of_different_fits_are_not_compared():
    here, there = Lsa(dim=2, seed=0).fit(TEXTS).space, Lsa(dim=2, seed=0).fit(TEXTS[:4]).space
    require_same_space(here, Space(here.embedder, here.dim, here.fit), where="test")
    with pytest.raises(DataError, match="can't be compared"):
        require_same_space(here, there, where="test")


@pytest.mark.parametrize("texts", [[], [""], ["  ", "\n"], ["!?", "--"]])
def test_texts_without_a_word_can_not_be_fitted(texts):
    with pytest.raises(DataError, match=f"{len(texts)} texts"):
        Lsa(dim=2, seed=0).fit(texts)
