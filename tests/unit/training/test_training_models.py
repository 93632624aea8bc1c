"""Any torchtune LoRA builder: the bank trains it, and sharing prefixes changes nothing."""

from collections.abc import Callable

import pytest
import torch
from shared_rows import LORA, SIZES, backward, difference, rows_of_users, with_adapter
from torch import Tensor, nn
from torchtune.models.gemma import lora_gemma
from torchtune.models.gemma2 import lora_gemma2
from torchtune.models.llama3 import lora_llama3
from torchtune.models.llama3_2 import lora_llama3_2
from torchtune.models.mistral import lora_mistral
from torchtune.models.phi3 import lora_phi3
from torchtune.models.qwen2 import lora_qwen2

from personas_tune.adapters.bank import AdapterBank
from personas_tune.training.shared_prefix import obstacle

QK = ["q_proj", "k_proj"]
WIDE = {**SIZES, "embed_dim": 128, "num_kv_heads": 4}  # NF4 needs blocks of 16,384 weights
BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "phi3": lambda: lora_phi3(QK, **SIZES, **LORA, intermediate_dim=64),
    "phi3 all": lambda: lora_phi3(["q_proj", "output_proj"], True, True, **SIZES, **LORA, intermediate_dim=64),
    "phi3 dora": lambda: lora_phi3(QK, **SIZES, **LORA, intermediate_dim=64, use_dora=True),
    "phi3 qlora": lambda: lora_phi3(QK, **WIDE, **LORA, intermediate_dim=256, quantize_base=True),
    "llama3": lambda: lora_llama3(QK, **SIZES, **LORA),
    "llama3.2 tied": lambda: lora_llama3_2(QK, **SIZES, **LORA, tie_word_embeddings=True),
    "qwen2 tied": lambda: lora_qwen2(QK, **SIZES, **LORA, intermediate_dim=64, tie_word_embeddings=True),
    "mistral": lambda: lora_mistral(QK, **SIZES, **LORA, intermediate_dim=64),
    "gemma": lambda: lora_gemma(QK, **SIZES, **LORA, head_dim=8, intermediate_dim=64),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_a_step_on_any_lora_builder_is_the_same_with_and_without_sharing(name: str) -> None:
    torch.manual_seed(0)
    model = with_adapter(BUILDERS[name]())
    weights = {key: weight.detach().clone() for key, weight in model.named_parameters() if weight.requires_grad}
    bank = AdapterBank(model)
    masters = bank.add_loaded("a", weights, where="test").masters
    rows, names = rows_of_users()
    losses, gradients = [], []
    for sharing in ("off", "auto"):
        with bank.use("a"):
            loss, _ = backward(model, rows, names, sharing, on_gradients=lambda: bank.take_gradients(1.0))
        losses.append(loss)
        gradients.append(taken(masters))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert all(gradient.abs().max() > 0 for gradient in gradients[0].values())
    assert difference(gradients[1], gradients[0]) < 1e-5
    assert all(weight.grad is None for weight in model.parameters())


def taken(masters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The gradients, which are then dropped as an optimizer does after its step."""
    gradients = {name: weight.grad for name, weight in masters.items()}
    for weight in masters.values():
        weight.grad = None
    return gradients


def test_a_model_with_attention_of_its_own_is_run_plain() -> None:
    sizes = {**SIZES, "hidden_capping_value": 50.0, "final_capping_value": 30.0, "sliding_window_size": 8}
    model = with_adapter(lora_gemma2(QK, **sizes, **LORA, head_dim=8, intermediate_dim=64))
    assert "MultiHeadAttention" in obstacle(model)
    rows, names = rows_of_users()
    assert difference(backward(model, rows, names)[1], backward(model, rows, names, "off")[1]) == 0
