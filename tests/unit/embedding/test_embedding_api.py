import asyncio
import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from loopback.models import embed as embed_at_server
from loopback.models import n_tokens
from openai_server import start_server

from personas_tune.embedding import EmbeddingSettings, load_embedder
from personas_tune.embedding.api import ApiModel
from personas_tune.embedding.lookup import _ask, vectors_of
from personas_tune.embedding.vectors import embed_repeated
from personas_tune.errors import BudgetError, DataError, JournalError, ServerError
from personas_tune.llm.journal import Attempt, Journal, Usage
from personas_tune.llm.settings import ServerSettings

TEXTS = ["A rebel pilot joins a war", "Two painters in love", "A clumsy waiter wrecks a wedding", "Ü, 愛 and 🎬"]
LIMIT = 100  # characters that the plain server takes in a text
BATCH = 20  # texts that it takes in a request


@pytest.fixture
def connect(tmp_path, monkeypatch):
    """Settings for a server's address."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def settings_for(base_url, *, journal="journal", bounds=None, **more):
        server = ServerSettings("text-embedding-ada-002", base_url, **(bounds or {}))
        return EmbeddingSettings(server, tmp_path / f"{journal}.sqlite", **more)

    return settings_for


class SharedServer:
    """A server that all tests here use, as one of them sees it: what it did before doesn't show."""

    def __init__(self, server):
        self.base_url, self.set = server.base_url, server.set
        self._server = server
        self._n_billed, self._n_calls = len(server.billed()), self._all_calls()

    def _all_calls(self):
        return self._server.counts()["asked"].get("POST /v1/embeddings", 0)

    def tokens_billed(self):
        return [entry["usage"]["prompt_tokens"] for entry in self._server.billed()[self._n_billed :]]

    def n_calls(self):
        return self._all_calls() - self._n_calls


@pytest.fixture(scope="module")
def running_server():
    with start_server() as server:
        yield server


@pytest.fixture
def server(running_server):
    yield SharedServer(running_server)
    running_server.set(faults={}, dimensions=64)


