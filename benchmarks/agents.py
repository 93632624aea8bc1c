"""How much quicker an agent rates when what prompts share is read once, against each rating alone.

    OMP_NUM_THREADS=1 python benchmarks/agents.py
    OMP_NUM_THREADS=1 python benchmarks/agents.py --quick   # fewer of everything: shows that it runs

Makes a small experiment on the synthetic world with the tiny bundled base (a temporary folder), and rates

- 64 items for one user, and 16 items for each of 16 users, in one call of ``rate_many``;
- the same pairs one call each, where the labels of a pair share its prompt and nothing else is shared;
- an eighth of these pairs one pass each as a stock forward does it: a batch of prompt + answer for every label.

Prompts are written anew in each way. The ways take turns, three rounds; printed are medians. Time is that of
the processor, since machines are shared. Where the ways' distributions differ by more than 1e-5, it stops.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path

import numpy as np
import torch
from torchtune.modules.peft import disable_adapter

from personas_tune.adapters.base_model import BaseModel, load_base
from personas_tune.adapters.selection import load_adapter_set
from personas_tune.agents import Agent, load_agent
from personas_tune.agents.settings import find_agent
from personas_tune.datasets import RatingDataset
from personas_tune.evaluation.readouts import Probabilities
from personas_tune.training.batches import padded

SMALL = (
    "data.world.n_users=400", "data.cohort.n_users=16", "personas.k_max=4", "batch_size=8", "epochs=1",
    "max_steps_per_epoch=3", "stages=[persona_prepare,persona_distill,persona_cluster,persona_raft,persona_lora]",
)  # fmt: skip
SHAPES = {"1 user x 64 items": (1, 64), "16 users x 16 items": (16, 16)}
N_ROUNDS = 3
QUICK_SHAPES = {"1 user x 8 items": (1, 8)}
BOUND = 1e-5
Pairs = list[tuple[str, list[str]]]
Answers = dict[tuple[str, str], Probabilities]  # by user and item


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--quick", action="store_true", help="8 pairs, one round")
    quick = words.parse_args().quick
    shapes, n_rounds = (QUICK_SHAPES, 1) if quick else (SHAPES, N_ROUNDS)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        command = ["tune", "run", "persona_pipeline", "--config", "quickstart.yaml", f"output_dir={folder}", *SMALL]
        done = subprocess.run([Path(sys.executable).with_name("tune"), *command[1:]], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        with redirect_stdout(StringIO()):  # torchtune's remarks
            agent, plain = load_agent(folder, "persona"), plain_agent(folder)
        print(f"torch {torch.__version__}, one thread; ratings per second of CPU time (medians of {n_rounds} rounds)")
        for shape, (n_users, n_items) in shapes.items():
            pairs = [(user, agent.items[:n_items]) for user in agent.users[:n_users]]
            report(shape, agent, plain, pairs, n_rounds)


def report(shape: str, agent: Agent, plain: Agent, pairs: Pairs, n_rounds: int) -> None:
    ways: dict[str, tuple[Callable[[Pairs], Answers], Pairs]] = {
        "together": (partial(together, agent), pairs),
        "each alone": (partial(alone, agent), pairs),
        "stock forward": (partial(alone, plain), [(user, items[: len(items) // 8]) for user, items in pairs]),
    }
    per_second: dict[str, list[float]] = {way: [] for way in ways}
    answers: dict[str, Answers] = {}
    for _ in range(n_rounds):
        for way, (rate, asked) in ways.items():
            start = time.process_time()
            answers[way] = rate(asked)
            per_second[way].append(len(answers[way]) / (time.process_time() - start))
    apart = max(np.abs(p - answers["together"][pair]).max() for told in answers.values() for pair, p in told.items())
    require_equal(shape, apart)
    medians = {way: statistics.median(each) for way, each in per_second.items()}
    rates = ", ".join(f"{way} {each:.1f}" for way, each in medians.items())
    ratios = ", ".join(f"{medians['together'] / each:.1f} x {way}" for way, each in list(medians.items())[1:])
    print(f"{shape}: {rates}; together is {ratios}; distributions differ by {apart:.1e} at most", flush=True)


def together(agent: Agent, pairs: Pairs) -> Answers:
    told = agent.rate_many(pairs)
    return {(each.user_id, item): p for each in told for item, p in zip(each.items, each.p, strict=True)}


def require_equal(shape: str, apart: float) -> None:
    if not apart <= BOUND:  # nan isn't
        raise SystemExit(f"{shape}: distributions differ by {apart:.1e}, more than {BOUND:g}")


def alone(agent: Agent, pairs: Pairs) -> Answers:
    return {(user, item): agent.rate(user, [item]).p[0] for user, items in pairs for item in items}


def plain_agent(folder: Path) -> Agent:
    """The same agent, whose answers a stock forward computes."""
    settings = find_agent(folder, "persona")
    base = load_base(**settings.base_sections, device="cpu", dtype="fp32")
    assignment = load_adapter_set(base.bank, settings.workspace.adapter_set("persona"), "persona")

    def score(dataset: RatingDataset, users: Mapping[str, str] | None, labels: Sequence[str]) -> Probabilities:
        answers = [base.tokenizer.answer_tokens(label) for label in labels]
        return np.stack(
            [
                stock_distribution(base, None if users is None else users[sample.user_id], row.prompt, answers)
                for sample, row in zip(dataset.samples, dataset.rows, strict=True)
            ]
        )

    return Agent(settings, base.tokenizer, assignment, score)


@torch.no_grad()
def stock_distribution(
    base: BaseModel, adapter: str | None, prompt: list[int], answers: list[list[int]]
) -> Probabilities:
    base.model.eval()
    tokens = padded([prompt + answer for answer in answers], base.tokenizer.pad_id)
    with disable_adapter(base.model) if adapter is None else base.bank.use(adapter):
        logits = base.model(tokens).float().log_softmax(-1)
    first = len(prompt) - 1
    sums = [
        sum(logits[row, first + place, token].item() for place, token in enumerate(answer))
        for row, answer in enumerate(answers)
    ]
    return np.asarray(torch.tensor(sums, dtype=torch.float64).softmax(-1).numpy())


if __name__ == "__main__":
    main()
