"""Training with shared prefixes against named peers, on the same rows in the same run.

    OMP_NUM_THREADS=1 python benchmarks/training_peers.py
    python benchmarks/training_peers.py --device cuda --dtype bf16 --model phi3_mini
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
    floor    rows/s if the arithmetic alone took time, at --tflops
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from omegaconf import OmegaConf
from peer_model import PHI3_MINI, Gradients, Machine, ModelSize, Peer, Weights, draw_weights
from peer_ours import Ours, Trainee, build_trainee
from peer_peft import Peft, PeftBase
from peer_stock import STOCK_DEFAULTS, Stock, StockSettings, write_base
from rows import RowShape, made_up_rows

from personas_tune.datasets import TokenRow

SHIPPED = OmegaConf.load(Path(__file__).parents[1] / "configs" / "phi3_persona.yaml")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MOST_DIFFERENCE = {torch.float32: 1e-5, torch.bfloat16: 0.05}
QUICK = [
    "--dim", "32", "--layers", "2", "--heads", "4", "--rank", "4", "--vocab", "128", "--prefix", "60", "--branch", "16",
    "--rows-per-step", "8", "--rows-per-user", "4", "--pass-sizes", "4", "--rounds", "1",
]  # fmt: skip


@dataclass
class Entry:
    """A way to train, with what was measured of it."""

    name: str
    settings: str
    peer: Peer
    n_together: int = 1
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0


Candidates = Mapping[str, Callable[[int], Peer]]  # by settings; the argument is the rows of a step


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
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--tflops", type=float, help="of the device: adds the column floor")
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
            bench = Bench(args, machine, size, draw_weights(size, machine), Path(folder))
            for branch in args.branch:
                for rows_per_step in args.rows_per_step:
                    compare(bench, branch, rows_per_step)


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


class Bench:
    """One size of model, and all ways to train it.

    Args:
        args: Of the command line.
        machine: Where everything runs.
        size: Of the model.
        weights: The same for all.
        folder: For the stock recipe's files.
    """

    def __init__(
        self, args: argparse.Namespace, machine: Machine, size: ModelSize, weights: Weights, folder: Path
    ) -> None:
        self.args, self.machine, self.size, self.weights, self.folder = args, machine, size, weights, folder
        self.trainees: dict[tuple[bool, bool], Trainee] = {}
        self.fastest: dict[str, str] = {}
        self.peft = PeftBase(size, machine, weights) if "peft" in args.peers else None
        if "stock" in args.peers:
            write_base(weights, folder)

    def shape(self, branch: int) -> RowShape:
        n_rows = max(self.args.rows_per_user)
        n_users = max(2, -(-2 * max(self.args.rows_per_step) // n_rows))
        return RowShape(self.size.vocab_size, self.args.prefix, branch, self.args.spread, n_users, n_rows)

    def entries(self, shape: RowShape, rows_per_step: int) -> Iterator[Entry]:
        """Plain first, then the peers, then ours."""
        yield self.tuned("plain", self.ours(shape, 1), rows_per_step)
        if "stock" in self.args.peers:
            build = self.stock(shape, [STOCK_DEFAULTS])[str(STOCK_DEFAULTS)]
            yield Entry("stock default", str(STOCK_DEFAULTS), build(rows_per_step))
            yield self.tuned("stock best", self.stock(shape, self.stock_settings(shape)), rows_per_step)
        if self.peft is not None:
            yield self.tuned("PEFT", self.peft_batches(shape, self.peft), rows_per_step)
        if rows_per_step == SHIPPED.batch_size * SHIPPED.gradient_accumulation_steps:
            yield self.shipped(shape, rows_per_step)
        for n in self.args.rows_per_user:
            if n <= rows_per_step:
                yield replace(self.tuned(f"ours, N={n}", self.ours(shape, n), rows_per_step), n_together=n)

    def ours(self, shape: RowShape, n_together: int) -> Candidates:
        checkpointing, compile = self.args.checkpointing, self.args.compile
        options = ", checkpointing" * checkpointing + ", compile" * compile
        build = partial(
            Ours, self.trainee(checkpointing, compile), self.machine, made_up_rows(shape),
            n_together=n_together, sharing="auto" if n_together > 1 else "off",
        )  # fmt: skip
        return {f"batch {size}{options}": partial(build, pass_size=size) for size in self.args.pass_sizes}

    def shipped(self, shape: RowShape, rows_per_step: int) -> Entry:
        checkpointing, compile = bool(SHIPPED.enable_activation_checkpointing), bool(SHIPPED.compile)
        n, pass_size = int(SHIPPED.rows_per_user), int(SHIPPED.batch_size)
        peer = Ours(
            self.trainee(checkpointing, compile), self.machine, made_up_rows(shape), rows_per_step,
            n_together=n, pass_size=pass_size, sharing="auto",
        )  # fmt: skip
        settings = f"batch {pass_size}" + ", checkpointing" * checkpointing + ", compile" * compile
        return Entry(f"as shipped, N={n}", settings, peer, n)

    def trainee(self, checkpointing: bool, compile: bool) -> Trainee:
        key = checkpointing, compile
        if key not in self.trainees:
            build = partial(build_trainee, checkpointing=checkpointing, compile=compile)
            self.trainees[key] = build(self.size, self.machine, self.weights)
        return self.trainees[key]

    def stock(self, shape: RowShape, tried: Iterable[StockSettings]) -> Candidates:
        build = partial(Stock, self.size, self.weights, self.machine, shape, folder=self.folder)
        return {str(settings): partial(build, settings=settings) for settings in tried}

    def stock_settings(self, shape: RowShape) -> list[StockSettings]:
        """Batches and packs; and with torch.compile the fastest of them."""
        tried = [StockSettings(size) for size in self.args.pass_sizes]
        tried += [StockSettings(1, n) for n in self.args.pack_rows]
        if not self.args.compile:
            return tried
        eager = self.fastest_of("stock, not compiled", self.stock(shape, tried), max(self.args.pass_sizes))
        return [*tried, *(replace(one, compile=True) for one in tried if str(one) == eager)]

    def peft_batches(self, shape: RowShape, base: PeftBase) -> Candidates:
        build = partial(Peft, base, self.machine, made_up_rows(shape))
        return {f"batch {size}": partial(build, batch_size=size) for size in self.args.pass_sizes}

    def tuned(self, name: str, candidates: Candidates, rows_per_step: int) -> Entry:
        n_together = int(name.partition("N=")[2] or 1)
        fastest = self.fastest_of(name, candidates, max(n_together, *self.args.pass_sizes))
        return Entry(name, fastest, candidates[fastest](rows_per_step))

    def fastest_of(self, name: str, candidates: Candidates, n_rows: int) -> str:
        """The fastest in one step of ``n_rows``; what was fastest once is taken for other rows, too."""
        if name not in self.fastest:
            seconds = {settings: self.try_out(settings, build, n_rows) for settings, build in candidates.items()}
            self.fastest[name] = min(seconds, key=seconds.__getitem__)
            tried = ", ".join(f"{settings} {n_rows / value:.3g}" for settings, value in seconds.items())
            print(f"  {name}, rows/s tried: {tried}", flush=True)
        return self.fastest[name]

    def try_out(self, settings: str, build: Callable[[int], Peer], n_rows: int) -> float:
        """Seconds of a step, of the second one where the first has to warm up; infinite if memory doesn't do."""
        try:
            peer = build(n_rows)
            if self.machine.device.type == "cuda" or "compile" in settings:
                peer.step()
            return peer.step()
        except torch.OutOfMemoryError:
            return float("inf")


