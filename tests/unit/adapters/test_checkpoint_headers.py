"""Checkpoints told by their headers: what fits and what doesn't, for every family; damaged and hostile files."""

import json
import struct

import pytest
import torch
from families import FAMILIES, checkpoint_files, checkpointer_section, hf_config, model_section, write_checkpoint
from safetensors.torch import save_file

from personas_tune.adapters.base_model import _load_weights, build_on_meta
from personas_tune.adapters.checkpoint_headers import INDEX, check_index, misfits, read_headers, read_object
from personas_tune.errors import CheckpointError


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    return {name: write_checkpoint(name, folder / name) for name in FAMILIES}


def headers_of(folder):
    return read_headers([folder / name for name in checkpoint_files(folder)])


def misfits_of(name, folder, **changes):
    network = build_on_meta(model_section(name, **changes), "fp32")
    return misfits(network, headers_of(folder), hf_config(folder), FAMILIES[name].model_type)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_headers_of_a_fitting_checkpoint_fit_as_its_weights_do(name, checkpoints):
    from omegaconf import OmegaConf
    from torchtune import config

    assert misfits_of(name, checkpoints[name]) == []
    network = config.instantiate(OmegaConf.create(model_section(name)))
    _load_weights(network, checkpointer_section(name, checkpoints[name]))  # raises if they don't
    assert set(headers_of(checkpoints[name]).dtypes) == {"F32"}


@pytest.mark.parametrize("name", ["phi3", "llama3", "qwen2"])
def test_another_size_or_number_of_layers_is_named(name, checkpoints):
    (first, *_) = misfits_of(name, checkpoints[name], embed_dim=64)
    assert first.startswith("tok_embeddings.weight: checkpoint (96, 32), model (96, 64)")
    assert misfits_of(name, checkpoints[name], num_layers=3)[0].startswith("it lacks layers.2.")
    assert "which the model has not" in misfits_of(name, checkpoints[name], num_layers=1)[0]


def test_adapters_are_no_part_of_a_checkpoint(checkpoints):
    assert misfits_of("phi3", checkpoints["phi3"], use_dora=True) == []


def test_another_architectures_names_are_told_in_a_line(checkpoints):
    folder = checkpoints["llama3"]
    network = build_on_meta(model_section("phi3"), "fp32")
    with pytest.raises(CheckpointError, match="don't have the names or shapes of PHI3_MINI"):
        misfits(network, headers_of(folder), hf_config(folder), "PHI3_MINI")


def test_a_model_type_that_is_not_known_is_not_judged(checkpoints):
    network = build_on_meta(model_section("llama3"), "fp32")
    assert misfits(network, headers_of(checkpoints["llama3"]), {}, "LLAMA3_VISION") is None


@pytest.mark.parametrize("described", [{}, {"num_attention_heads": "x", "hidden_size": 32},
                                       {"num_attention_heads": 0, "hidden_size": 0},
                                       {"num_attention_heads": 7, "hidden_size": 31}])  # fmt: skip
def test_a_config_without_usable_sizes_is_told_in_a_line(described, checkpoints):
    network = build_on_meta(model_section("llama3"), "fp32")
    with pytest.raises(CheckpointError) as caught:
        misfits(network, headers_of(checkpoints["llama3"]), described, "LLAMA3")
    assert len(caught.value.lines) == 1


# Files


def test_shards_and_their_index_are_read(tmp_path):
    folder = write_checkpoint("llama3", tmp_path / "m", shard_size="20KB")
    files = [folder / name for name in checkpoint_files(folder)]
    headers = read_headers(files)
    assert len(files) > 1
    assert check_index(folder, files, headers) == f"{len(headers.weights)} weights in {len(files)} files"
    with pytest.raises(CheckpointError, match=r"is not among checkpointer\.checkpoint_files"):
        check_index(folder, files[:-1], read_headers(files[:-1]))
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["one.more"] = files[0].name
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"weight 'one\.more' is in none of the files"):
        check_index(folder, files, headers)
    (folder / INDEX).unlink()
    assert check_index(folder, files, headers) is None


@pytest.mark.parametrize("text", ["", "[]", "{", '"a"', '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "[" * 100_000])
def test_a_damaged_index_is_told_in_a_line(text, tmp_path):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CheckpointError):
        check_index(tmp_path, [], read_headers([]))


def test_two_files_with_one_weight_are_refused(tmp_path):
    for name in "ab":
        save_file({"w": torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="weight 'w' is in another file, too"):
        read_headers([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])


def whole_file():
    header = json.dumps({"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(16)


def with_header(header):
    return struct.pack("<Q", len(header)) + header


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00",
        whole_file()[:-1],
        whole_file()[:20],
        whole_file() + b"more",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 200_000_000) + b"{}",
        with_header(b"[]"),
        with_header(b"[" * 50_000),
        with_header(b'{"w": {"dtype": "F32", "shape": [99999999999, 99999999999], "data_offsets": [0, 4]}}') + bytes(4),
        with_header(b'{"w": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}') + bytes(4),
        b"\x80\x04\x95" + b"pickle" * 10,
        b"PK\x03\x04" + bytes(64),
    ],
)  # fmt: skip
def test_what_is_no_whole_safetensors_file_is_told_in_a_line(content, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="no whole safetensors file") as caught:
        read_headers([file])
    assert len(caught.value.lines) == 1


def test_a_whole_file_is_read(tmp_path):
    (tmp_path / "m.safetensors").write_bytes(whole_file())
    headers = read_headers([tmp_path / "m.safetensors"])
    assert (dict(headers.dtypes), headers.n_bytes) == ({"F32": 1}, len(whole_file()))
    assert headers.weights["w"].shape == (2, 2)
    assert headers.weights["w"].is_meta


@pytest.mark.parametrize("text", ["[]", "3", "{", "\udcff", "null"])
def test_json_that_is_no_object_is_told_in_a_line(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError):
        read_object(tmp_path / "config.json")
