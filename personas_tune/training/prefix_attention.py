"""Attention of branches to a prefix that they share and to themselves; neither masks nor copies of the prefix.

The softmax over both parts is put together from one attention call each: a part's output counts
with its share of the sum of exponentials, whose logarithm the kernels return (as Hydragen does for
decoding, arXiv 2402.05099). In the backward pass the same kernels give each part's gradients when
they get the joint output and the joint logarithm: all they take from the forward pass is the
probability ``exp(score - log of the sum)`` and the row sum of ``dO * O`` (FlashAttention-2, arXiv
2307.08691, algorithm 2).

Shapes: B branches, S their length, U prefixes, P their length, H heads, D their size; Q queries, K keys.
"""

import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_KERNELS = torch.ops.aten
Runs = Sequence[tuple[int, int]]  # of each prefix: its length without padding, and how many branches it has
# Output, logarithm of each query's sum of exponentials, shape (B, H, Q), and what the kernel's backward needs.
_Attended = tuple[Tensor, Tensor, tuple[Any, ...]]


def attend_with_prefix(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, runs: Runs, mask: Tensor | None = None
) -> Tensor:
    """Attention of each branch to all of its prefix and to its own tokens.

    Args:
        q: Queries of the branches, shape ``(B, H, Q, D)``.
        k: Their own keys, shape ``(B, H, K, D)``.
        v: Their own values, shape ``(B, H, K, D)``.
        prefix_k: Keys of the prefixes, shape ``(U, H, P, D)``.
        prefix_v: Values of the prefixes, shape ``(U, H, P, D)``.
        runs: Which branches continue which prefix; those of the first prefix come first.
        mask: Which of its own keys a query sees, one or more, shape ``(B, Q, K)``; None for all up to itself.

    Returns:
        Shape ``(B, H, Q, D)``.
    """
    return _PrefixAttention.apply(q, k, v, prefix_k, prefix_v, runs, mask)  # type: ignore[no-untyped-call,no-any-return]


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, runs: Runs, mask: Tensor | None
    ) -> Tensor:
        own, own_log_sum, own_state = _attend(q, k, v, mask, causal=mask is None)
        outs, log_sums, states = [], [], []
        for index, length, start, n in _runs(runs):
            queries = q.narrow(0, start, n)
            keys, values = _prefix(prefix_k, index, length), _prefix(prefix_v, index, length)
            out, log_sum, state = _attend(_as_one(queries), keys, values, None, causal=False)
            outs.append(_as_many(out, queries))
            log_sums.append(_as_many(log_sum.unsqueeze(-1), queries).squeeze(-1))
            states.append(state)
        prefix_log_sum = _joined(log_sums)
        own_share = (own_log_sum - prefix_log_sum).sigmoid().unsqueeze(-1)
        merged = torch.lerp(_joined(outs).to(own_share.dtype), own.to(own_share.dtype), own_share).to(q.dtype)
        log_sum = torch.logaddexp(own_log_sum, prefix_log_sum)
        ctx.save_for_backward(q, k, v, prefix_k, prefix_v, merged, log_sum, mask)
        ctx.runs, ctx.own_state, ctx.states = runs, own_state, states
        return merged

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, prefix_k, prefix_v, out, log_sum, mask = ctx.saved_tensors
        own_q, own_k, own_v = _attend_backward(gradient, q, k, v, out, log_sum, mask, mask is None, ctx.own_state)
        of_prefix_q, of_prefix_k, of_prefix_v = [], torch.zeros_like(prefix_k), torch.zeros_like(prefix_v)
        for (index, length, start, n), state in zip(_runs(ctx.runs), ctx.states, strict=True):
            one_gradient, one_q, one_out, one_log_sum = (
                _as_one(x.narrow(0, start, n)) for x in (gradient, q, out, log_sum.unsqueeze(-1))
            )
            keys, values = _prefix(prefix_k, index, length), _prefix(prefix_v, index, length)
            of_q, of_k, of_v = _attend_backward(
                one_gradient, one_q, keys, values, one_out, one_log_sum.squeeze(-1), None, False, state
            )
            of_prefix_q.append(_as_many(of_q, q.narrow(0, start, n)))
            _prefix(of_prefix_k, index, length).copy_(of_k)
            _prefix(of_prefix_v, index, length).copy_(of_v)
        return own_q + _joined(of_prefix_q), own_k, own_v, of_prefix_k, of_prefix_v, None, None


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> _Attended:
    kernel = _kernel(q, mask)
    if kernel == "cpu":
        out, log_sum = _KERNELS._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=_additive(mask, q.dtype)
        )
        return out, log_sum, ()
    if kernel == "flash":
        out, log_sum, *state, _ = _KERNELS._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
        return out, log_sum, tuple(state)
    scores = _scores(q, k, mask, causal)
    log_sum = scores.logsumexp(-1)
    return (scores - log_sum.unsqueeze(-1)).exp().to(v.dtype) @ v, log_sum, ()


