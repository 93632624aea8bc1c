"""Pushing folders to a hub on the loopback."""

import pytest
from hub_server import start_hub

from personas_tune.errors import ConfigError, ServerError
from personas_tune.export.hub import push_folder, require_token


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# x\n")
    (tmp_path / "adapter_config.json").write_text("{}")
    return tmp_path


@pytest.fixture
def hub(monkeypatch):
    with start_hub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


def push(folder, token="hf_good", **changes):
    return push_folder(folder, "me/agents-0", **{"token": token, "private": True, "message": "hello", **changes})


def test_a_folder_is_uploaded_to_a_private_repository(folder, hub):
    assert push(folder) == f"{hub.url}/me/agents-0"
    assert hub.repositories == {"me/agents-0": True}
    assert hub.files["me/agents-0"] == {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "adapter_config.json").write_text('{"r": 1}')
    push(folder)  # it is there already
    assert hub.files["me/agents-0"]["adapter_config.json"] == b'{"r": 1}'


def test_a_repository_then_holds_what_the_folder_holds_and_nothing_else(folder, hub):
    push(folder)
    (folder / "adapter_config.json").unlink()
    (folder / "model.safetensors").write_bytes(b"merged")
    push(folder)
    assert sorted(hub.files["me/agents-0"]) == ["README.md", "model.safetensors"]


def test_a_public_one_is_asked_for(folder, hub):
    push(folder, private=False)
    assert hub.repositories == {"me/agents-0": False}


def test_a_refused_token_is_told_in_a_line_that_does_not_hold_it(folder, hub):
    with pytest.raises(ServerError, match=r"export\.push_to me/agents-0: can't be pushed \(.*401") as caught:
        push(folder, token="hf_secret")
    assert "hf_secret" not in str(caught.value)
    assert hub.files == {}


def test_no_hub_is_told_in_a_line(folder, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ServerError, match=r"can't be pushed \(.+\); check the name, HF_TOKEN and the connection"):
        push(folder)


@pytest.mark.parametrize("value", [None, " "])
def test_without_a_token_nothing_is_asked(value, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if value is not None:
        monkeypatch.setenv("HF_TOKEN", value)
    with pytest.raises(ConfigError, match=r"export\.push_to: HF_TOKEN is not set; export HF_TOKEN="):
        require_token()
