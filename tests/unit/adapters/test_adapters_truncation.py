"""A truncated adapter is the best one of its rank, and its error the one that a dense computation finds."""

import pytest
import torch
from families import write_checkpoint
from peft_cases import build

from personas_tune.adapters.peft_config import scale_of
from personas_tune.adapters.peft_form import PeftAdapter, hf_modules, to_peft
from personas_tune.adapters.truncation import truncate_peft


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Of rank 12 on qkv_proj, 8 on gate_up_proj, 4 elsewhere."""
    case = build("phi3", write_checkpoint("phi3", tmp_path_factory.mktemp("phi3") / "phi3"), "all")
    return to_peft(case.weights, case.layout, alpha=16, dropout=0.0, base_model="x")


def effects(adapter):
    """What each module adds to the base's weight, fp64."""
    found = {}
    for module, names in hf_modules(adapter.weights).items():
        a, b = (adapter.weights[names[ending]].double() for ending in ("lora_A.weight", "lora_B.weight"))
        found[module] = scale_of(module, a.shape[0], adapter.config) * (b @ a)
    return found


@pytest.mark.parametrize("rank", [1, 3, 8, 11])
def test_it_is_the_best_approximation_and_its_error_is_told(adapter, rank):
    cut, errors = truncate_peft(adapter, rank)
    assert cut.config["r"] == rank
    before, after = effects(adapter), effects(cut)
    assert errors.keys() == before.keys()
    for module, whole in before.items():
        values = torch.linalg.svdvals(whole)
        best = float(values[rank:].norm() / values.norm())
        assert errors[module] == pytest.approx(best, rel=1e-6, abs=1e-12)
        assert float((whole - after[module]).norm() / whole.norm()) == pytest.approx(best, rel=1e-4, abs=1e-6)


def test_modules_within_the_rank_stay_to_the_byte(adapter):
    cut, errors = truncate_peft(adapter, 8)
    assert {module.rpartition(".")[2] for module, error in errors.items() if error} == {"qkv_proj"}
    for name, weight in adapter.weights.items():
        assert torch.equal(cut.weights[name], weight) == ("qkv_proj" not in name)
    assert (cut.config["r"], cut.config["rank_pattern"]) == (8, {"o_proj": 4, "down_proj": 4})
    assert (cut.config["lora_alpha"], cut.config["alpha_pattern"]) == (32, {"o_proj": 16, "down_proj": 16})


def test_an_adapter_within_the_rank_is_given_back(adapter):
    cut, errors = truncate_peft(adapter, 12)
    assert cut is adapter
    assert set(errors.values()) == {0.0}


def test_what_is_not_trained_has_no_error(adapter):
    zeros = {name: weight * ("lora_A" in name) for name, weight in adapter.weights.items()}
    cut, errors = truncate_peft(PeftAdapter(zeros, adapter.config), 2)
    assert set(errors.values()) == {0.0}
    assert not any(weight.any() for name, weight in cut.weights.items() if "lora_B" in name)


def test_magnitudes_and_the_dtype_are_kept(adapter):
    weights = {name: weight.bfloat16() for name, weight in adapter.weights.items()}
    magnitude = "base_model.model.model.layers.0.self_attn.qkv_proj.lora_magnitude_vector"
    weights[magnitude] = torch.rand(64, dtype=torch.bfloat16)
    cut, _ = truncate_peft(PeftAdapter(weights, adapter.config), 3)
    assert torch.equal(cut.weights[magnitude], weights[magnitude])
    assert {weight.dtype for weight in cut.weights.values()} == {torch.bfloat16}


def test_a_module_narrower_than_the_rank_keeps_all_of_its_effect():
    name = "base_model.model.model.layers.0.self_attn.k_proj"
    weights = {f"{name}.lora_A.weight": torch.randn(9, 20), f"{name}.lora_B.weight": torch.randn(4, 9)}
    config = {"r": 9, "lora_alpha": 3, "use_rslora": True}
    adapter = PeftAdapter(weights, config)
    cut, errors = truncate_peft(adapter, 6)
    assert errors == {"model.layers.0.self_attn.k_proj": pytest.approx(0, abs=1e-12)}
    assert cut.config["r"] == 4
    (before,), (after,) = effects(adapter).values(), effects(cut).values()
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
