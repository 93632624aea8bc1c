"""What training should cost, by counting: floating point operations, bytes, seconds.

    python benchmarks/predicted.py                                       # Phi-3-Mini, rank 256 on q and k, on A100s
    python benchmarks/predicted.py --tflops 400 --gpus 1                 # another GPU
    python benchmarks/predicted.py --dim 512 --layers 6 --ffn 1344 --vocab 32064 --rank 32   # a small model's ratios

Counted: frozen weights run forward, and backward for the activations' gradients only; LoRA forward and twice that
backward; attention (4 x width x keys a query and layer) forward and 2.5 times that backward; the output layer at answer
tokens. `--tflops` is what a GPU really does of its peak: 140 of an A100's 312 in bf16 is what torchtune's own table of
its eager runs comes to (44%). `share` is the speed-up over separate rows, beside the ratio of tokens alone.

Bytes are those of personas_tune/training/memory_estimate.py, which `personas-tune doctor` tells, too: the
training's own passes without numbers, of rows whose prefix is three quarters of them; 1 GB more is for CUDA itself.
Nothing here is measured, but `share` can be held against benchmarks/training_peers.py on the shape that it runs.
"""

import argparse
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import nn

from personas_tune.adapters.base_model import build_on_meta
from personas_tune.training.memory_estimate import (
    CUDA_BYTES,
    held_memory,
    optimizer_step_bytes,
    training_passes,
)

ADAMW_STATE = 8  # bytes a weight


@dataclass(frozen=True)
class Shape:
    dim: int
    layers: int
    ffn: int
    vocab: int
    rank: int

    @property
    def frozen(self) -> int:
        """Weights in the layers."""
        return self.layers * (4 * self.dim**2 + 3 * self.dim * self.ffn)

    @property
    def adapter(self) -> int:
        """Weights of LoRA on q and k."""
        return self.layers * 2 * 2 * self.dim * self.rank

    def flops(self, n_tokens: float, keys: float, *, recompute: bool) -> float:
        """Forward and backward of ``n_tokens`` that attend to ``keys`` each, without the output layer."""
        linear, lora, attention = 2 * self.frozen, 2 * self.adapter, 4 * self.dim * keys * self.layers
        without_gradient = 2 * 3 * self.dim**2  # q, k and v of the first layer: nothing before them is trained
        backward = linear - without_gradient + 2 * lora + 2.5 * attention
        return n_tokens * (linear + lora + attention + backward + recompute * (linear + lora + attention))

    def head_flops(self, n_answers: int) -> float:
        return 2 * 2 * self.dim * self.vocab * n_answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("dim", 3072), ("layers", 32), ("ffn", 8192), ("vocab", 32064), ("rank", 256)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--prefix", type=int, default=600)
    parser.add_argument("--branch", type=int, nargs="+", default=[150, 200])
    parser.add_argument("--rows-per-user", type=int, nargs="+", default=[1, 4, 8, 16, 32])
    parser.add_argument("--batch-size", type=int, default=2, help="branches of one pass")
    parser.add_argument("--tflops", type=float, default=140)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--personas", type=int, default=4)
    parser.add_argument("--rows-per-step", type=int, default=16)
    parser.add_argument("--rows", type=int, default=22488, help="of the whole training: the paper's 11,244, twice")
    args = parser.parse_args()
    shape = Shape(args.dim, args.layers, args.ffn, args.vocab, args.rank)
    heads = "".join(f"{f'minutes, {n} GPUs':>17}{'GB each':>9}" for n in args.gpus)
    print(f"recompute  branch  rows per user  rows/s a GPU  share  tokens  MB of passes{heads}")
    network_of = partial(build, shape, args.heads, args.dtype)
    for recompute in (True, False):
        for branch in args.branch:
            for n in args.rows_per_user:
                print(line(args, shape, network_of, branch, n, recompute))


def line(
    args: argparse.Namespace, shape: Shape, network_of: partial[nn.Module], branch: int, n: int, recompute: bool
) -> str:
    cost = row_cost(shape, args.prefix, branch, n, recompute)
    plain = row_cost(shape, args.prefix, branch, 1, recompute)
    tokens = n * (args.prefix + branch) / (args.prefix + n * branch)
    rate = args.tflops * 1e12 / cost
    # Beyond two passes of branches, more rows of a user don't make a pass larger.
    of_passes = passes(network_of, args.prefix + branch, min(n, 2 * args.batch_size), args.batch_size, recompute)
    gpus = ""
    for n_gpus in args.gpus:
        adapters = max(1, -(-args.personas // n_gpus))
        of_one = args.rows_per_step // max(1, n_gpus // args.personas)  # a step's rows, shared by a persona's GPUs
        together = row_cost(shape, args.prefix, branch, min(n, of_one), recompute)
        minutes = args.rows * together / (args.tflops * 1e12) / n_gpus / 60
        gigabytes = (held(network_of, adapters) + of_passes + CUDA_BYTES) / 1e9
        gpus += f"{minutes:17.1f}{gigabytes:9.1f}"
    kind = "yes" if recompute else "no"
    return f"{kind:>9}{branch:8}{n:15}{rate:14.1f}{plain / cost:7.2f}{tokens:8.2f}{of_passes / 1e6:14.0f}{gpus}"


def row_cost(shape: Shape, prefix: int, branch: int, n: int, recompute: bool) -> float:
    """Operations of a row, of which ``n`` share a prefix."""
    of_prefix = shape.flops(prefix, prefix / 2, recompute=recompute)
    of_branch = shape.flops(branch, prefix + branch / 2, recompute=recompute)
    return of_prefix / n + of_branch + shape.head_flops(2)


@cache
def passes(network_of: partial[nn.Module], n_tokens: int, n: int, batch_size: int, recompute: bool) -> int:
    """The most bytes that a training pass holds, or the optimizer's step, if that is more."""
    network = network_of(enable_activation_checkpointing=recompute)
    of_passes = training_passes(
        network, batch_size=batch_size, rows_per_user=n, n_tokens=n_tokens, share=True, loss_fn=nn.CrossEntropyLoss()
    )
    return max(of_passes, optimizer_step_bytes(network, torch.optim.AdamW, on_gpu=True))


@cache
def held(network_of: partial[nn.Module], n_adapters: int) -> int:
    """Bytes of the base, its adapters and their optimizers' states."""
    return held_memory(network_of(), n_adapters=n_adapters, state_bytes=ADAMW_STATE, trains=True).total


def build(shape: Shape, heads: int, dtype: str, *, enable_activation_checkpointing: bool = False) -> nn.Module:
    """Phi-3 of a shape, on the meta device."""
    model = {
        "_component_": "torchtune.models.phi3.lora_phi3",
        "vocab_size": shape.vocab,
        "num_layers": shape.layers,
        "num_heads": heads,
        "num_kv_heads": heads,
        "embed_dim": shape.dim,
        "intermediate_dim": shape.ffn,
        "max_seq_len": 4096,
        "lora_attn_modules": ["q_proj", "k_proj"],
        "lora_rank": shape.rank,
        "lora_alpha": 2 * shape.rank,
    }
    return build_on_meta(model, dtype, enable_activation_checkpointing=enable_activation_checkpointing)


if __name__ == "__main__":
    main()
