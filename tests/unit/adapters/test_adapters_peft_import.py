"""PEFT adapters that were trained elsewhere: the same logits here, or a line that says why not and what would help."""

import json
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import transformers
from families import write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from peft_cases import build, hf_logits, hf_model, random_adapter, taken_out_after

from personas_tune.adapters.layouts import Layout, rows_of
from personas_tune.adapters.peft_config import PLAIN, lora_config, match_pattern, require_plain_lora, scale_of
from personas_tune.adapters.peft_files import read_peft
from personas_tune.adapters.peft_form import PeftAdapter, to_peft
from personas_tune.adapters.peft_import import from_peft
from personas_tune.errors import AdapterError, PersonasTuneError

EVERYTHING = "all_and_output"


@pytest.fixture(scope="module")
def phi3(tmp_path_factory) -> Path:
    return write_checkpoint("phi3", tmp_path_factory.mktemp("phi3") / "phi3")


@pytest.fixture(scope="module")
def llama3(tmp_path_factory) -> Path:
    return write_checkpoint("llama3", tmp_path_factory.mktemp("llama3") / "llama3")


@pytest.fixture(scope="module")
def split_phi3(phi3, tmp_path_factory) -> Path:
    """The same Phi-3 in Llama's form, q, k and v apart: adapters of such checkpoints are on the market."""
    config = transformers.AutoConfig.from_pretrained(phi3)
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = (*sizes, "num_key_value_heads", "max_position_embeddings", "rms_norm_eps")
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{key: getattr(config, key) for key in sizes}))
    weights = {}
    for name, weight in hf_model(phi3).state_dict().items():
        if "qkv_proj" in name:
            for part, rows in zip("qkv", weight.split([32, 16, 16]), strict=True):
                weights[name.replace("qkv_proj", f"{part}_proj")] = rows
        elif "gate_up_proj" in name:
            for part, rows in zip(("gate_proj", "up_proj"), weight.chunk(2), strict=True):
                weights[name.replace("gate_up_proj", part)] = rows
        else:
            weights[name] = weight
    llama.load_state_dict(weights)
    folder = tmp_path_factory.mktemp("split")
    llama.save_pretrained(folder)
    return folder


def trained_in_peft(checkpoint, folder, **config):
    """An adapter that PEFT made and saved, with random weights; gives the logits that it had."""
    adapted = peft.get_peft_model(
        hf_model(checkpoint), peft.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 16, **config})
    )
    generator = torch.Generator().manual_seed(5)
    with taken_out_after(adapted), torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_magnitude" in name:
                weight.mul_(0.5 + torch.rand(weight.shape, generator=generator))
            elif "lora_" in name:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
        adapted.save_pretrained(folder, save_embedding_layers=False)
        return hf_logits(adapted.eval())


def imported(case, folder):
    lora = {"fresh": case.fresh, "alpha": case.shape.alpha, "where": str(folder)}
    return from_peft(read_peft(folder), case.layout, base_weight=case.base_weight, **lora)


def assert_same_effect(case, folder, theirs):
    ours = case.logits(imported(case, folder))
    assert (ours - theirs).abs().max() < 1e-5
    assert (ours - case.logits(case.fresh)).abs().max() > 1


# The same effect

FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
UNFUSED = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ON_PHI3 = {
    "fused": {"target_modules": [*FUSED, "lm_head"]},
    "some": {"target_modules": ["qkv_proj"]},
    "by pattern": {"target_modules": r".*\.(qkv_proj|o_proj)"},
    "rslora": {"target_modules": FUSED, "use_rslora": True},
    "patterns": {
        "target_modules": FUSED, "r": 2, "lora_alpha": 3, "rank_pattern": {"o_proj": 4, r"layers\.0\..*qkv_proj": 3},
        "alpha_pattern": {r"^model\.layers\.1\.mlp\.down_proj": 7, "gate_up_proj": 11},
    },
    "first layer": {"target_modules": ["qkv_proj"], "layers_to_transform": [0]},
    "gaussian": {"target_modules": ["o_proj"], "init_lora_weights": "gaussian", "lora_alpha": 64},
    "dora": {"target_modules": [*FUSED, "lm_head"], "use_dora": True},
}  # fmt: skip


