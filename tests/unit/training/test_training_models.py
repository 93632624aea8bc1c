"""Any torchtune LoRA builder: the bank trains it, and sharing prefixes changes nothing."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torchtune.models.gemma import lora_gemma
from torchtune.models.llama3 import lora_llama3
from torchtune.models.mistral import lora_mistral
from torchtune.models.phi3 import lora_phi3
from torchtune.models.qwen2 import lora_qwen2

from personas_tune.adapters.bank import Adapter, AdapterBank
from personas_tune.datasets import TokenRow
from personas_tune.training.forward import answer_logits, plain_batch, shared_batch

SIZES = {"vocab_size": 40, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 32, "max_seq_len": 64}
LORA = {"lora_rank": 2, "lora_alpha": 4}
BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "phi3": lambda: lora_phi3(["q_proj", "k_proj"], **SIZES, **LORA, intermediate_dim=64),
    "phi3 all": lambda: lora_phi3(["q_proj", "output_proj"], True, True, **SIZES, **LORA, intermediate_dim=64),
    "phi3 dora": lambda: lora_phi3(["q_proj", "k_proj"], **SIZES, **LORA, intermediate_dim=64, use_dora=True),
    "llama3": lambda: lora_llama3(["q_proj", "k_proj"], **SIZES, **LORA),
    "qwen2 tied": lambda: lora_qwen2(
        ["q_proj", "k_proj"], **SIZES, **LORA, intermediate_dim=64, tie_word_embeddings=True
    ),
    "mistral": lambda: lora_mistral(["q_proj", "k_proj"], **SIZES, **LORA, intermediate_dim=64),
    "gemma": lambda: lora_gemma(
        ["q_proj", "k_proj"], **SIZES, lora_rank=2, lora_alpha=4, head_dim=8, intermediate_dim=64
    ),
}


def rows_of_two_users() -> list[list[list[TokenRow]]]:
    generator = torch.Generator().manual_seed(0)
    groups = []
    for _ in range(2):
        prefix = torch.randint(0, 40, (9,), generator=generator).tolist()
        branches = [prefix + torch.randint(0, 40, (5,), generator=generator).tolist() for _ in range(3)]
        groups.append([[TokenRow([*branch, 3, 7], len(branch))] for branch in branches])
    return groups


def drop_gradients(adapter: Adapter) -> None:
    """What an optimizer does after its step."""
    for weight in adapter.masters.values():
        weight.grad = None


@pytest.mark.parametrize("name", BUILDERS)
def test_a_step_on_any_lora_builder_is_the_same_with_and_without_sharing(name: str) -> None:
    torch.manual_seed(0)
    model = BUILDERS[name]()
    groups = rows_of_two_users()
    rows = [branch[0] for group in groups for branch in group]
    bank = AdapterBank(model)
    bank.add_new("a", seed=0)
    gradients = []
    for batch in (plain_batch(rows, 0), shared_batch(groups, 0)):
        with bank.use("a") as adapter:
            with torch.no_grad():
                noise = torch.Generator().manual_seed(1)
                for key, weight in bank._working.items():
                    if "magnitude" not in key:
                        weight.add_(torch.empty_like(weight).normal_(std=0.1, generator=noise))
            nn.functional.cross_entropy(answer_logits(model, batch), batch.targets).backward()
            bank.take_gradients(1.0)
        gradients.append({key: weight.grad for key, weight in adapter.masters.items()})
        drop_gradients(adapter)
    for key, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, key
        scale = gradient.abs().max()
        torch.testing.assert_close(gradients[1][key] / scale, gradient / scale, rtol=0, atol=1e-4, msg=key)
    assert all(weight.grad is None for key, weight in model.named_parameters() if key not in bank._working)


def test_a_quantised_base_trains_its_adapters() -> None:
    torch.manual_seed(0)
    sizes = {**SIZES, "embed_dim": 128, "num_heads": 4, "num_kv_heads": 4}
    model = lora_phi3(["q_proj", "k_proj"], **sizes, **LORA, intermediate_dim=256, quantize_base=True)
    groups = rows_of_two_users()
    bank = AdapterBank(model)
    bank.add_new("a", seed=0)
    results = []
    for batch in (plain_batch([b[0] for g in groups for b in g], 0), shared_batch(groups, 0)):
        with bank.use("a"):
            nn.functional.cross_entropy(answer_logits(model, batch), batch.targets).backward()
            bank.take_gradients(1.0)
        results.append({key: weight.grad for key, weight in bank["a"].masters.items()})
        drop_gradients(bank["a"])
    moved = [key for key, gradient in results[0].items() if gradient.abs().max() > 0]
    assert moved  # with B at zero only B has gradients
    assert all(key.endswith("lora_b.weight") for key in moved)
    for key in moved:
        torch.testing.assert_close(results[1][key], results[0][key], rtol=1e-3, atol=1e-5)
