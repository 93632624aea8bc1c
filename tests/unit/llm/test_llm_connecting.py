import asyncio
from collections.abc import Iterator

import openai
import pytest

from personas_tune.errors import ConfigError
from personas_tune.llm.client import Client
from personas_tune.llm.connecting import connect
from personas_tune.llm.settings import ServerSettings, access_to

URL = "http://localhost:1/v1"


@pytest.fixture(params=[openai.AsyncOpenAI, openai.OpenAI])
def kind(request) -> Iterator[type]:
    return request.param


def error_of(kind: type, base_url: str = URL) -> str:
    server = ServerSettings("gpt-4o", base_url)
    with pytest.raises(ConfigError) as told:
        connect(kind, server, access_to(server, {}))
    assert told.value.__context__ is None
    assert "\n" not in str(told.value)
    return str(told.value)


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("ALL_PROXY", "socks5://localhost:1", "Using SOCKS proxy, but the 'socksio' package is not installed"),
        ("HTTP_PROXY", "localhost:abc", "Invalid port: 'abc'"),
        ("HTTP_PROXY", "foo://localhost:1", "Unknown scheme for proxy URL"),
        ("SSL_CERT_FILE", "/no/such/file", "No such file or directory"),
        ("SSL_CERT_FILE", __file__, "no certificate or crl found"),
        ("OPENAI_ORG_ID", "Bücher", "the header OpenAI-Organization holds characters that can't be sent"),
        ("OPENAI_PROJECT_ID", "a\nb", "the header OpenAI-Project holds characters that can't be sent"),
    ],
)
def test_what_the_environment_spoils_is_told_in_one_line(kind, monkeypatch, variable, value, words):
    monkeypatch.setenv(variable, value)
    told = error_of(kind)
    assert told.startswith(f"{URL}: can't connect: ")
    assert words in told
    assert told.endswith("; see to base_url and to the environment's proxies, SSL_CERT_FILE and OPENAI_... variables")


def test_an_address_that_the_library_cannot_do_with_is_told(kind):
    assert "can't connect: Invalid non-printable ASCII character in URL" in error_of(kind, "http://a\x01b/v1")


def test_a_proxys_password_is_not_shown(kind, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://me:canary/1@localhost:1")
    assert error_of(kind).startswith(f"{URL}: can't connect: InvalidURL; see to base_url")


def test_the_client_connects_so(monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", "/no/such/file")
    server = ServerSettings("gpt-4o", URL)
    with pytest.raises(ConfigError, match="can't connect: "):
        Client(server, access_to(server, {}))


def test_what_can_be_connected_retries_nothing_itself(kind):
    server = ServerSettings("gpt-4o", URL, timeout_s=7.0)
    connection = connect(kind, server, access_to(server, {}))
    assert (connection.max_retries, connection.timeout) == (0, 7.0)
    closed = connection.close()
    if closed is not None:
        asyncio.run(closed)