@pytest.mark.parametrize("config", ON_PHI3.values(), ids=ON_PHI3)
def test_adapters_of_fused_projections_have_the_same_effect(config, phi3, tmp_path):
    case = build("phi3", phi3, EVERYTHING, use_dora=config.get("use_dora", False))
    assert_same_effect(case, tmp_path, trained_in_peft(phi3, tmp_path, **config))


@pytest.mark.parametrize("more", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
def test_adapters_of_a_split_phi3_have_the_same_effect(more, phi3, split_phi3, tmp_path):
    case = build("phi3", phi3, EVERYTHING, use_dora=more.get("use_dora", False))
    assert_same_effect(case, tmp_path, trained_in_peft(split_phi3, tmp_path, target_modules=UNFUSED, **more))


@pytest.mark.parametrize("more", [{"r": 3, "lora_alpha": 5}, {"use_dora": True}], ids=["lora", "dora"])
def test_adapters_of_llama_have_the_same_effect(more, llama3, tmp_path):
    case = build("llama3", llama3, EVERYTHING, use_dora=more.get("use_dora", False))
    assert_same_effect(case, tmp_path, trained_in_peft(llama3, tmp_path, target_modules=UNFUSED, **more))


def test_parts_of_a_dense_fused_adapter_share_its_a(phi3, tmp_path):
    trained_in_peft(phi3, tmp_path, target_modules=["qkv_proj"])
    weights = imported(build("phi3", phi3, "attention"), tmp_path)
    (a,) = (weight for name, weight in read_peft(tmp_path).weights.items() if "layers.1" in name and "lora_A" in name)
    for part in ("q_proj", "k_proj", "v_proj"):
        assert torch.equal(weights[f"layers.1.attn.{part}.lora_a.weight"], a)


def test_what_the_file_lacks_stays_fresh_and_changes_nothing(phi3, tmp_path):
    trained_in_peft(phi3, tmp_path, target_modules=["o_proj"], r=2)
    case = build("phi3", phi3, EVERYTHING)
    weights = imported(case, tmp_path)
    assert torch.equal(weights["layers.0.mlp.w1.lora_a.weight"], case.fresh["layers.0.mlp.w1.lora_a.weight"])
    assert not weights["layers.0.mlp.w1.lora_b.weight"].any()
    name = "layers.0.attn.output_proj"
    assert torch.equal(weights[f"{name}.lora_a.weight"][2:], case.fresh[f"{name}.lora_a.weight"][2:])
    assert not weights[f"{name}.lora_b.weight"][:, 2:].any()


def test_a_scale_apart_by_a_power_of_two_is_exact(llama3):
    case = build("llama3", llama3, "all")
    adapter = to_peft(case.weights, case.layout, alpha=16, dropout=0.0, base_model="x")
    back = from_peft(adapter, case.layout, fresh=case.fresh, alpha=4.0, where="x")
    again = {name: weight / 4 if "lora_b" in name else weight for name, weight in back.items()}
    assert all(torch.equal(again[name], weight) for name, weight in case.weights.items())


@settings(max_examples=40)
@given(st.data())
def test_round_trips_are_bit_equal_whatever_the_sizes(data):
    number = st.integers(1, 3)
    kv_heads, groups, half = data.draw(number), data.draw(number), data.draw(number)
    family = data.draw(st.sampled_from(["phi3", "llama", "gemma", "qwen2"]))
    layout = Layout(
        family, data.draw(number), kv_heads * groups, kv_heads, 2 * half, data.draw(st.integers(2, 9)),
        data.draw(st.integers(1, 9)), 11, family == "phi3", family in ("llama", "gemma"), False,
    )  # fmt: skip
    rank, alpha = data.draw(st.integers(1, 5)), data.draw(st.sampled_from([1, 3, 0.1, 32]))
    kinds = ["attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.output_proj", "mlp.w1", "mlp.w2", "mlp.w3"]
    chosen = data.draw(st.sets(st.sampled_from(kinds), min_size=1))
    width = layout.num_heads * layout.head_dim
    rows = {
        "attn.q_proj": width, "attn.k_proj": layout.num_kv_heads * layout.head_dim, "mlp.w1": layout.intermediate_dim,
        "attn.v_proj": layout.num_kv_heads * layout.head_dim, "mlp.w3": layout.intermediate_dim,
    }  # fmt: skip
    columns = {"attn.output_proj": width, "mlp.w2": layout.intermediate_dim}
    fresh = {}
    for layer in range(layout.n_layers):
        for kind in chosen:
            name = f"layers.{layer}.{kind}"
            fresh[f"{name}.lora_a.weight"] = torch.randn(rank, columns.get(kind, layout.embed_dim))
            fresh[f"{name}.lora_b.weight"] = torch.zeros(rows.get(kind, layout.embed_dim), rank)
    for weights in (random_adapter(fresh, 1.0), fresh):  # trained, and untrained: no B tells the parts apart
        adapter = to_peft(weights, layout, alpha=alpha, dropout=0.0, base_model="x")
        back = from_peft(adapter, layout, fresh=random_adapter(fresh, 1.0, seed=2), alpha=alpha, where="x")
        assert back.keys() == weights.keys()
        assert all(torch.equal(back[name], weight) for name, weight in weights.items())


def test_ranks_and_alphas_of_patterns_are_those_of_peft(phi3):
    ranks = {"model.layers.0.a.x": 4, "model.layers.1.a.x": 2, "model.layers.0.a.y": 8, "model.layers.1.a.y": 8}
    alphas = {module: 3.0 * rank for module, rank in ranks.items()}
    config = lora_config(ranks, alphas, dropout=0.0, base_model="x", use_dora=False)
    assert config["r"] == 8
    for module, rank in ranks.items():
        key = get_pattern_key(config["rank_pattern"], module)
        assert config["rank_pattern"].get(key, config["r"]) == rank
        assert scale_of(module, rank, config) == 3


PIECES = ["q", "a", "1", ".", r"\.", ".*", ".*", "_", "-"]


@settings(max_examples=400)
@given(
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=8),
    st.sampled_from(["", "^"]),
    st.sampled_from(["", "$"]),
    st.text("qa1._-", min_size=1, max_size=12),
)
def test_patterns_are_matched_as_peft_does(pieces, begin, end, module):
    key = f"{begin}{''.join(pieces)}{end}"
    require_plain_lora({**PLAIN, "rank_pattern": {key: 3}}, "x")
    assert match_pattern({key: True}, module, False) == (get_pattern_key([key], module) == key)


