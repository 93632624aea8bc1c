"""One adapter written in each form."""

import json
from pathlib import Path

import pytest
from adapted import adapt

from personas_tune.adapters.files import NATIVE_FILE, load_about, load_native, save_native
from personas_tune.errors import AdapterError, CheckpointError
from personas_tune.export.facts import Facts
from personas_tune.export.origin import Origin
from personas_tune.export.writing import Form, write_adapter

NO_FACTS = Facts({}, False, None, None, ())
ORIGIN = Origin("me/base", "me/base", Path("base"), None, is_quantised=False)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return adapt("llama3", tmp_path_factory.mktemp("llama"), "all")


def write(adapted, folder, kind="peft", *, dtype=None, max_rank=None, is_quantised=False):
    form = Form(kind, dtype, max_rank, "mit", "movielens")
    origin = Origin(**{**vars(ORIGIN), "is_quantised": is_quantised})
    files = adapted.base_files if kind == "merged" else []
    names, exported = write_adapter(folder, adapted.adapter, form, origin, adapted.layout, NO_FACTS, files)
    assert sorted(names) == sorted(path.name for path in folder.iterdir())
    return exported, (folder / "README.md").read_text()


@pytest.mark.parametrize("kind", ["peft", "merged"])
def test_a_card_says_that_an_adapter_was_trained_on_a_4_bit_base(kind, llama, tmp_path):
    _, card = write(llama, tmp_path / "nf4", kind, is_quantised=True)
    assert "4 bits (NF4, QLoRA)" in card
    assert "differ" in card
    assert "4 bits" not in write(llama, tmp_path / "not", kind)[1]


def test_a_peft_folder_names_the_base_and_where_it_comes_from(llama, tmp_path):
    exported, card = write(llama, tmp_path)
    assert (exported.name, exported.rank, exported.is_dora) == ("persona-0", 4, False)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "me/base"
    assert "license: mit" in card


def test_equal_adapters_give_equal_bytes(llama, tmp_path):
    for name in ("one", "two"):
        write(llama, tmp_path / name)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two


def test_a_rank_that_is_low_enough_is_not_cut(llama, tmp_path):
    assert write(llama, tmp_path / "same", max_rank=4)[0].errors == ()
    exported, card = write(llama, tmp_path / "cut", max_rank=3)
    assert exported.rank == 3
    assert 0 < max(exported.errors) < 1
    assert "Its rank was cut from 4 to 3" in card


def test_a_file_that_lacks_its_alpha_is_told(llama, tmp_path):
    adapter = tmp_path / "persona" / "0"
    adapter.mkdir(parents=True)
    save_native(adapter / NATIVE_FILE, load_native(llama.adapter), {"rank": 4})
    broken = type(llama)(llama.base, adapter, llama.model, llama.layout)
    with pytest.raises(
        CheckpointError, match=r"it doesn't say its rank and alpha \('alpha'\); train the adapter again"
    ):
        write(broken, tmp_path / "out")


def test_a_value_beyond_fp16_is_refused(llama, tmp_path):
    adapter = tmp_path / "persona" / "0"
    adapter.mkdir(parents=True)
    weights = load_native(llama.adapter)
    next(iter(weights.values()))[0, 0] = 1e6
    save_native(adapter / NATIVE_FILE, weights, load_about(llama.adapter))
    large = type(llama)(llama.base, adapter, llama.model, llama.layout)
    with pytest.raises(AdapterError, match="has values that float16 can't hold; set export"):
        write(large, tmp_path / "out", dtype="fp16")
    write(large, tmp_path / "fine", dtype="bf16")
