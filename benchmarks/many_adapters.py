"""What a row costs, and what memory is taken, with 4 to 64 adapters on one base; what a checkpoint takes.

    OMP_NUM_THREADS=1 python benchmarks/many_adapters.py

Time is CPU time of a row (median of 3 passes over all adapters, forms and numbers of adapters taking turns), its peer
the same rows with 4 adapters one by one. Memory is that of all tensors when the last step is done, in adapters (weights
and AdamW's two moments) beyond the base; what is above their number is random state, 5 kB each.

2026-11-20, 2 cores of an AMD EPYC that other work shared, torch 2.13 (CPU), Python 3.11:
adapters                                             4                16                64
one by one                            19.6 ms (1.00)    18.6 ms (0.95)    19.0 ms (0.97)
interleaved                           18.1 ms (0.92)    19.6 ms (1.00)    19.0 ms (0.97)
interleaved, waiting on the CPU       18.0 ms (0.92)    20.0 ms (1.02)    19.0 ms (0.97)
adapters held beyond the base                   4.05             16.21             64.83
checkpoint, 1,000,000 weights: 0.05 s an adapter that has moved, 0.02 s another
checkpoint, 100,000,000 weights: 18.2 s an adapter that has moved, 0.2 s another
(at a load of 10; about 4 s are CPU time, for 1.2 GB: copy 0.6, write 2.4, sha256 0.8)
On a CPU waiting moves nothing; no GPU was at hand.
"""

import argparse
import gc
import statistics
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torchtune.models.phi3 import lora_phi3

from personas_tune.adapters.bank import AdapterBank
from personas_tune.datasets import TokenRow
from personas_tune.training.checkpoints import Checkpoints, Origin, Part
from personas_tune.training.fit import AdapterJob, TrainingSettings, put_to_wait, train_steps
from personas_tune.training.state import job_state

SIZES = {
    "vocab_size": 2000, "num_layers": 4, "num_heads": 4, "num_kv_heads": 4, "embed_dim": 128, "intermediate_dim": 384,
    "max_seq_len": 512,
}  # fmt: skip
SETTINGS = TrainingSettings(epochs=1, batch_size=8, gradient_accumulation_steps=1)
FORMS = {
    "one by one": SETTINGS,
    "interleaved": replace(SETTINGS, schedule="interleaved"),
    "interleaved, waiting on the CPU": replace(SETTINGS, schedule="interleaved", offload_waiting=True),
}
N_ROWS, LENGTH = 16, 200  # of an adapter; tokens of a row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", nargs="+", type=int, default=[4, 16, 64])
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with torch.device(arguments.device):
        model = lora_phi3(["q_proj", "k_proj"], **SIZES, lora_rank=16, lora_alpha=32, lora_dropout=0.1)
    costs: dict[tuple[str, int], list[float]] = {}
    memory: dict[int, float] = {}
    for _ in range(3):
        for n in arguments.adapters:
            for form, settings in FORMS.items():
                seconds, memory[n] = train(model, n, settings)
                costs.setdefault((form, n), []).append(seconds)
    peer = statistics.median(costs["one by one", arguments.adapters[0]])
    for form in FORMS:
        each = [statistics.median(costs[form, n]) for n in arguments.adapters]
        print(f"{form:<34}" + "".join(f"{1e3 * cost:8.1f} ms ({cost / peer:.2f})" for cost in each))
    print(f"{'adapters held beyond the base':<34}" + "".join(f"{memory[n]:18.2f}" for n in arguments.adapters))
    for n_weights in (1_000_000, 100_000_000):
        written, linked = checkpoint_seconds(n_weights)
        print(f"checkpoint, {n_weights:,} weights: {written:.2f} s an adapter that has moved, {linked:.4f} s another")


def train(model: nn.Module, n: int, settings: TrainingSettings) -> tuple[float, float]:
    """CPU seconds of a row, and memory in adapters."""
    bank = AdapterBank(model)
    jobs = [job_of(bank, f"set/{index}", settings) for index in range(n)]
    before = time.process_time()
    rows = sum(r.n_rows for r in train_steps(model, bank, jobs, nn.CrossEntropyLoss(), settings, pad_id=0))
    seconds = (time.process_time() - before) / rows
    base = {weight.untyped_storage().data_ptr() for weight in (*model.parameters(), *model.buffers())}
    return seconds, bytes_in_tensors(without=base) / (12 * bank.n_parameters)


def job_of(bank: AdapterBank, name: str, settings: TrainingSettings) -> AdapterJob:
    generator = torch.Generator().manual_seed(0)
    rows = [
        TokenRow(torch.randint(4, 2000, (LENGTH,), generator=generator).tolist(), LENGTH - 2) for _ in range(N_ROWS)
    ]
    optimizer = torch.optim.AdamW(bank.add_new(name, seed=0).masters.values(), lr=1e-3)
    job = AdapterJob(name, rows, [""] * N_ROWS, optimizer)
    if settings.offload_waiting:
        put_to_wait(bank, job)
    return job


def bytes_in_tensors(without: set[int]) -> int:
    gc.collect()
    storages = {}
    for each in gc.get_objects():
        if issubclass(type(each), torch.Tensor):
            storages[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
    return sum(size for address, size in storages.items() if address not in without)


class OneMatrix(nn.Module):
    """Stands for a model with an adapter of so many weights."""

    def __init__(self, n_weights: int) -> None:
        super().__init__()
        from torchtune.modules.peft import LoRALinear

        self.lora = LoRALinear(n_weights // 2000, n_weights // 2000, rank=1000, alpha=1.0)


def checkpoint_seconds(n_weights: int) -> tuple[float, float]:
    """Wall seconds of a checkpoint of one adapter that has moved, and of one that hasn't."""
    bank = AdapterBank(OneMatrix(n_weights))
    masters = bank.add_new("set/0", seed=0).masters
    optimizer = torch.optim.AdamW(masters.values(), lr=1e-3)
    for weight in masters.values():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    optimizer.zero_grad()
    job = AdapterJob("set/0", [], [], optimizer)
    seconds = []
    with tempfile.TemporaryDirectory(dir=".") as folder:
        checkpoints = Checkpoints(Path(folder) / "c", Origin("set", {}, {}, "cpu", key=""), 2)
        for step in (1, 2):
            before = time.perf_counter()
            checkpoints.save(step, [Part("adapter_0", partial(job_state, bank, job), version=1)])
            seconds.append(time.perf_counter() - before)
    return seconds[0], seconds[1]


if __name__ == "__main__":
    main()
