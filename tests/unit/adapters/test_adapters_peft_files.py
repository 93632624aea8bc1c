"""PEFT folders that come from anywhere: nothing in them runs, and whatever is wrong is one line."""

import json
import pickle
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from personas_tune.adapters.peft_config import PLAIN
from personas_tune.adapters.peft_files import PEFT_CONFIG, PEFT_WEIGHTS, read_peft, save_peft
from personas_tune.adapters.peft_form import PeftAdapter
from personas_tune.errors import PersonasTuneError

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


def first(value, dtype=torch.float32):
    def change(weights):
        weight = next(iter(weights.values())).to(dtype, copy=True)
        weight[0, 0] = value
        return {**weights, next(iter(weights)): weight}

    return change


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
    "nan": (weights_of(first(float("nan"))), "lora_A.weight is not finite"),
    "infinity": (weights_of(first(float("inf"))), "lora_A.weight is not finite"),
    "nan in bf16": (weights_of(first(float("nan"), torch.bfloat16)), "lora_A.weight is not finite"),
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
    assert len(told) < 500 + len(str(folder))
    assert not (folder / "boom").exists()


def test_a_sound_folder_is_read_with_what_it_says_of_itself(tmp_path):
    read = read_peft(written(tmp_path))
    assert read.weights.keys() == SOUND.keys()
    assert read.config["target_modules"] == ["o_proj"]


@pytest.mark.parametrize("about", ["{", "[1]", "[" * 100_000])
def test_what_others_say_in_metadata_is_passed_over(about, tmp_path):
    written(tmp_path)
    save_file(SOUND, tmp_path / PEFT_WEIGHTS, metadata={"about": about})
    assert read_peft(tmp_path).about == {}