def compare(bench: Bench, branch: int, rows_per_step: int) -> None:
    shape = bench.shape(branch)
    print(
        f"\nvocabulary {shape.vocab}, prefix {shape.prefix}, branch {branch}, {rows_per_step} rows a step", flush=True
    )
    entries = list(bench.entries(shape, rows_per_step))
    show_equal(entries, rows_of_two_users(shape), bench.machine)
    for _ in range(bench.args.rounds):
        for entry in entries:
            entry.seconds.append(entry.peer.step())
    print_table(bench, shape, rows_per_step, entries)


def rows_of_two_users(shape: RowShape) -> list[TokenRow]:
    rows, n = made_up_rows(shape), min(8, shape.n_rows)
    return rows[:n] + rows[shape.n_rows : shape.n_rows + n]


def show_equal(entries: Sequence[Entry], rows: Sequence[TokenRow], machine: Machine) -> None:
    """Stop if losses or gradients differ from plain's; notes each way's memory, as each has to run anyway."""
    found: list[tuple[float, Gradients]] = []
    for entry in entries:
        entry.peak_bytes = machine.peak_bytes(lambda: found.append(entry.peer.gradients(rows)))  # noqa: B023
    (plain_loss, plain), *_ = found
    print(f"  one step of {len(rows)} rows: loss {plain_loss:.6f}; difference of loss and of gradients to plain:")
    worst = 0.0
    for entry, (loss, gradients) in zip(entries, found, strict=True):
        of_loss, of_gradients = abs(loss / plain_loss - 1), relative_difference(gradients, plain)
        print(f"    {entry.name:<18} {of_loss:.1e} {of_gradients:.1e}", flush=True)
        worst = max(worst, of_loss, of_gradients)
    if not worst <= MOST_DIFFERENCE[machine.dtype]:
        raise SystemExit(f"they differ by more than {MOST_DIFFERENCE[machine.dtype]:g}")


def relative_difference(gradients: Gradients, plain: Gradients) -> float:
    assert gradients.keys() == plain.keys()
    one, other = (torch.cat([each[name].flatten().double() for name in plain]) for each in (gradients, plain))
    return float((one - other).norm() / other.norm())


def print_table(bench: Bench, shape: RowShape, rows_per_step: int, entries: Sequence[Entry]) -> None:
    rate = {entry.name: rows_per_step / statistics.median(entry.seconds) for entry in entries}
    peers = [name for name in ("plain", "stock default", "stock best", "PEFT") if name in rate]
    floor = f"{'floor':>9}" if bench.args.tflops else ""
    print(
        f"  {'':18} {'':38} {'rows/s':>8} {'MB':>7} "
        + "".join(f"{'/ ' + name:>16}" for name in peers)
        + "  tokens  share"
        + floor
    )
    for entry in entries:
        ratios = "".join(f"{rate[entry.name] / rate[name]:>16.2f}" for name in peers)
        print(
            f"  {entry.name:<18} {entry.settings:<38} {rate[entry.name]:8.3g} {entry.peak_bytes / 1e6:7.0f} {ratios}",
            end="",
        )
        if entry.n_together > 1:
            tokens = shape.token_ratio(entry.n_together)
            print(f"  {tokens:6.2f} {rate[entry.name] / rate['plain'] / tokens:6.0%}", end="")
            if bench.args.tflops:
                flops = bench.size.flops_of_a_row(shape.prefix, shape.branch, entry.n_together)
                print(f" {bench.args.tflops * 1e12 / flops:8.3g}", end="")
        print(flush=True)


if __name__ == "__main__":
    main()
