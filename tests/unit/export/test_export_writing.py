"""One adapter written in each form."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from adapted import adapt

from personas_tune.adapters.files import NATIVE_FILE, load_about, load_native, save_native
from personas_tune.errors import AdapterError, CheckpointError
from personas_tune.export.facts import Facts, Measured, Persona
from personas_tune.export.origin import License, Origin
from personas_tune.export.writing import Form, write_adapter

NO_FACTS = Facts({})
MEASURED = Facts({}, measured=(Measured("persona", "expected", None, 30, 0.9, 0.7, 0.0),))
ORIGIN = Origin("me/base", "me/base", Path("base"), License("llama3"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return adapt("llama3", tmp_path_factory.mktemp("llama"), "all")


def write(adapted, folder, kind="peft", *, facts=NO_FACTS, origin=ORIGIN, **form):
    form = Form(kind, **{"dtype": None, "max_rank": None, "license": None, **form})
    files = adapted.base_files if kind == "merged" else []
    names, written = write_adapter(folder, adapted.adapter, form, origin, adapted.layout, facts, files)
    assert sorted(names) == sorted(path.name for path in folder.iterdir())
    return written, (folder / "README.md").read_text()


@pytest.mark.parametrize("kind", ["peft", "merged"])
def test_a_card_says_that_an_adapter_was_trained_on_a_4_bit_base(kind, llama, tmp_path):
    _, card = write(llama, tmp_path / "nf4", kind, facts=replace(MEASURED, is_quantised=True))
    assert "4 bits (NF4, QLoRA)" in card
    assert "differ" in card
    assert "**Measured on the base in 4 bits" in card
    assert "model-index" not in card
    assert "4 bits" not in write(llama, tmp_path / "not", kind)[1]


def test_a_peft_folder_names_the_base_and_where_it_comes_from(llama, tmp_path):
    written, card = write(llama, tmp_path, license="mit")
    assert (written.rank, written.is_dora, written.no_output) == (4, False, False)
    assert "# persona-0" in card
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "me/base"
    assert "license: mit" in card


def test_equal_adapters_give_equal_bytes(llama, tmp_path):
    for name in ("one", "two"):
        write(llama, tmp_path / name)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two


def test_a_rank_that_is_low_enough_is_not_cut(llama, tmp_path):
    whole, card = write(llama, tmp_path / "same", max_rank=4, facts=MEASURED)
    assert whole.errors == ()
    assert "model-index" in card
    assert "**Measured" not in card
    cut, card = write(llama, tmp_path / "cut", max_rank=3, facts=MEASURED)
    assert cut.rank == 3
    assert 0 < max(cut.errors) < 1
    assert "Its rank was cut from 4 to 3" in card
    assert "**Measured before its rank was cut**" in card
    assert "model-index" not in card


@pytest.mark.parametrize(
    ("kind", "dtype", "told"),
    [("peft", "bf16", "bf16"), ("merged", None, "the base's dtype"), ("merged", "fp32", None)],
)
def test_figures_from_before_rounding_are_told_as_such(kind, dtype, told, llama, tmp_path):
    _, card = write(llama, tmp_path / "out", kind, dtype=dtype, facts=MEASURED)
    assert (f"**Measured before it was rounded to {told}**" in card) == (told is not None)
    assert ("model-index" in card) == (told is None)


def test_an_imported_adapter_does_not_get_the_bases_licence(llama, tmp_path):
    imported = Facts({}, is_imported=True)
    assert "license: llama3\n" in write(llama, tmp_path / "own")[1]
    assert "license: other\nlicense_name: unstated\n" in write(llama, tmp_path / "imported", facts=imported)[1]
    assert "license: mit\n" in write(llama, tmp_path / "given", facts=imported, license="mit")[1]


def test_words_of_a_persona_can_be_left_out(llama, tmp_path):
    facts = Facts({}, persona=Persona(15, ("+war",)))
    assert "`+war`" in write(llama, tmp_path / "with", facts=facts)[1]
    _, card = write(llama, tmp_path / "without", facts=facts, words=False)
    assert "war" not in card
    assert "15 users" in card


@pytest.mark.parametrize(("longest", "is_told"), [(4096, True), (None, True), (2047, False)])
def test_a_window_below_the_rows_of_training_is_told(longest, is_told, llama, tmp_path):
    facts = Facts({}, max_seq_len=longest)
    _, card = write(llama, tmp_path / "out", facts=facts, origin=replace(ORIGIN, window=2047))
    assert ("sliding window of 2047 tokens" in card) == is_told
    assert "sliding window" not in write(llama, tmp_path / "none", facts=facts)[1]


@pytest.mark.parametrize(("family", "is_served"), [("qwen2_untied", False), ("mistral", False), ("phi3", True)])
def test_vllm_takes_an_adapted_output_layer_of_some_families_only(family, is_served, tmp_path):
    written, card = write(adapt(family, tmp_path, "all_and_output"), tmp_path / "out")
    assert (written.why_not_served is None) == is_served
    assert ("VLLM adapts no output layer".replace("VLLM", "vLLM") in card) == (not is_served)
    assert ("vllm serve" in card) == is_served


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
