"""Training with shared prefixes against named peers, on the same rows in the same run.

    OMP_NUM_THREADS=1 python benchmarks/training_peers.py
    python benchmarks/training_peers.py --device cuda --dtype bfloat16 --model phi3_mini --compile
    python benchmarks/training_peers.py --quick     # tiny sizes: shows that it runs, its figures say nothing

The model is a Phi-3 of random weights with LoRA on q and k, no dropout; a step is an optimizer step.
    ours            personas_tune's training step, prefix_sharing auto, N rows of each user in a step
    as shipped      the same as configs/phi3_persona.yaml sets it
    plain           the same with prefix_sharing off: each row whole, output layer at the answers only
    stock default   torchtune's lora_finetune_single_device by its own config for Phi-3-Mini (batch 2, checkpointing)
    stock best      the same recipe without checkpointing, the fastest of several batches, packs and torch.compile
    PEFT            four adapters resident, set_adapter a microbatch, labels-only head, no checkpointing

Every way runs at the fastest of the batch sizes that are tried. First the mean loss and the gradients of one step are
shown equal to plain's: in fp32 they must not differ by more than 1e-5 of their norm, or the status is 1. Then all take
turns, and medians are given. Time is CPU time, on a GPU wall time. No peer's work depends on N.
    tokens   what sharing can save of the tokens: N(P+L) / (P+NL)
    share    speed-up over plain / tokens
    MB       most memory that tensors took beyond the weights during a step
    floor    rows/s if nothing but the arithmetic of benchmarks/predicted.py took time, at --tflops
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from peer_model import PHI3_MINI, Gradients, Machine, ModelSize, draw_weights
from peer_ways import Entry, Ways
from predicted import Shape, row_cost
from rows import RowShape, made_up_rows

from personas_tune.datasets import TokenRow

PEERS = ("plain", "stock default", "stock best", "PEFT")  # that ratios are given to
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MOST_DIFFERENCE = {torch.float32: 1e-5, torch.bfloat16: 0.05}
QUICK = [
    "--dim", "32", "--layers", "2", "--heads", "4", "--rank", "4", "--vocab", "128", "--prefix", "60", "--branch", "16",
    "--rows-per-step", "8", "--rows-per-user", "4", "--pass-sizes", "4", "--rounds", "1",
]  # fmt: skip


def arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["small", "phi3_mini"], default="small")
    parser.add_argument("--vocab", type=int, nargs="+", default=[4096, 32064])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--prefix", type=int, default=600)
    parser.add_argument("--branch", type=int, nargs="+", default=[150, 200])
    parser.add_argument("--spread", type=float, default=0.1, help="lengths differ from their means by up to this share")
    parser.add_argument("--rows-per-step", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--rows-per-user", type=int, nargs="+", default=[4, 8, 16, 32], help="N")
    parser.add_argument("--pass-sizes", type=int, nargs="+", default=[1, 2, 4, 8], help="batch sizes that are tried")
    parser.add_argument("--pack-rows", type=int, nargs="+", default=[2], help="rows of a pack that stock tries")
    parser.add_argument("--peers", nargs="*", choices=["stock", "peft"], default=["stock", "peft"])
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing in ours and plain")
    parser.add_argument("--compile", action="store_true", help="torch.compile in ours and plain; stock tries it too")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--tflops", type=float, help="of the device, for the column floor")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    return parser.parse_args([*QUICK, *words] if "--quick" in words else words)


def main() -> None:
    args = arguments(sys.argv[1:])
    machine = Machine(torch.device(args.device), DTYPES[args.dtype])
    torch.set_num_threads(1 if args.device == "cpu" else torch.get_num_threads())
    print_machine(args)
    small = ModelSize(0, args.dim, args.layers, args.heads, args.dim * 8 // 3 // 32 * 32, args.rank)
    sizes = [PHI3_MINI] if args.model == "phi3_mini" else [replace(small, vocab_size=vocab) for vocab in args.vocab]
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            ways = Ways(args, machine, size, draw_weights(size, machine), Path(folder))
            for branch in args.branch:
                for rows_per_step in args.rows_per_step:
                    compare(ways, branch, rows_per_step)


def print_machine(args: argparse.Namespace) -> None:
    names = ("torch", "torchtune", "transformers", "peft")
    device = torch.cuda.get_device_name() if args.device == "cuda" else cpu_name()
    print(f"{date.today()}, {device}, {args.dtype}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    print(", ".join(f"{name} {version(name)}" for name in names), f"Python {platform.python_version()}", sep=", ")


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def compare(ways: Ways, branch: int, rows_per_step: int) -> None:
    shape = ways.shape(branch)
    print(f"\nvocabulary {shape.vocab}, prefix {shape.prefix}, branch {branch}, {rows_per_step} rows a step")
    entries = list(ways.entries(shape, rows_per_step))
    show_equal(entries, rows_of_two_users(shape), ways.machine)
    for _ in range(ways.args.rounds):
        for entry in entries:
            entry.seconds.append(entry.peer.step())
    rates = {entry.name: rows_per_step / statistics.median(entry.seconds) for entry in entries}
    peers = [name for name in PEERS if name in rates]
    named = "".join(f"{'/ ' + name:>16}" for name in peers)
    print(f"  {'':18} {'':38}   rows/s     MB {named}   tokens   share    floor")
    for entry in entries:
        ratios = "".join(f"{rates[entry.name] / rates[name]:16.2f}" for name in peers)
        memory = "-" if entry.peak_bytes is None else f"{entry.peak_bytes / 1e6:.0f}"
        print(f"  {entry.name:<18} {entry.settings:<38} {rates[entry.name]:8.3g} {memory:>6} {ratios}", end="")
        print(f"{tokens_and_share(shape, entry, rates)} {floor(ways, shape, entry)}", flush=True)


def tokens_and_share(shape: RowShape, entry: Entry, rates: Mapping[str, float]) -> str:
    if entry.n_together == 1:
        return f"{'':17}"
    tokens = shape.token_ratio(entry.n_together)
    return f"{tokens:9.2f} {rates[entry.name] / rates['plain'] / tokens:7.0%}"


def floor(ways: Ways, shape: RowShape, entry: Entry) -> str:
    if ways.args.tflops is None:
        return f"{'-':>8}"
    size, recompute = ways.size, "checkpointing" in entry.settings
    counted = Shape(size.embed_dim, size.num_layers, size.intermediate_dim, size.vocab_size, size.rank)
    cost = row_cost(counted, shape.prefix, shape.branch, entry.n_together, recompute)
    return f"{ways.args.tflops * 1e12 / cost:8.3g}"


def rows_of_two_users(shape: RowShape) -> list[TokenRow]:
    rows, n = made_up_rows(shape), min(8, shape.n_rows)
    return rows[:n] + rows[shape.n_rows : shape.n_rows + n]


def show_equal(entries: Sequence[Entry], rows: Sequence[TokenRow], machine: Machine) -> None:
    """Stop if losses or gradients differ from plain's; notes each way's memory, as each has to run anyway."""
    found: list[tuple[float, Gradients]] = []
    for entry in entries:
        compiled = "compile" in entry.settings
        of_entry, entry.peak_bytes = machine.with_peak_bytes(partial(entry.peer.gradients, rows), compiled=compiled)
        found.append(of_entry)
    (plain_loss, plain), *_ = found
    print(f"  one step of {len(rows)} rows: loss {plain_loss:.6f}; difference of loss and of gradients to plain:")
    differences: list[float] = []
    for entry, (loss, gradients) in zip(entries, found, strict=True):
        of_loss, of_gradients = abs(loss / plain_loss - 1), relative_difference(gradients, plain)
        print(f"    {entry.name:<18} {of_loss:.1e} {of_gradients:.1e}", flush=True)
        differences += [of_loss, of_gradients]
    limit = MOST_DIFFERENCE[machine.dtype]
    if not all(difference <= limit for difference in differences):  # NaN is no less, either
        raise SystemExit(f"they differ by more than {limit:g}")


def relative_difference(gradients: Gradients, plain: Gradients) -> float:
    assert gradients.keys() == plain.keys()
    one, other = (torch.cat([each[name].flatten().double() for name in plain]) for each in (gradients, plain))
    return float((one - other).norm() / other.norm())


if __name__ == "__main__":
    main()