def test_patterns_made_to_take_for_ever_are_matched_at_once():
    evil = {f"{'.*o.*a.' * 20}{'.*' * 20}{number}x": 1.0 for number in range(170)}
    require_plain_lora({**PLAIN, "alpha_pattern": evil}, "x")
    assert match_pattern(evil, "model.layers.31.self_attn.q_proj" * 4, 2) == 2


# Refused, with what would help

SMALL = {"target_modules": ["qkv_proj", "o_proj"], "r": 4}
MISFITS = {
    "rank": ({"r": 6, "target_modules": ["o_proj"]}, {}, "rank 6, the model's adapters have 4; set model.lora_rank=6"),
    "dense rank": ({"r": 12, "target_modules": ["qkv_proj"]}, {}, "has rank 12, the model's adapters have 4"),
    "module": (
        {"target_modules": ["o_proj", "qkv_proj"]},
        {"lora_attn_modules": ["q_proj", "k_proj"]},
        "adapts output_proj, v_proj, the model does not; add output_proj, v_proj to model.lora_attn_modules",
    ),
    "mlp": ({"target_modules": ["down_proj"]}, {"apply_lora_to_mlp": False}, "set model.apply_lora_to_mlp=true"),
    "output": ({"target_modules": ["lm_head"]}, {"apply_lora_to_output": False}, "set model.apply_lora_to_output=true"),
    "dora": ({"target_modules": ["o_proj"], "use_dora": True}, {}, "set model.use_dora=true"),
    "lora": ({"target_modules": ["o_proj"]}, {"use_dora": True}, "set model.use_dora=false"),
    "dora on a part": (
        {"target_modules": ["qkv_proj"], "use_dora": True},
        {"use_dora": True, "lora_attn_modules": ["q_proj", "k_proj"]},
        "add v_proj to model.lora_attn_modules",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("config", "model", "line"), MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_the_model_names_the_setting_that_would_help(config, model, line, phi3, tmp_path):
    trained_in_peft(phi3, tmp_path, **config)
    with pytest.raises(AdapterError) as caught:
        imported(build("phi3", phi3, EVERYTHING, **model), tmp_path)
    assert line in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path}: ")


def test_a_part_of_no_effect_needs_no_room(phi3):
    both = build("phi3", phi3, "attention")
    weights = {key: torch.zeros_like(weight) if "v_proj" in key else weight for key, weight in both.weights.items()}
    weights = {key: torch.zeros_like(weight) if "output" in key else weight for key, weight in weights.items()}
    adapter = to_peft(weights, both.layout, alpha=16, dropout=0.0, base_model="x")
    case = build("phi3", phi3, "q_k")
    back = from_peft(adapter, case.layout, fresh=case.fresh, alpha=16, where="x")
    assert all(torch.equal(back[name], weights[name]) for name in back)


CONFIGS = {
    "another method": ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
    "no method": ({"peft_type": None}, "peft_type is None"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "it changed the base; save it with PEFT's path_initial_model"),
    "olora": ({"init_lora_weights": "olora"}, "it changed the base"),
    "loftq": ({"init_lora_weights": "loftq"}, "it changed the base"),
    "nonsense start": ({"init_lora_weights": 7}, "it changed the base"),
    "biases": ({"bias": "lora_only"}, "it trains biases too"),
    "lora biases": ({"lora_bias": True}, "it trains biases too"),
    "whole layers": ({"modules_to_save": ["embed_tokens"]}, "it has whole layers of its own"),
    "transposed": ({"fan_in_fan_out": True}, "its weights are transposed"),
    "tokens": ({"trainable_token_indices": [1]}, "it trains embeddings"),
    "repeated layers": ({"layer_replication": [[0, 1]]}, "it repeats the base's layers"),
    "alora": ({"alora_invocation_tokens": [5]}, "it is an activated LoRA"),
    "parameters": ({"target_parameters": ["experts.gate"]}, "it adapts single parameters"),
    "from the future": ({"use_wonder": True}, "settings unknown here: 'use_wonder'; remove them"),
    "an endless key": ({"k" * 500_000: 1}, "settings unknown here: 'kkk"),
    "a key of another terminal": ({"a\nb\x1b[2J": 1}, r"settings unknown here: 'a\nb\x1b[2J'; "),
    "many keys": ({f"k{number}": 1 for number in range(50_000)}, "'k6', 'k7' and 49992 more; remove them"),
    "r as a text": ({"r": "8"}, "r is '8'; it should be a whole number"),
    "r as a truth": ({"r": True}, "r is True"),
    "huge r": ({"r": 10**12}, "r is 1000000000000"),
    "no r": ({"r": 0}, "r is 0"),
    "alpha not a number": ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
    "huge alpha": ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
    "alpha below 0": ({"lora_alpha": -1}, "lora_alpha is -1"),
    "alpha as good as 0": ({"lora_alpha": 1e-300}, "lora_alpha is 1e-300; it should be a number from 1e-6 on"),
    "ranks as a list": ({"rank_pattern": [1]}, "rank_pattern is [1]"),
    "ranks of texts": ({"rank_pattern": {"x": "y"}}, "rank_pattern is {'x': 'y'}"),
    "a group": (
        {"rank_pattern": {r"layers\.(?:0|1)\.mlp": 4}},
        r"rank_pattern has a pattern that isn't understood, 'layers\\.(?:0|1)\\.mlp'; write modules' names",
    ),
    "endless pattern": ({"alpha_pattern": {"((a+)+)+b": 1}}, "alpha_pattern has a pattern that isn't understood"),
    "endless choices": ({"alpha_pattern": {"(|)" * 40: 1}}, "alpha_pattern has a pattern that isn't understood"),
    "a long pattern": ({"alpha_pattern": {"x" * 201: 1}}, "alpha_pattern has a pattern that isn't understood"),
    "repeated dots": ({"alpha_pattern": {r"\.*": 1}}, "alpha_pattern has a pattern that isn't understood"),
    "many patterns": ({"alpha_pattern": {f"x{number}": 1 for number in range(2000)}}, "alpha_pattern is"),
    "broken pattern": ({"alpha_pattern": {"(": 1}}, "alpha_pattern has a pattern that isn't understood, '('"),
    "many targets": ({"target_modules": ["x"] * 5000}, "target_modules is ['x', "),
    "a target of another terminal": ({"target_modules": ["\x1b[31m"]}, r"has target_modules ['\x1b[31m']"),
    "targets of numbers": ({"target_modules": [1]}, "target_modules is [1]"),
    "base as a list": ({"base_model_name_or_path": ["a"]}, "base_model_name_or_path is ['a']"),
    "another family": ({"base_model_name_or_path": "meta-llama/Llama-3.2-1B"}, "the base here is a phi3"),
    "stated rank": ({"r": 5}, "has rank 4, adapter_config.json says 5"),
    "rank of a pattern": ({"rank_pattern": {"qkv_proj": 3}}, "qkv_proj has rank 4, adapter_config.json says 3"),
    "rank of another": ({"r": 3, "rank_pattern": {"qkv_proj": 4}}, "o_proj has rank 4, adapter_config.json says 3"),
    "other targets": ({"target_modules": ["down_proj"]}, "has target_modules ['down_proj']"),
    "missing targets": ({"target_modules": ["qkv_proj", "o_proj", "down_proj"]}, "lacks weights of 'down_proj'"),
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(phi3, tmp_path_factory):
    """A sound adapter and the model that it fits."""
    folder = tmp_path_factory.mktemp("sound")
    trained_in_peft(phi3, folder, **SMALL)
    return read_peft(folder), build("phi3", phi3, EVERYTHING)


def refusal(sound, **changes):
    adapter, case = sound
    with pytest.raises(PersonasTuneError) as caught:
        from_peft(replace(adapter, **changes), case.layout, fresh=case.fresh, alpha=case.shape.alpha, where="there")
    (line,) = caught.value.lines
    assert line.startswith("there: ")
    assert "; " in line
    assert len(line) < 400
    assert line.isprintable()
    return line


@pytest.mark.parametrize(("config", "line"), CONFIGS.values(), ids=CONFIGS)
def test_a_config_that_means_something_else_is_refused(config, line, sound):
    assert line in refusal(sound, config={**sound[0].config, **config})


def test_several_things_in_a_config_are_told_at_once(sound):
    adapter, case = sound
    config = {**adapter.config, "bias": "all", "r": -1}
    with pytest.raises(PersonasTuneError) as caught:
        from_peft(replace(adapter, config=config), case.layout, fresh=case.fresh, alpha=16, where="there")
    assert len(caught.value.lines) == 2


def test_a_config_of_plain_values_is_taken(sound):
    adapter, case = sound
    for value in (None, PLAIN["loftq_config"]):
        config = {**adapter.config, "loftq_config": value, "use_wonder": None, "runtime_config": {"x": 1}}
        from_peft(replace(adapter, config=config), case.layout, fresh=case.fresh, alpha=16, where="there")


def with_weights(adapter, change):
    return {new: weight for name, weight in adapter.weights.items() for new, weight in change(name, weight)}


WEIGHTS = {
    "more layers": (lambda n, w: [(n.replace("layers.1.", "layers.7."), w)], "a layer 7, this base has 2"),
    "fewer layers": (lambda n, w: [] if "layers.1." in n else [(n, w)], "of layer 1, this base has 2 layers"),
    "an endless layer": (lambda n, w: [(n.replace("s.1.", f"s.{'9' * 5000}."), w)], "this base has no module"),
    "other modules": (lambda n, w: [(n.replace("self_attn", "attention"), w)], "this base has no module"),
    "a path": (lambda n, w: [(n.replace("model.layers.0", "../../etc"), w)], "this base has no module"),
    "embeddings": (lambda n, w: [(n.replace("lora_A.weight", "lora_embedding_A"), w)], "is neither A, B nor magnitude"),
    "no B": (lambda n, w: [] if "lora_B" in n and ".0." in n else [(n, w)], "has no lora_B.weight"),
    "no weights": (lambda n, w: [], "no adapter weights"),
    "wider": (lambda n, w: [(n, w.repeat(1, 2) if "lora_A" in n else w)], "has A of 4 x 64 and B of"),
    "more rows": (lambda n, w: [(n, w.repeat(2, 1) if "lora_B" in n else w)], "this base takes rank x 32 and"),
    "a number": (lambda n, w: [(n, w.sum() if "lora_A" in n else w)], "has A of one number"),
    "nan": (lambda n, w: [(n, w * float("nan") if "lora_A" in n else w)], "lora_A.weight is not finite"),
    "infinity": (lambda n, w: [(n, w / 0 if "lora_B" in n else w)], "lora_B.weight is not finite"),
    "nan in bf16": (lambda n, w: [(n, (w * float("nan")).bfloat16())], "weight is not finite"),
    "a padded layer": (lambda n, w: [(n.replace("s.1.", "s.01."), w)], "this base has no module 'model.layers.01."),
    "magnitudes": (lambda n, w: [(n, w), (n.replace("A.weight", "magnitude_vector"), w[0])], "without use_dora"),
    "twice": (
        lambda n, w: [(n, w)] + [(n.replace("qkv", "v"), w[-16:] if "lora_B" in n else w)] * ("qkv" in n),
        "adapts layers.0.attn.v_proj twice",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "line"), WEIGHTS.values(), ids=WEIGHTS)
def test_weights_of_another_base_are_refused(change, line, sound):
    adapter, _ = sound
    config = {
        **adapter.config,
        "target_modules": None if line.startswith("adapts") else adapter.config["target_modules"],
    }
    assert line in refusal(sound, weights=with_weights(adapter, change), config=config)


def test_a_scale_that_leaves_no_finite_weight_is_refused(sound):
    weights = {name: weight * (1e38 if "lora_B" in name else 1) for name, weight in sound[0].weights.items()}
    assert "is not finite" in refusal(sound, weights=weights, config={**sound[0].config, "lora_alpha": 1e9})


@pytest.mark.parametrize("factor", [1e-40, 1e-44, 1e-35])
def test_a_scale_that_leaves_less_than_fp32_holds_is_refused(factor, sound):
    weights = {name: weight * (factor if "lora_B" in name else 1) for name, weight in sound[0].weights.items()}
    assert "fp32 can't hold its B" in refusal(sound, weights=weights, config={**sound[0].config, "lora_alpha": 1e-3})


def test_an_adapter_of_zeros_has_any_scale(sound):
    adapter, case = sound
    weights = {name: weight * 0 if "lora_B" in name else weight for name, weight in adapter.weights.items()}
    config = {**adapter.config, "lora_alpha": 3e-5}
    zeros = from_peft(PeftAdapter(weights, config), case.layout, fresh=case.fresh, alpha=16, where="x")
    assert not any(weight.any() for name, weight in zeros.items() if "lora_b" in name)


def test_llama_knows_no_fused_projection(llama3, sound):
    case = build("llama3", llama3, "all")
    assert rows_of("model.layers.0.self_attn.qkv_proj", case.layout) == 0
    with pytest.raises(AdapterError, match="this base has no module"):
        from_peft(PeftAdapter(sound[0].weights, sound[0].config), case.layout, fresh=case.fresh, alpha=16, where="x")


def test_json_is_what_a_config_is_made_of():
    assert json.loads(json.dumps(PLAIN)) == PLAIN
