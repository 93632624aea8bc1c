"""Attention in two parts: output and gradients of attention over all keys at once."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from personas_tune.training import prefix_attention
from personas_tune.training.prefix_attention import attend_with_prefix

RUNS = {"one prefix": [(7, 3)], "three prefixes": [(7, 2), (5, 0), (3, 1)]}


def at_once(q, k, v, prefix_k, prefix_v, runs, mask) -> Tensor:
    """Each branch alone, with its prefix's keys before its own and a mask over all of them."""
    outs = []
    owners = [(index, length) for index, (length, n) in enumerate(runs) for _ in range(n)]
    for branch, (index, length) in enumerate(owners):
        keys = torch.cat([prefix_k[index, :, :length], k[branch]], 1)
        values = torch.cat([prefix_v[index, :, :length], v[branch]], 1)
        own = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril() if mask is None else mask[branch]
        seen = torch.cat([torch.ones(q.shape[2], length, dtype=torch.bool), own], 1)
        outs.append(torch.nn.functional.scaled_dot_product_attention(q[branch], keys, values, attn_mask=seen))
    return torch.stack(outs)


def heads(n: int, length: int) -> Tensor:
    """As torchtune lays them out: contiguous as (n, length, heads, dim)."""
    return torch.randn(n, length, 4, 8).transpose(1, 2).requires_grad_()


@pytest.mark.parametrize("kernel", ["cpu", "none"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
def test_two_parts_are_the_whole(runs, masked, kernel, monkeypatch) -> None:
    monkeypatch.setattr(prefix_attention, "_kernel", lambda q, mask: kernel)  # the one without needs no CUDA either
    torch.manual_seed(0)
    tensors = [heads(3, 5) for _ in range(3)] + [heads(len(runs), 7) for _ in range(2)]
    mask = (torch.rand(3, 5, 5) > 0.5) | torch.eye(5, dtype=torch.bool) if masked else None
    outs = [attend(*tensors, runs, mask) for attend in (at_once, attend_with_prefix)]
    torch.testing.assert_close(outs[1], outs[0], rtol=0, atol=2e-6)
    gradient = torch.randn_like(outs[0])
    expected, found = (torch.autograd.grad(out, tensors, gradient) for out in outs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-6)


def test_bf16_is_rounded_and_no_more() -> None:
    torch.manual_seed(0)
    tensors = [heads(3, 5) for _ in range(3)] + [heads(1, 7) for _ in range(2)]
    exact = attend_with_prefix(*tensors, [(7, 3)])
    rounded = attend_with_prefix(*(tensor.bfloat16() for tensor in tensors), [(7, 3)])
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=0.02, atol=0.02)


def test_cuda_s_kernel_takes_what_it_is_given(monkeypatch) -> None:
    monkeypatch.setattr(prefix_attention, "_has_flash", lambda device: True)
    with FakeTensorMode():  # shapes and signatures: no GPU is needed
        q, k, v = (torch.empty(3, n, 4, 96, dtype=torch.bfloat16, device="cuda").transpose(1, 2) for n in (5, 7, 7))
        assert prefix_attention._kernel(q, None) == "flash"
        out, log_sum, state = prefix_attention._attend(q, k, v, None, causal=False)
        gradients = prefix_attention._attend_backward(out, q, k, v, out, log_sum, None, False, state)
    assert (out.shape, log_sum.shape) == (q.shape, q.shape[:3])
    assert [gradient.shape for gradient in gradients] == [q.shape, k.shape, v.shape]
