import pytest

from personas_tune.errors import ConfigError, ServerError
from personas_tune.llm.budget import Prices
from personas_tune.llm.settings import ServerSettings, access_to, output_limit_name

KEY = "sk-canary/0123456789"


def access(base_url: str | None = None, **environment: str):
    return access_to(ServerSettings("gpt-4o", base_url=base_url), environment)


def test_settings_are_picked_from_a_section_with_more_keys():
    section = {"model": "m", "concurrency": 7, "prices": {"input": 1.0, "output": 2.0}, "batch_size": 10}
    assert ServerSettings.of(section) == ServerSettings("m", concurrency=7, prices=Prices(1.0, output=2.0))
    assert ServerSettings.of({"model": "m", "prices": None}).prices is None


def test_the_address_is_the_settings_then_the_environments_then_openais():
    assert access("http://a/v1", OPENAI_BASE_URL="http://b/v1").base_url == "http://a/v1"
    assert access(OPENAI_BASE_URL="http://b/v1").base_url == "http://b/v1"
    assert access(OPENAI_API_KEY=KEY).base_url == "https://api.openai.com/v1"


def test_only_openai_wants_a_key():
    assert access("http://localhost:8000/v1").api_key is None
    for base_url in (None, "https://api.openai.com/v1", "https://API.OpenAI.com:443/v1"):
        with pytest.raises(ServerError, match=r"https://api.openai.com: no key; export OPENAI_API_KEY=\.\.\."):
            access(base_url, OPENAI_API_KEY=" \n")


def test_a_key_may_end_with_a_newline_and_holds_no_odd_characters():
    assert access(OPENAI_API_KEY=KEY + "\n").api_key == KEY
    for odd in ("sk-“quoted”", "sk-two\nlines"):
        with pytest.raises(ServerError, match="OPENAI_API_KEY: holds characters that are in no key") as told:
            access(OPENAI_API_KEY=odd)
        assert "sk-" not in str(told.value)


@pytest.mark.parametrize(
    "base_url", ["localhost:8000/v1", "ftp://host/v1", "http://", "http://host:port/v1", "http://[::1"]
)
def test_what_is_no_address_is_told(base_url):
    with pytest.raises(ConfigError, match=r"base_url: '.*' is no address; such as http://localhost:8000/v1"):
        access(base_url)


def test_name_and_password_in_an_address_are_sent_and_never_shown():
    found = access("https://me:p%40ssword-canary@host:8000/v1", OPENAI_API_KEY=KEY)
    assert found.base_url == "https://host:8000/v1"
    assert found.basic == "Basic bWU6cEBzc3dvcmQtY2FuYXJ5"  # me:p@ssword-canary
    echo = f"{found.basic} me:p@ssword-canary p@ssword-canary {KEY}"
    assert found.redact(echo) == "Basic [key] [key] [key] [key]"
    for secret in ("ssword", "bWU6", KEY):
        assert secret not in repr(found)
    with pytest.raises(ConfigError) as told:
        access("https://me:password-canary@host:port/v1")
    assert "canary" not in str(told.value)


def test_a_query_is_refused_and_not_shown():
    with pytest.raises(ConfigError) as told:
        access("https://host/v1?token=canary")
    assert str(told.value) == ("base_url: a query doesn't reach the server's endpoints; give the address without it")


def test_the_output_limit_goes_by_the_address_and_needs_no_key():
    def name(base_url: str | None, **environment: str) -> str:
        return output_limit_name(ServerSettings("gpt-4o", base_url=base_url), environment)

    assert name(None) == name("https://API.OpenAI.com:443/v1", OPENAI_BASE_URL="http://b") == "max_completion_tokens"
    assert name(None, OPENAI_BASE_URL="http://b") == name("http://api.openai.com.local/v1") == "max_tokens"


def test_the_key_is_redacted_however_it_is_written():
    found = access("http://host/v1", OPENAI_API_KEY='sk-"canary/0123')
    echo = r'Bearer sk-"canary/0123 {"key": "sk-\"canary/0123"} ?key=sk-%22canary%2F0123'
    assert found.redact(echo) == 'Bearer [key] {"key": "[key]"} ?key=[key]'


def test_placeholders_of_local_servers_are_words_and_no_secrets():
    text = "none of the EMPTY ollama"
    for key in ("none", "EMPTY", "ollama"):
        assert access("http://host/v1", OPENAI_API_KEY=key).redact(text) == text