class PlainServer(BaseHTTPRequestHandler):
    """A local server: lists of numbers whatever is asked for, the last first, no usage; bounded texts and requests."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self._answer(404, {"error": {"message": "Not found"}})

    def do_POST(self):
        texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["input"]
        longest = max(map(len, texts))
        if longest > LIMIT:
            words = f"This model's maximum context length is {LIMIT} tokens, however you requested {longest} tokens."
            self._answer(400, {"error": {"message": words, "type": "invalid_request_error"}})
        elif len(texts) > BATCH:
            self._answer(413, {"error": f"batch size {len(texts)} > maximum allowed batch size {BATCH}"})
        else:
            data = [{"index": i, "embedding": embed_at_server(text, 32)} for i, text in enumerate(texts)]
            self._answer(200, {"data": data[::-1]})

    def _answer(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def plain_server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), PlainServer)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()
    thread.join()


def expected(texts, dimensions=64):
    return np.array([embed_at_server(text, dimensions) for text in texts])


def test_vectors_are_the_servers_and_of_unit_length(connect, server):
    embedder = ApiModel(connect(server.base_url)).fit(TEXTS)
    embeddings = embedder.embed(TEXTS)
    assert embeddings.vectors.dtype == np.float32
    assert (embeddings.space.embedder, embeddings.space.dim) == ("openai", 64)
    np.testing.assert_allclose(embeddings.vectors, expected(TEXTS), atol=1e-7)
    np.testing.assert_allclose(np.linalg.norm(embeddings.vectors, axis=1), 1, atol=1e-6)


def test_dimensions_are_asked_for(connect, server):
    embedder = ApiModel(connect(server.base_url, dimensions=16)).fit(TEXTS)
    assert embedder.space.dim == 16
    np.testing.assert_allclose(embedder.embed(TEXTS).vectors, expected(TEXTS, 16), atol=1e-7)


def test_a_text_is_paid_for_once_and_a_new_one_alone(connect, server):
    settings = connect(server.base_url, inputs_per_request=3)
    first = ApiModel(settings).fit(TEXTS).embed([*TEXTS, TEXTS[0]])
    assert server.tokens_billed() == [sum(map(n_tokens, TEXTS[:3])), n_tokens(TEXTS[3])]
    again = ApiModel(settings).fit(["of love", *TEXTS]).embed(TEXTS)
    assert again.vectors.tobytes() == first.vectors[:4].tobytes()
    assert server.tokens_billed()[2:] == [n_tokens("of love")]


def test_nothing_is_asked_when_all_is_known(connect, server):
    settings = connect(server.base_url)
    before = ApiModel(settings).fit(TEXTS).embed(TEXTS)
    nowhere = replace(settings, server=replace(settings.server, base_url="http://127.0.0.1:9/v1"))
    assert ApiModel(nowhere).fit(TEXTS).embed(TEXTS).vectors.tobytes() == before.vectors.tobytes()
    assert server.n_calls() == 1


def test_equal_texts_are_sent_once(connect, server):
    embedder = ApiModel(connect(server.base_url)).fit([TEXTS[0]] * 50)
    assert server.tokens_billed() == [n_tokens(TEXTS[0])]
    vectors = embedder.embed([TEXTS[0]] * 50).vectors
    assert (vectors == vectors[0]).all()
    assert embed_repeated(embedder, [TEXTS[0]] * 50).vectors.tobytes() == vectors.tobytes()


def test_other_models_and_dimensions_are_paid_for_anew(connect, server):
    settings = connect(server.base_url)
    other_model = replace(settings, server=replace(settings.server, model="text-embedding-3-small"))
    spaces = {ApiModel(each).fit(TEXTS).space for each in (settings, other_model, replace(settings, dimensions=64))}
    assert len(spaces) == len(server.tokens_billed()) == 3
    assert {space.dim for space in spaces} == {64}


def test_requests_hold_at_most_so_many_texts_and_characters(connect, server):
    texts = [f"{n} {'war ' * 30_000}" for n in range(5)]  # 120,000 characters each
    ApiModel(connect(server.base_url)).fit(texts)
    assert [round(n / 30_000) for n in server.tokens_billed()] == [3, 2]


def test_blank_texts_are_never_sent_and_have_no_direction(connect, server):
    embedder = ApiModel(connect(server.base_url)).fit(["", TEXTS[0]])
    assert embedder.embed(["", TEXTS[0], " \n"]).is_known.tolist() == [False, True, False]
    assert embedder.embed([]).vectors.shape == (0, 64)
    assert len(server.tokens_billed()) == 1
    with pytest.raises(DataError, match="none of the 2 texts to embed holds a word"):
        ApiModel(connect(server.base_url)).fit(["", "  "])


def test_faults_change_no_vector(connect, server, openai_server):
    texts = [f"film {n} of {TEXTS[n % 4]}" for n in range(60)]
    faults = {"rate_limited": 0.15, "server_error": 0.1, "reset": 0.05, "half_body": 0.05, "wrong_json": 0.1}
    faulty = openai_server(faults=faults, retry_after_s=0.01)
    bounds = {"inputs_per_request": 2}
    broken = ApiModel(connect(faulty.base_url, journal="a", **bounds)).fit(texts).embed(texts)
    unbroken = ApiModel(connect(server.base_url, journal="b", **bounds)).fit(texts).embed(texts)
    assert set(faulty.counts()["billed"]) > {"ok", "wrong_json"}
    assert broken.vectors.tobytes() == unbroken.vectors.tobytes()
    assert broken.space == unbroken.space


def test_an_answer_with_too_few_vectors_is_rejected_now_and_later(connect, server):
    server.set(faults={"wrong_json": 1.0})
    settings = connect(server.base_url)
    words = r"4 of 4 texts could not be embedded, the first 'A rebel.*' \({} answers rejected, the last: 3 vectors"
    for n_billed in (3, 6):
        with pytest.raises(DataError, match=words.format(n_billed)) as caught:
            ApiModel(settings).fit(TEXTS)
        assert len(caught.value.lines) == 1
        assert len(server.tokens_billed()) == n_billed
    server.set(faults={})
    np.testing.assert_allclose(ApiModel(settings).fit(TEXTS).embed(TEXTS).vectors, expected(TEXTS), atol=1e-7)


def test_a_local_server_may_answer_in_lists_of_numbers_in_any_order(connect, plain_server):
    np.testing.assert_allclose(
        ApiModel(connect(plain_server)).fit(TEXTS).embed(TEXTS).vectors, expected(TEXTS, 32), atol=1e-7
    )


def test_requests_larger_than_a_server_takes_are_made_smaller(connect, plain_server):
    texts = [f"film {n} of {TEXTS[n % 4]}" for n in range(200)]
    embeddings = ApiModel(connect(plain_server, inputs_per_request=60)).fit(texts).embed(texts)
    np.testing.assert_allclose(embeddings.vectors, expected(texts, 32), atol=1e-7)


@pytest.mark.parametrize("n_texts", [1, 2, 18, 200])
def test_a_text_that_is_too_long_is_named_in_the_servers_words(connect, plain_server, n_texts):
    texts = [f"film {n} of {TEXTS[n % 4]}" for n in range(n_texts)]
    texts[n_texts // 2] = "endless " * 20
    words = (
        "model text-embedding-ada-002: 1 of .* texts could not be embedded, the first "
        r"'endless endless .*\.\.\.' \(HTTP 400: This model's maximum context length is 100 tokens, however you "
        r"requested 160 tokens\.\); mend the text"
    )
    settings = connect(plain_server)
    with pytest.raises(DataError, match=words) as caught:
        ApiModel(settings).fit(texts)
    assert len(caught.value.lines) == 1
    others = [text for text in texts if "endless" not in text]
    if others:
        np.testing.assert_allclose(
            ApiModel(settings).fit(others).embed(others).vectors, expected(others, 32), atol=1e-7
        )


def test_a_refusal_of_everything_is_told_without_asking_for_everything(connect, server):
    server.set(faults={"bad_request": 1.0})
    texts = [f"film {n}" for n in range(300)]
    with pytest.raises(DataError, match="HTTP 400: This request is not to the server's liking"):
        ApiModel(connect(server.base_url, inputs_per_request=64, bounds={"concurrency": 2})).fit(texts)
    assert server.n_calls() < 20


def test_a_model_that_is_not_there_is_told_in_the_servers_words(connect, server):
    settings = connect(server.base_url)
    with pytest.raises(ServerError, match="The model `nope` does not exist"):
        ApiModel(replace(settings, server=replace(settings.server, model="nope"))).fit(TEXTS)


def test_the_budget_holds_for_embeddings_too(connect, server):
    settings = connect(server.base_url, inputs_per_request=1, bounds={"max_tokens": 14, "concurrency": 1})
    with pytest.raises(BudgetError, match="max_tokens"):
        ApiModel(settings).fit(TEXTS)
    n_billed = len(server.tokens_billed())
    assert 1 <= n_billed < 4
    ApiModel(replace(settings, server=replace(settings.server, max_tokens=None))).fit(TEXTS)
    assert len(server.tokens_billed()) == 4


def test_two_at_once_are_told_so(connect, server):
    settings = connect(server.base_url)
    embedder = ApiModel(settings).fit(TEXTS)
    with Journal.open(settings.journal), pytest.raises(JournalError, match="is using it"):
        embedder.embed(TEXTS)


def test_a_model_that_changed_its_length_is_told(connect, server):
    server.set(dimensions=8)
    settings = connect(server.base_url)
    embedder = ApiModel(settings).fit(TEXTS)
    server.set(dimensions=16)
    with pytest.raises(DataError, match="vectors of 8 and of 16 numbers under the name of one model"):
        embedder.embed([*TEXTS, "new"])
    with pytest.raises(DataError, match="can't be compared"):
        embedder.embed(["new"])


def test_a_stored_embedder_gives_identical_vectors_and_pays_for_new_texts_alone(connect, server, tmp_path):
    settings = replace(connect(server.base_url, dimensions=16), stated_base_url="${oc.env:URL}")
    embedder = ApiModel(settings).fit(TEXTS)
    (tmp_path / "embedder.json").write_bytes(embedder.files()["embedder.json"])
    assert json.loads((tmp_path / "embedder.json").read_text()) == {
        "space": {"embedder": "openai", "dim": 16, "fit": embedder.space.fit},
        "model": "text-embedding-ada-002",
        "dimensions": 16,
        "version": "embeddings-1",
        "base_url": "${oc.env:URL}",
    }
    other = replace(settings, server=replace(settings.server, model="text-embedding-3-small"), dimensions=None)
    loaded = load_embedder(tmp_path, other)
    assert loaded.space == embedder.space
    assert loaded.embed(TEXTS).vectors.tobytes() == embedder.embed(TEXTS).vectors.tobytes()
    assert len(server.tokens_billed()) == 1
    loaded.embed(["new", *TEXTS])
    assert server.tokens_billed()[1:] == [n_tokens("new")]


@pytest.mark.parametrize("change", [{"model": "other"}, {"dimensions": 3}, {"dimensions": "x"}, {"model": None}])
def test_a_stored_embedder_that_was_changed_is_refused(connect, server, tmp_path, change):
    settings = connect(server.base_url)
    described = json.loads(ApiModel(settings).fit(TEXTS).files()["embedder.json"])
    (tmp_path / "embedder.json").write_text(json.dumps(described | change))
    with pytest.raises(DataError, match=r"embedder.json: (model and dimensions aren't those of fit|no model in it)"):
        load_embedder(tmp_path, settings)


def test_an_answer_that_a_kill_left_unread_is_used_only_if_it_is_whole(connect, server):
    """The journal keeps answers before they are read; the text's name alone must not make a bad one good."""
    settings = connect(server.base_url)
    call = next(_ask(tuple(TEXTS), settings))

    def keep(n_vectors):
        data = [{"index": place, "embedding": [3.0, 4.0 + place]} for place in range(n_vectors)]
        attempt = Attempt(
            call.request.sha256, "answered", 200, json.dumps({"data": data}), Usage(), None, settings.server.model,
            "online", 0.0, 0.0, call.parts,
        )  # fmt: skip
        with Journal.open(settings.journal) as journal:
            asyncio.run(journal.record(attempt))

    keep(4)
    assert ApiModel(settings).fit(TEXTS[2:]).embed([TEXTS[2]]).vectors.tolist() == [
        [np.float32(3 / 45**0.5), np.float32(6 / 45**0.5)]
    ]
    keep(3)
    with Journal.open(settings.journal) as journal:
        found = vectors_of(TEXTS[:2], settings, journal)
    assert {len(vector) for vector in found.values()} == {64}
    assert server.tokens_billed() == [sum(map(n_tokens, TEXTS[:2]))]
