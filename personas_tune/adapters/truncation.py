"""Adapters of a lower rank: the best approximation of B A, and how far it is off."""

from dataclasses import replace

import torch
from torch import Tensor

from personas_tune.adapters.peft_config import rank_settings, scale_of
from personas_tune.adapters.peft_form import PeftAdapter, hf_modules


def truncate_peft(peft: PeftAdapter, rank: int) -> tuple[PeftAdapter, dict[str, float]]:
    """Cut every module of a PEFT adapter down to a rank by its singular value decomposition; scales are kept.

    Modules within the rank stay as they are, to the byte.

    Args:
        peft: The adapter.
        rank: The largest rank that is left.

    Returns:
        The adapter, and of each Hugging Face module ``|B A - B' A'| / |B A|`` in the Frobenius norm (0.0 where nothing
        was cut).
    """
    modules = hf_modules(peft.weights)
    ranks = {module: peft.weights[names["lora_A.weight"]].shape[0] for module, names in modules.items()}
    alphas = {module: scale_of(module, ranks[module], peft.config) * ranks[module] for module in modules}
    errors = dict.fromkeys(modules, 0.0)
    weights, before = dict(peft.weights), dict(ranks)
    for module in (module for module in modules if ranks[module] > rank):
        a, b = modules[module]["lora_A.weight"], modules[module]["lora_B.weight"]
        weights[a], weights[b], errors[module] = _truncated(weights[a], weights[b], rank)
        alphas[module] *= weights[a].shape[0] / ranks[module]
        ranks[module] = weights[a].shape[0]
    if max(ranks.values()) == max(before.values()):
        return peft, errors
    largest = max(ranks, key=lambda module: ranks[module])
    config = {**peft.config, **rank_settings(ranks, alphas, largest), "use_rslora": False}
    return replace(peft, weights=weights, config=config), errors


def _truncated(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """A and B of a lower rank, and the relative error. With B = Q R and A^T = P S, R S^T is small: rank x rank."""
    q, r = torch.linalg.qr(b.double())
    p, s = torch.linalg.qr(a.double().T)
    u, values, v = torch.linalg.svd(r @ s.T, full_matrices=False)
    kept = values[:rank].sqrt()
    new_b = (q @ u[:, :rank]) * kept
    new_a = kept[:, None] * (v[:rank] @ p.T)
    whole = float(values.square().sum().sqrt())
    lost = float(values[rank:].square().sum().sqrt())
    return new_a.to(a.dtype).contiguous(), new_b.to(b.dtype).contiguous(), lost / whole if whole else 0.0
