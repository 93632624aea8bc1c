"""Training on rows that share a prefix: run once for all of them, against each row run whole.

    python benchmarks/shared_prefix.py                                       # about a minute
    python benchmarks/shared_prefix.py --vocab 4096 32064 --branch 150 200 --rows 4 8 16 32

A step of N rows of one user, prefix 600, forward and backward, both ways through `backward_rows`, so
with the output layer at the answers only. Each way runs at the pass size that suits it best. Loss and
gradients are shown equal first; then the ways take turns, and medians are compared.
    tokens   what sharing saves at most: N(P+L) / (P+NL)
    share    speed-up / tokens; attention is the part that doesn't shrink with the tokens
    MB       most bytes kept for the backward pass at any time, weights left out
"""

import argparse
import os
import random
import statistics
import time
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torchtune.models.phi3 import lora_phi3
from torchtune.modules.peft import get_adapter_params, set_trainable_params

from personas_tune.datasets import TokenRow
from personas_tune.training.shared_prefix import backward_rows

LOSS = nn.CrossEntropyLoss()


@dataclass(frozen=True)
class Case:
    vocab: int
    prefix: int
    branch: int
    rows: int

    @property
    def token_ratio(self) -> float:
        return self.rows * (self.prefix + self.branch) / (self.prefix + self.rows * self.branch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="+", default=[4096])
    parser.add_argument("--prefix", type=int, default=600)
    parser.add_argument("--branch", type=int, nargs="+", default=[150])
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 16], help="rows of the user, N")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--pass-sizes", type=int, nargs="+", default=[2, 8], help="rows of one pass that are tried")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(
        f"torch {torch.__version__}, {args.device}, {args.dtype}, {args.threads} threads, load {os.getloadavg()[0]:.1f}"
    )
    print("                            rows/s (rows of a pass)                              MB kept")
    print(" vocab prefix branch rows       plain      shared  speed-up  tokens  share   plain  shared")
    for vocab in args.vocab:
        model = build_model(args, vocab)
        for branch in args.branch:
            for rows in args.rows:
                compare(model, Case(vocab, args.prefix, branch, rows), args.pass_sizes, args.repeats)


def build_model(args: argparse.Namespace, vocab: int) -> nn.Module:
    """A Phi-3 of random weights, LoRA on q and k."""
    torch.manual_seed(0)
    with torch.device(args.device):
        model = lora_phi3(
            ["q_proj", "k_proj"],
            vocab_size=vocab,
            num_layers=args.layers,
            num_heads=args.dim // 64,
            num_kv_heads=args.dim // 64,
            embed_dim=args.dim,
            intermediate_dim=args.dim * 8 // 3 // 32 * 32,
            max_seq_len=4096,
            lora_rank=args.rank,
            lora_alpha=args.rank,
        ).to(getattr(torch, args.dtype))
    adapter = get_adapter_params(model)
    set_trainable_params(model, adapter)
    for name, weight in adapter.items():
        if "lora_b" in name:
            nn.init.normal_(weight, std=0.02)  # zeros would leave half of the gradients zero
    return model


def compare(model: nn.Module, case: Case, pass_sizes: list[int], repeats: int) -> None:
    rows = rows_of_one_user(case)

    def run(sharing: str, pass_size: int) -> float:
        model.zero_grad()
        return backward_rows(
            model, rows, ["u"] * len(rows), LOSS, pad_id=0, sharing=sharing, branches_per_pass=pass_size
        )

    tried = {sharing: {size: timed(partial(run, sharing, size)) for size in pass_sizes} for sharing in ("off", "auto")}
    best = {sharing: min(times, key=times.__getitem__) for sharing, times in tried.items()}
    bytes_kept = show_equal(model, lambda sharing: run(sharing, best[sharing]))
    seconds = {sharing: [times[best[sharing]]] for sharing, times in tried.items()}
    for _ in range(repeats - 1):
        for sharing in seconds:
            seconds[sharing].append(timed(partial(run, sharing, best[sharing])))
    plain, shared = (statistics.median(seconds[sharing]) for sharing in ("off", "auto"))
    print(
        f"{case.vocab:6} {case.prefix:6} {case.branch:6} {case.rows:4}"
        f" {case.rows / plain:7.2f} ({best['off']}) {case.rows / shared:7.2f} ({best['auto']})"
        f" {plain / shared:9.2f} {case.token_ratio:7.2f} {plain / shared / case.token_ratio:6.0%}"
        f" {bytes_kept['off'] / 1e6:7.0f} {bytes_kept['auto'] / 1e6:7.0f}",
        flush=True,
    )


def rows_of_one_user(case: Case) -> list[TokenRow]:
    draw = random.Random(0)
    prefix = draw.choices(range(case.vocab), k=case.prefix)
    rows = []
    for index in range(case.rows):
        branch = [index, *draw.choices(range(case.vocab), k=case.branch - 1)]
        rows.append(TokenRow(prefix + branch, case.prefix + case.branch - 2))  # a label and the end of turn
    return rows


def show_equal(model: nn.Module, run: Callable[[str], float]) -> dict[str, int]:
    """Stop if gradients differ; returns the most bytes kept, as it has to run both ways anyway."""
    losses, gradients, bytes_kept = [], [], {}
    for sharing in ("off", "auto"):
        kept = KeptBytes()
        with kept:
            losses.append(run(sharing))
        bytes_kept[sharing] = kept.most
        gradients.append(torch.cat([w.grad.flatten().float() for w in model.parameters() if w.grad is not None]))
    difference = float((gradients[1] - gradients[0]).norm() / gradients[0].norm())
    limit = 1e-5 if next(model.parameters()).dtype == torch.float32 else 0.05
    print(f"  loss {losses[0]:.6f} and {losses[1]:.6f}, gradients differ by {difference:.1e} of their norm")
    if not difference <= limit:
        raise SystemExit(f"gradients differ by more than {limit}")
    return bytes_kept


def timed(run: Callable[[], object]) -> float:
    clock = time.perf_counter if torch.cuda.is_initialized() else time.process_time
    start = clock()
    run()  # ends with reading the loss, so a GPU is done
    return clock() - start


class KeptBytes(torch.autograd.graph.saved_tensors_hooks):
    """The most bytes of distinct storages that autograd kept at a time."""

    def __init__(self) -> None:
        super().__init__(self.keep, lambda kept: kept.tensor)
        self.now = self.most = 0
        self.n_kept: Counter[tuple[int, int]] = Counter()  # by address and size

    def keep(self, tensor: Tensor) -> "Kept":
        storage = tensor.untyped_storage()
        return Kept(self, tensor.detach(), (storage.data_ptr(), storage.nbytes()))

    def change(self, storage: tuple[int, int], by: int) -> None:
        before = self.n_kept[storage] > 0
        self.n_kept[storage] += by
        self.now += storage[1] * ((self.n_kept[storage] > 0) - before)
        self.most = max(self.most, self.now)


class Kept:
    def __init__(self, counter: KeptBytes, tensor: Tensor, storage: tuple[int, int]) -> None:
        self.tensor = tensor
        counter.change(storage, 1)
        weakref.finalize(self, counter.change, storage, -1)


if __name__ == "__main__":
    main()
