"""The bundled configs' models, loaded as their YAML says, beside transformers on the same random checkpoint."""

import pytest
import torch
from published import LORA, PUBLISHED, QLORA, build_tiny, hf_model, lay_out, tiny_sizes
from torchao.dtypes.nf4tensor import NF4Tensor, to_nf4
from torchtune.models.convert_weights import tune_to_hf
from torchtune.models.phi3._convert_weights import phi3_tune_to_hf
from torchtune.models.qwen2._convert_weights import qwen2_tune_to_hf

from personas_tune.adapters.base_model import load_base
from personas_tune.config import base_sections, load_experiment

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
each_model = pytest.mark.parametrize("model", PUBLISHED)

CHAT = [
    {"role": "system", "content": "You rate films from 1 to 5."},
    {"role": "user", "content": "The River (1981), Drama. Which rating?"},
]
# What a builder's arguments are called in config.json.
CONSTANTS = {
    "vocab_size": "vocab_size", "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads", "embed_dim": "hidden_size", "intermediate_dim": "intermediate_size",
    "max_seq_len": "max_position_embeddings", "norm_eps": "rms_norm_eps",
}  # fmt: skip


def load(config, *overrides):
    sections = base_sections(load_experiment(config, list(overrides)), None)
    return load_base(**sections, device="cpu", dtype="fp32")


def logits_of(network, tokens):
    with torch.no_grad():
        output = network.eval()(torch.tensor([tokens]))
    return getattr(output, "logits", output)[0]


def assert_equal_logits(ours, theirs):
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.fixture
def tiny(tmp_path, monkeypatch, tokenizer_files):
    """Lay a tiny checkpoint out where a config has it; gives transformers' model, and what its builder asks for."""
    monkeypatch.chdir(tmp_path)

    def lay_out_tiny(model, *, wide=False):
        sizes = tiny_sizes(model, wide=wide)
        asked = build_tiny(model, monkeypatch, **sizes)
        theirs = hf_model(model, sizes=sizes)
        lay_out(model, theirs, tokenizer_files(PUBLISHED[model].tokenizer), tmp_path)
        return theirs, asked

    return lay_out_tiny


@each_model
def test_a_bundled_model_has_the_published_constants_and_the_logits_of_transformers(model, tiny):
    theirs, asked = tiny(model)
    base = load(LORA[model])
    tokens = base.tokenizer.row(CHAT, "4").tokens
    assert len(tokens) > 25
    expected = logits_of(theirs, tokens)
    assert expected.std() > 0.1
    assert_equal_logits(logits_of(base.model, tokens), expected)

    published = PUBLISHED[model].hf_config
    assert {name: asked[name] for name in CONSTANTS} == {name: published[key] for name, key in CONSTANTS.items()}
    rope = published.get("rope_parameters", {})
    assert asked.get("rope_base", 10000) == rope.get("rope_theta", published.get("rope_theta"))
    assert asked.get("scale_factor") == rope.get("factor")
    assert asked.get("tie_word_embeddings", False) == published["tie_word_embeddings"]


@pytest.mark.parametrize(
    ("model", "other"),
    [
        ("phi3", {"rope_theta": 11000.0}),
        ("llama3_8b", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
        ("llama3_2_1b", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
        ("qwen2_5_0_5b", {"rms_norm_eps": 1e-3}),
    ],
)
def test_another_constant_would_be_seen_in_the_logits(model, other):
    sizes = {**tiny_sizes(model), "vocab_size": 50}
    tokens = torch.randint(50, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    right, wrong = (logits_of(hf_model(model, sizes=sizes, **more), tokens) for more in ({}, other))
    assert (right - wrong).abs().max() > 1e-4 * right.abs().max()


# QLoRA


def weights_of_linear_layers(network):
    """Of all layers but the output, as torchtune's names."""
    return {
        name: weight
        for name, weight in network.named_parameters()
        if name.endswith("proj.weight") or name.endswith(("w1.weight", "w2.weight", "w3.weight"))
        if not name.startswith("output")
    }


def as_hf(model, weights, sizes):
    counts = (sizes["num_heads"], sizes["num_kv_heads"], sizes["embed_dim"])
    if model.startswith("phi3"):
        return phi3_tune_to_hf(weights)
    if model.startswith("qwen"):
        return qwen2_tune_to_hf(weights, *counts, tie_word_embeddings=True)
    return tune_to_hf(weights, *counts)


@each_model
def test_a_bundled_qlora_is_the_model_with_all_linear_layers_rounded_to_nf4(model, tiny):
    theirs, _ = tiny(model, wide=True)
    folder = load_experiment(QLORA[model]).checkpointer.checkpoint_dir
    few_tokens = f"tokenizer.special_tokens_path={folder}/special_tokens.json"
    exact, base = load(LORA[model], few_tokens), load(QLORA[model], few_tokens)
    tokens = base.tokenizer.row(CHAT, "4").tokens
    before = logits_of(theirs, tokens)
    assert_equal_logits(logits_of(exact.model, tokens), before)

    linear = weights_of_linear_layers(base.model)
    assert len(linear) == 7 * len(base.model.layers)
    assert all(isinstance(weight, NF4Tensor) for weight in linear.values())
    rounded = {name: weight.get_original_weight() for name, weight in linear.items()}
    unrounded = dict(exact.model.named_parameters())
    for name, weight in rounded.items():
        assert torch.equal(weight, to_nf4(unrounded[name].detach()).get_original_weight()), name
    others = {
        name: weight
        for name, weight in base.model.named_parameters()
        if name not in linear and "lora" not in name
    }  # fmt: skip
    assert all(torch.equal(weight, unrounded[name]) for name, weight in others.items())

    kept = {name: weight.detach() for name, weight in others.items()}
    theirs.load_state_dict(as_hf(model, {**kept, **rounded}, tiny_sizes(model, wide=True)), strict=False)
    after = logits_of(theirs, tokens)
    assert (after - before).abs().max() > 0.01 * before.abs().max()
    assert_equal_logits(logits_of(base.model, tokens), after)


# What torchtune leaves out


def test_transformers_narrows_phi3s_attention_to_a_window_that_torchtune_has_not():
    """Phi-3-mini's config.json says 2047 tokens: longer rows get other logits there."""
    sizes = {**tiny_sizes("phi3"), "vocab_size": 50}
    window = 8
    narrow, wide = hf_model("phi3", sizes=sizes, sliding_window=window), hf_model("phi3", sizes=sizes)
    tokens = torch.randint(50, (24,), generator=torch.Generator().manual_seed(1)).tolist()
    assert wide.config.sliding_window == 2047
    differ = (logits_of(narrow, tokens) - logits_of(wide, tokens)).abs().amax(dim=1) > 1e-4
    assert differ.nonzero().flatten().tolist() == list(range(window, 24))
