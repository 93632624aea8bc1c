"""torchtune's own recipe with users' prefixes shared, against the same recipe on the same rows as they are.

    OMP_NUM_THREADS=1 python benchmarks/stock_prefix.py
    python benchmarks/stock_prefix.py --quick     # tiny sizes: shows that it runs, its figures say nothing

The recipe is lora_finetune_single_device, with a Phi-3 of random weights and LoRA on q and k; a step is an optimizer
step. It gets its rows one by one (several batch sizes), packed (two rows a pack), and as items of
personas_tune.datasets.persona_prefix_dataset, N rows of a user an item. First loss and gradients of a step are shown
equal: they must not differ by more than 1e-5 of their norm, or the status is 1. The fastest of each kind then take
turns, and medians of CPU time are given.
    tokens   what sharing can save of the tokens: N(P+L) / (P+NL)
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from peer_model import Machine, ModelSize, draw_weights
from peer_stock import Stock, StockSettings, write_base
from rows import RowShape, made_up_rows
from training_peers import print_machine, relative_difference

MOST_DIFFERENCE = 1e-5
QUICK = [
    "--dim", "32", "--layers", "2", "--heads", "4", "--rank", "4", "--vocab", "128",
    "--prefix", "200", "--branch", "40", "--rows-per-step", "8", "--rows-per-item", "4", "--rounds", "1",
]  # fmt: skip


def arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--prefix", type=int, default=600)
    parser.add_argument("--branch", type=int, default=150)
    parser.add_argument("--spread", type=float, default=0.1, help="lengths differ from their means by up to this share")
    parser.add_argument("--rows-per-step", type=int, default=16)
    parser.add_argument("--rows-per-item", type=int, nargs="+", default=[4, 8, 16], help="N")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4], help="rows, packs or items; all tried")
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing in all")
    parser.add_argument("--compile", action="store_true", help="compile: true in all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    return parser.parse_args([*QUICK, *words] if "--quick" in words else words)


def main() -> None:
    args = arguments(sys.argv[1:])
    torch.set_num_threads(1)
    args.device, args.dtype = "cpu", "float32"
    print_machine(args)
    machine = Machine(torch.device("cpu"), torch.float32)
    size = ModelSize(args.vocab, args.dim, args.layers, args.heads, args.dim * 8 // 3 // 32 * 32, args.rank)
    with tempfile.TemporaryDirectory() as folder:
        weights = draw_weights(size, machine)
        write_base(weights, Path(folder))
        for n in args.rows_per_item:
            shape = RowShape(args.vocab, args.prefix, args.branch, args.spread, args.rows_per_step // n, n)
            compare(args, partial(Stock, size, weights, machine, shape, args.rows_per_step, folder=Path(folder)), shape)


def compare(args: argparse.Namespace, build: partial[Stock], shape: RowShape) -> None:
    n = shape.n_rows
    kinds = {"rows": {}, "packs of 2": {"rows_per_pack": 2}, f"ours, N={n}": {"rows_per_item": n}}
    print(f"\nprefix {args.prefix}, branch {args.branch}, N={n}, {args.rows_per_step} rows a step")
    fastest = {name: fastest_of(name, kind, args, build) for name, kind in kinds.items()}
    rows = made_up_rows(shape)
    (plain_loss, plain), *others = (each.gradients(rows) for each in fastest.values())
    for loss, gradients in others:
        difference = max(abs(loss / plain_loss - 1), relative_difference(gradients, plain))
        print(f"  loss and gradients differ from those of rows by {difference:.1e}")
        if not difference <= MOST_DIFFERENCE:
            raise SystemExit(f"that is more than {MOST_DIFFERENCE:g}")
    seconds: dict[str, list[float]] = {name: [] for name in fastest}
    for _ in range(args.rounds):
        for name, each in fastest.items():
            seconds[name].append(each.step())
    rates = {name: args.rows_per_step / statistics.median(taken) for name, taken in seconds.items()}
    print(f"  {'':12} {'':32}   rows/s   / rows   / best   tokens")
    best = max(rates["rows"], rates["packs of 2"])
    for name, each in fastest.items():
        tokens = f"{shape.token_ratio(n):9.2f}" if name.startswith("ours") else ""
        ratios = f"{rates[name] / rates['rows']:8.2f} {rates[name] / best:8.2f}"
        print(f"  {name:<12} {each.settings!s:<32} {rates[name]:8.3g} {ratios}{tokens}", flush=True)


def fastest_of(name: str, kind: dict[str, int], args: argparse.Namespace, build: partial[Stock]) -> Stock:
    """The recipe with the batch size that is fastest in one step."""
    found: list[tuple[float, Stock]] = []
    for batch_size in args.batch_sizes:
        if args.rows_per_step % (batch_size * max(1, *kind.values(), 1)) == 0:
            settings = StockSettings(batch_size, **kind, checkpointing=args.checkpointing, compile=args.compile)
            recipe = build(settings=settings)
            found.append((recipe.step(), recipe))
    tried = ", ".join(f"{recipe.settings} {args.rows_per_step / seconds:.3g}" for seconds, recipe in found)
    print(f"  {name}, rows/s tried: {tried}", flush=True)
    return min(found, key=lambda one: one[0])[1]


if __name__ == "__main__":
    main()
