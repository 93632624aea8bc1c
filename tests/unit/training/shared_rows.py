"""Small models and users' rows that share prefixes, and what a backward pass leaves behind."""

import torch
from torch import Tensor, nn
from torchtune.models.phi3 import lora_phi3
from torchtune.modules.peft import get_adapter_params, set_trainable_params

from personas_tune.datasets import TokenRow
from personas_tune.training.shared_prefix import backward_rows

SIZES = {"vocab_size": 40, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 32, "max_seq_len": 64}
LORA = {"lora_rank": 2, "lora_alpha": 4}


def small_phi3(**changes) -> nn.Module:
    return with_adapter(lora_phi3(["q_proj", "k_proj"], **{**SIZES, **LORA, "intermediate_dim": 64, **changes}))


def with_adapter(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that are worth a gradient, and an adapter that isn't zero, alone to be trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and type(weight.data) is Tensor:
                weight.normal_(std=0.2, generator=generator)
            elif "magnitude" in name:
                weight.fill_(1)
    set_trainable_params(model, get_adapter_params(model))
    return model


def rows_of_users(n_users=3, n_rows=4, prefix=9, seed=0) -> tuple[list[TokenRow], list[str]]:
    """Rows and the names of their prefixes; users differ in their prefixes' lengths, rows in their own."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(0, 40, (n,), generator=generator).tolist()  # noqa: E731
    rows = []
    for user in range(n_users):
        shared = draw(prefix + user)
        prompts = [[*shared, row, *draw(2 + row)] for row in range(n_rows)]
        rows += [TokenRow([*prompt, 3, 7], len(prompt)) for prompt in prompts]
    return rows, [str(user) for user in range(n_users) for _ in range(n_rows)]


def backward(model, rows, names, sharing="auto", branches_per_pass=5, **options) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the rows, by parameter name."""
    model.zero_grad(set_to_none=True)
    loss = backward_rows(
        model,
        rows,
        names,
        nn.CrossEntropyLoss(),
        pad_id=0,
        sharing=sharing,
        branches_per_pass=branches_per_pass,
        **options,
    )
    named = {name.replace("_checkpoint_wrapped_module.", ""): weight for name, weight in model.named_parameters()}
    return loss, {name: weight.grad for name, weight in named.items() if weight.grad is not None}


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Norm of the difference of all gradients, relative to that of the expected ones."""
    assert found.keys() == expected.keys()
    a, b = (torch.cat([grads[name].flatten().double() for name in sorted(expected)]) for grads in (found, expected))
    assert b.norm() > 0
    return ((a - b).norm() / b.norm()).item()
