"""Model cards: read back by huggingface_hub, offline."""

import re

import pytest
from huggingface_hub import ModelCard

from personas_tune.export.card import CardSubject, write_card
from personas_tune.export.facts import Facts, Measured, Persona
from personas_tune.export.origin import License

MEASURED = (
    Measured("persona", "expected", None, 300, 0.98765, 0.75, 0.0),
    Measured("persona", "expected", "1", 80, 0.9, 0.7, 0.25),
    Measured("told", "generate", None, 300, None, None, 1.0),
)
FACTS = Facts(
    {"epochs": "2", "seed": "42"}, dataset="movielens", data_sha256="ab" * 32,
    persona=Persona(15, ("+war", "-drama")), measured=MEASURED,
)  # fmt: skip
SUBJECT = CardSubject(
    name="persona-1", form="peft", base="microsoft/Phi-3-mini-4k-instruct",
    license=License("mit"), rank=512, scale=0.125, dtype="fp32", is_dora=False,
    command="vllm serve BASE --enable-lora --lora-modules persona-1=PATH", notes=["Its rank was cut."],
)  # fmt: skip


def card_of(tmp_path, facts=FACTS, **changes):
    file = tmp_path / "README.md"
    file.write_text(write_card(CardSubject(**{**vars(SUBJECT), **changes}), facts), encoding="utf-8")
    return ModelCard.load(file)


def test_the_metadata_is_what_the_hub_reads(tmp_path):
    data = card_of(tmp_path).data
    assert data.base_model == "microsoft/Phi-3-mini-4k-instruct"
    assert data.library_name == "peft"
    assert data.license == "mit"
    assert data.to_dict()["base_model_relation"] == "adapter"
    assert {"personas-tune", "lora"} <= set(data.tags)
    found = {(result.dataset_config, result.metric_type, result.metric_value) for result in data.eval_results}
    assert found == {
        ("all personas", "rmse", 0.9877), ("all personas", "mae", 0.75), ("all personas", "urr", 0.0),
        ("persona 1", "rmse", 0.9), ("persona 1", "mae", 0.7), ("persona 1", "urr", 0.25),
        ("all personas", "urr", 1.0),
    }  # fmt: skip


def test_the_text_tells_a_reader_what_it_is_and_how_it_is_loaded(tmp_path):
    text = card_of(tmp_path).text
    for said in (
        "# persona-1", "15 users", "`+war`, `-drama`",
        "| persona | expected | persona 1 | 80 | 0.9000 | 0.7000 | 25.0% |",
        "| told | generate | all personas | 300 | - | - | 100.0% |", 'PeftModel.from_pretrained(base, "PATH")',
        "vllm serve BASE", "ab" * 32, "| scale of B A | 0.125 |", "| largest rank of a module | 512 |", "forbid",
        "**Note.** Its rank was cut.", "| epochs | 2 |", "speaks for no single person",
    ):  # fmt: skip
        assert said in text, said


def test_figures_of_something_else_are_no_results_of_this_file(tmp_path):
    card = card_of(tmp_path, measured_as=["before its rank was cut", "on the base in 4 bits"])
    assert card.data.eval_results is None
    told = card.text.partition("## Figures")[2]
    assert told.index("Measured before its rank was cut, on the base in 4 bits") < told.index("| agent | readout |")


def test_a_base_without_an_owner_is_no_model_of_the_hub(tmp_path):
    card = card_of(tmp_path, base="tiny_phi3")
    assert card.data.base_model is None
    assert "base_model_relation" not in card.data.to_dict()
    assert 'from_pretrained("BASE")' in card.text
    assert "`BASE` is the folder of tiny_phi3." in card.text


def test_a_merged_checkpoint_is_a_model_of_its_own(tmp_path):
    card = card_of(tmp_path, form="merged", rank=None, is_dora=True, dtype="bf16")
    assert card.data.library_name == "transformers"
    assert card.data.to_dict()["base_model_relation"] == "finetune"
    assert "dora" in card.data.tags
    assert "PeftModel" not in card.text
    assert "largest rank" not in card.text


def test_what_is_unknown_is_said_or_left_out(tmp_path):
    card = card_of(tmp_path, Facts({}), license=None, command=None, notes=())
    assert card.data.license == "other"
    assert card.data.eval_results is None
    assert "The base states no licence" in card.text
    assert "no agent with this adapter has been measured" in card.text
    assert "## Persona" not in card.text
    assert "vLLM doesn't serve it in this form" in card.text


@pytest.mark.parametrize("form", ["peft", "merged"])
def test_equal_facts_give_equal_bytes(form, tmp_path):
    subject = CardSubject(**{**vars(SUBJECT), "form": form})
    assert write_card(subject, FACTS) == write_card(subject, FACTS)
    assert re.match(r"---\n", write_card(subject, FACTS))


def test_an_imported_adapter_is_not_claimed(tmp_path):
    text = card_of(tmp_path, Facts({"trained": "elsewhere"}, is_imported=True)).text
    assert "trained by" not in text
    assert "the terms under which it came hold" in text
    assert "sha256" not in text