def _attend_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum: Tensor,
    mask: Tensor | None,
    causal: bool,
    state: tuple[Any, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, given output and logarithm of the whole softmax that this is a part of."""
    kernel = _kernel(q, mask)
    if kernel == "cpu":
        return _KERNELS._scaled_dot_product_flash_attention_for_cpu_backward(  # type: ignore[no-any-return]
            gradient, q, k, v, out, log_sum, 0.0, causal, attn_mask=_additive(mask, q.dtype)
        )
    if kernel == "flash":
        ends, random = state[:4], state[4:]
        log_sum = log_sum.clone(memory_format=torch.contiguous_format)  # this kernel doesn't look at its strides
        return _KERNELS._scaled_dot_product_flash_attention_backward(  # type: ignore[no-any-return]
            gradient, q, k, v, out, log_sum, *ends, 0.0, causal, *random
        )
    p = (_scores(q, k, mask, causal) - log_sum.unsqueeze(-1)).exp()
    mean = (gradient.float() * out.float()).sum(-1, keepdim=True)
    of_scores = (p * ((gradient @ v.mT).float() - mean) / math.sqrt(q.shape[-1])).to(q.dtype)
    return of_scores @ k, of_scores.mT @ q, p.to(v.dtype).mT @ gradient


def _kernel(q: Tensor, mask: Tensor | None) -> Literal["cpu", "flash", "none"]:
    if q.device.type == "cpu":
        return "cpu"
    if q.device.type == "meta":  # no numbers, so no kernel: for the memory of the one that a GPU would run
        return "flash" if mask is None else "none"
    fits = mask is None and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    return "flash" if fits and q.device.type == "cuda" and _has_flash(q.device) else "none"


@cache
def _has_flash(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    scores = (q @ k.mT).float() / math.sqrt(q.shape[-1])
    if causal:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril().unsqueeze(0)
    return scores if mask is None else scores.masked_fill(~mask.unsqueeze(1), -torch.inf)


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None:
        return None
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf).unsqueeze(1)


def _runs(runs: Runs) -> Iterator[tuple[int, int, int, int]]:
    """Index and length of each prefix that has branches, its first branch and how many there are."""
    start = 0
    for index, (length, n_branches) in enumerate(runs):
        if n_branches:
            yield index, length, start, n_branches
        start += n_branches


def _prefix(kept: Tensor, index: int, length: int) -> Tensor:
    return kept.narrow(0, index, 1).narrow(2, 0, length)


def _as_one(branches: Tensor) -> Tensor:
    """The queries of several branches as those of one sequence: ``(n, H, S, D)`` to ``(1, H, n S, D)``."""
    return branches.transpose(1, 2).flatten(0, 1).unsqueeze(0).transpose(1, 2)


def _as_many(one: Tensor, like: Tensor) -> Tensor:
    n, n_heads, length, _ = like.shape
    return one.transpose(1, 2).reshape(n, length, n_heads, -1).transpose(1, 2)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
