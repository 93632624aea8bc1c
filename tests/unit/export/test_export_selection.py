"""Which adapters are exported, and in which form."""

import pytest

from personas_tune.errors import ConfigError
from personas_tune.export.selection import choose_adapters, choose_kind, known_adapters
from personas_tune.workspace import Workspace

KNOWN = {"persona": ["0", "1"], "single": ["all"]}


def test_sets_without_an_adapter_that_was_asked_for_are_left_out():
    assert choose_adapters(KNOWN, None) == KNOWN
    assert choose_adapters(KNOWN, ["1"]) == {"persona": ["1"]}
    assert choose_adapters(KNOWN, ["all", "0"]) == {"persona": ["0"], "single": ["all"]}


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ([], "no adapter to export; name some, or leave it null"),
        (["al"], "no adapter 'al'; did you mean all?"),
        (["7"], "no adapter '7'; there are 0, 1, all"),
    ],
)
def test_adapters_that_there_are_not_are_told(wanted, said):
    with pytest.raises(ConfigError) as caught:
        choose_adapters(KNOWN, wanted)
    assert str(caught.value) == f"export.adapters: {said}"


def test_no_set_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"export\.sets: no adapter set to export; name some of adapter_sets"):
        known_adapters(Workspace.at(tmp_path), [])


@pytest.mark.parametrize(
    ("asked", "is_dora", "kind"),
    [("auto", False, "peft"), ("auto", True, "merged"), ("peft", True, "peft"), ("merged", False, "merged")],
)
def test_only_dora_is_merged_unasked(asked, is_dora, kind):
    assert choose_kind(asked, is_dora, None) == kind


def test_a_rank_to_cut_is_refused_where_dora_would_be_merged():
    assert choose_kind("auto", False, 8) == "peft"
    with pytest.raises(ConfigError, match=r"export\.max_rank: a merged checkpoint has no rank to cut; leave it out"):
        choose_kind("auto", True, 8)
