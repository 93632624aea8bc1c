"""PEFT folders that come from anywhere: nothing in them runs, and whatever is wrong is one line."""

import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from personas_tune.adapters.peft_config import PLAIN
from personas_tune.adapters.peft_files import PEFT_CONFIG, PEFT_WEIGHTS, read_peft, save_peft
from personas_tune.adapters.peft_form import PeftAdapter
from personas_tune.errors import CheckpointError, PersonasTuneError

NAME = "base_model.model.model.layers.0.self_attn.o_proj"
SOUND = {f"{NAME}.lora_A.weight": torch.ones(2, 4), f"{NAME}.lora_B.weight": torch.ones(4, 2)}


class Bomb:
    """Leaves a trace if anybody unpickles it."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


def written(folder):
    save_peft(folder, PeftAdapter(SOUND, {**PLAIN, "target_modules": ["o_proj"]}), {})
    return folder


def weights_of(change):
    return lambda folder: save_file(change(dict(SOUND)), folder / PEFT_WEIGHTS)


def weights_bytes(content):
    return lambda folder: (folder / PEFT_WEIGHTS).write_bytes(content((folder / PEFT_WEIGHTS).read_bytes()))


def config_text(text):
    return lambda folder: (folder / PEFT_CONFIG).write_bytes(text.encode())


def pickled_bin(folder):
    (folder / PEFT_WEIGHTS).unlink()
    with (folder / "adapter_model.bin").open("wb") as stream:
        pickle.dump(Bomb(folder / "boom"), stream)


def pickled_in_disguise(folder):
    with (folder / PEFT_WEIGHTS).open("wb") as stream:
        pickle.dump(Bomb(folder / "boom"), stream)


def zip_in_disguise(folder):
    torch.save(SOUND, folder / PEFT_WEIGHTS)


def folder_in_its_place(folder):
    (folder / PEFT_WEIGHTS).unlink()
    (folder / PEFT_WEIGHTS).mkdir()


def header(text, length=None):
    body = text.encode()
    return lambda _: struct.pack("<Q", len(body) if length is None else length) + body


def one(dtype, shape, n_bytes, name=f"{NAME}.lora_A.weight"):
    """A file of a single weight, zeros that take no room on the disk."""
    head = json.dumps({name: {"dtype": dtype, "shape": shape, "data_offsets": [0, n_bytes]}}).encode()

    def write(folder):
        with (folder / PEFT_WEIGHTS).open("wb") as stream:
            stream.write(struct.pack("<Q", len(head)) + head)
            stream.truncate(8 + len(head) + n_bytes)

    return write


def many(n_weights):
    entry = '"base_model.model.m%d.lora_A.weight": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}'
    return weights_bytes(header("{" + ", ".join(entry % number for number in range(n_weights)) + "}"))


def twice(weights):
    magnitude = f"{NAME}.lora_magnitude_vector"
    return {**weights, magnitude: torch.ones(4), f"{magnitude}.weight": torch.ones(4)}


OVERLAPPING = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}})
HOSTILE = {
    "no folder": (lambda f: f.rename(f.with_name("gone")), "PEFT folder not found"),
    "no config": (lambda f: (f / PEFT_CONFIG).unlink(), f"{PEFT_CONFIG}: file not found"),
    "no weights": (lambda f: (f / PEFT_WEIGHTS).unlink(), f"{PEFT_WEIGHTS}: file not found"),
    "a pickle": (pickled_bin, "a pickle may run code, so it isn't read"),
    "a pickle in disguise": (pickled_in_disguise, "a pickle, which isn't read"),
    "a zip in disguise": (zip_in_disguise, "a pickle, which isn't read"),
    "a folder in its place": (folder_in_its_place, f"{PEFT_WEIGHTS}: file not found"),
    "truncated": (weights_bytes(lambda whole: whole[:-20]), "not a sound safetensors file"),
    "header only": (weights_bytes(lambda whole: whole[:12]), "not a sound safetensors file"),
    "empty": (weights_bytes(lambda whole: b""), "not a sound safetensors file"),
    "more than all": (weights_bytes(lambda whole: whole + b"more"), "not a sound safetensors file"),
    "an over-long header": (weights_bytes(header("{}", 1 << 62)), "not a sound safetensors file"),
    "a long header": (weights_bytes(header("{}", 200_000_000)), "not a sound safetensors file"),
    "a header that is none": (weights_bytes(header("[]")), "not a sound safetensors file"),
    "a header beyond the file": (weights_bytes(header(OVERLAPPING)), "not a sound safetensors file"),
    "a long header that is there": (weights_bytes(header(" " * (1 << 24) + "{}")), "a header of 16777218 bytes"),
    "long metadata": (
        lambda f: save_file(SOUND, f / PEFT_WEIGHTS, metadata={"about": "[" * (1 << 24)}), "(a header of 1677"
    ),
    "10,001 weights": (many(10_001), "(10001 weights; an adapter has at most 10000)"),
    "100,000 weights": (many(100_000), "not a sound safetensors file (a header of"),
    "4 bits": (one("F4", [4, 2], 4), "lora_A.weight' has 2 dimensions and is of type F4; save the adapter as"),
    "8 bits": (one("F8_E4M3", [4, 2], 8), "has 2 dimensions and is of type F8_E4M3"),
    "integers": (weights_of(lambda w: {n: weight.int() for n, weight in w.items()}), "is of type I32"),
    "complex": (one("C64", [1], 8), "has 1 dimensions and is of type C64"),
    "three dimensions": (one("F32", [1 << 62, 0, 1 << 62], 0), "has 3 dimensions and is of type F32"),
    "65 dimensions": (one("F32", [1] * 65, 4), "has 65 dimensions"),
    "a type of another terminal": (one("\x1b[31mF" + "x" * 9000, [1], 4), "unknown variant"),
    "a name of another terminal": (one("F32", [1], 4, "\x1b[2J\n"), "weight '\\x1b[2J\\n' is neither A, B nor"),
    "an endless name": (one("F32", [1], 4, "x" * 100_000), "is neither A, B nor magnitude"),
    "a magnitude twice": (weights_of(twice), "lora_magnitude_vector.weight' is there twice"),
    "no json": (config_text("{"), "not a PEFT config"),
    "no text": (lambda f: (f / PEFT_CONFIG).write_bytes(b"\xff\xfe\x00"), "not a PEFT config"),
    "a list": (config_text("[1]"), "a list in the place of an object"),
    "a number": (config_text("3"), "a int in the place of an object"),
    "nested": (config_text("[" * 100_000), "not a PEFT config"),
    "endless": (config_text('{"a": "' + "x" * (1 << 21) + '"}'), "not a PEFT config (it has 2"),
    "a long number": (config_text('{"r": 1' + "0" * 5000 + "}"), "not a PEFT config"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "line"), HOSTILE.values(), ids=HOSTILE)
def test_whatever_is_wrong_with_a_folder_is_one_line(damage, line, tmp_path):
    folder = written(tmp_path / "adapter")
    damage(folder)
    with pytest.raises(PersonasTuneError) as caught:
        read_peft(folder)
    (told,) = caught.value.lines
    assert line in told
    assert str(folder) in told
    assert "; " in told  # what would help
    assert told.isprintable()
    assert len(told) < 500 + len(str(folder))
    assert not (folder / "boom").exists()


@pytest.mark.parametrize("file", [PEFT_CONFIG, PEFT_WEIGHTS, "."])
@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_one_line(file, tmp_path):
    folder = written(tmp_path / "adapter")
    (folder / file).chmod(0)
    try:
        with pytest.raises(CheckpointError, match=r"can't be read \(Permission denied\); check the path and its perm"):
            read_peft(folder)
    finally:
        (folder / file).chmod(0o700)


def test_a_path_that_is_too_long_is_one_line(tmp_path):
    with pytest.raises(CheckpointError, match=r"x{300}: can't be read \(File name too long\); check the path"):
        read_peft(tmp_path / ("x" * 300))


IMPORTED = """
import resource, sys
from pathlib import Path
import torch
from personas_tune.adapters.layouts import Layout
from personas_tune.adapters.peft_files import read_peft
from personas_tune.adapters.peft_import import from_peft
from personas_tune.errors import AdapterError
layout = Layout("llama", 1, 2, 2, 2, 4, 8, 10, False, True, False)
module = "layers.0.attn.output_proj"
fresh = {f"{module}.lora_a.weight": torch.zeros(2, 4), f"{module}.lora_b.weight": torch.zeros(4, 2)}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    from_peft(read_peft(Path(sys.argv[1])), layout, fresh=fresh, alpha=2, where="there")
except AdapterError as error:
    print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_weight_that_does_not_fit_takes_no_memory(tmp_path):
    gigabyte = 1 << 30
    head = {
        f"{NAME}.lora_A.weight": {"dtype": "F32", "shape": [2, gigabyte // 8], "data_offsets": [0, gigabyte]},
        f"{NAME}.lora_B.weight": {"dtype": "F32", "shape": [4, 2], "data_offsets": [gigabyte, gigabyte + 32]},
    }
    save_peft(tmp_path, PeftAdapter(SOUND, {**PLAIN, "r": 2, "target_modules": ["o_proj"]}), {})
    text = json.dumps(head).encode()
    with (tmp_path / PEFT_WEIGHTS).open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + gigabyte + 32)
    told = subprocess.run([sys.executable, "-c", IMPORTED, tmp_path], capture_output=True, text=True, check=True)
    refusal, grown = told.stdout.splitlines()
    assert "has A of 2 x 134217728 and B of 4 x 2, this base takes rank x 4" in refusal
    assert int(grown) < 100_000  # kB


def test_a_header_may_begin_with_the_byte_that_a_pickle_begins_with(tmp_path):
    written(tmp_path)
    content = (tmp_path / PEFT_WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    text = content[8 : 8 + length].ljust(0x180)  # bytes 80 01 00 ...
    (tmp_path / PEFT_WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    assert all(torch.equal(weight, SOUND[name]) for name, weight in read_peft(tmp_path).weights.items())


def test_a_sound_folder_is_read_with_what_it_says_of_itself(tmp_path):
    read = read_peft(written(tmp_path))
    assert read.weights.keys() == SOUND.keys()
    assert read.config["target_modules"] == ["o_proj"]


@pytest.mark.parametrize("about", ["{", "[1]", "[" * 100_000])
def test_what_others_say_in_metadata_is_passed_over(about, tmp_path):
    written(tmp_path)
    save_file(SOUND, tmp_path / PEFT_WEIGHTS, metadata={"about": about})
    assert read_peft(tmp_path).about == {}
