"""The ways to train that are compared, each at the fastest of the batch sizes that are tried."""

import argparse
import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch._dynamo
from omegaconf import OmegaConf
from peer_model import Machine, ModelSize, Peer, Weights
from peer_ours import Ours, Trainee, build_trainee
from peer_peft import Peft, PeftBase
from peer_stock import STOCK_DEFAULTS, Stock, StockSettings, write_base
from rows import RowShape, made_up_rows

SHIPPED = OmegaConf.load(Path(__file__).parents[1] / "configs" / "phi3_persona.yaml")


@dataclass
class Entry:
    """A way to train, with what was measured of it."""

    name: str
    settings: str
    peer: Peer
    n_together: int = 1
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None


Candidates = Mapping[str, Callable[[int], Peer]]  # by settings; the argument is the rows of a step


class Ways:
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
        if args.compile:  # all layers of all ways are compiled from the same few functions
            torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1000

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
                yield self.tuned(f"ours, N={n}", self.ours(shape, n), rows_per_step, n)

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
        eager = self.fastest_of("stock, not compiled", self.stock(shape, tried), self.rows_of_trial(1))
        return [*tried, *(replace(one, compile=True) for one in tried if str(one) == eager)]

    def peft_batches(self, shape: RowShape, base: PeftBase) -> Candidates:
        build = partial(Peft, base, self.machine, made_up_rows(shape))
        return {f"batch {size}": partial(build, batch_size=size) for size in self.args.pass_sizes}

    def tuned(self, name: str, candidates: Candidates, rows_per_step: int, n_together: int = 1) -> Entry:
        fastest = self.fastest_of(name, candidates, self.rows_of_trial(n_together))
        return Entry(name, fastest, candidates[fastest](rows_per_step), n_together)

    def rows_of_trial(self, n_together: int) -> int:
        return max(n_together, *self.args.pass_sizes, *self.args.pack_rows)

    def fastest_of(self, name: str, candidates: Candidates, n_rows: int) -> str:
        """The fastest in one step of ``n_rows``; what was fastest once is taken for other rows, too."""
        if name not in self.fastest:
            seconds = {settings: self.try_out(settings, build, n_rows) for settings, build in candidates.items()}
            self.fastest[name] = min(seconds, key=seconds.__getitem__)
            tried = ", ".join(f"{settings} {n_rows / value:.3g}" for settings, value in seconds.items())
            print(f"  {name}, rows/s tried: {tried}", flush=True)
        return self.fastest[name]

    def try_out(self, settings: str, build: Callable[[int], Peer], n_rows: int) -> float:
        """Seconds of the fastest of some steps, where the first have to warm up; infinite if it fails."""
        n_steps = 4 if "compile" in settings else 2 if self.machine.device.type == "cuda" else 1
        try:
            peer = build(n_rows)
            return min(peer.step() for _ in range(n_steps))
        except RuntimeError as error:  # such as too little memory
            print(f"  {settings} failed: {str(error).splitlines()[0]}")
            return float("inf")
        finally:
            gc.collect()
