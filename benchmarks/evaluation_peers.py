r"""Evaluation beside a forward per row, transformers' generate and torchtune's generate, on the same prompts.

    OMP_NUM_THREADS=1 python benchmarks/evaluation_peers.py
    OMP_NUM_THREADS=1 python benchmarks/evaluation_peers.py --branch 150 200 --rows 4 8 16 32
    OMP_NUM_THREADS=1 python benchmarks/evaluation_peers.py --flops     # what each way computes, instead of its time
    python benchmarks/evaluation_peers.py --model phi3_mini --device cuda --dtype bfloat16 --branch 150 200 \
        --rows 4 8 16 32 --prompts 64 --batch-sizes 2 4 8 16 32 --max-tokens 4096 8192 16384 32768 --rounds 5

A Phi-3 of random weights with a LoRA adapter on q and k. Each user has N prompts that begin with the same 600
tokens, about, and go on with 150 or 200 of their own; lengths differ by up to a tenth. Five rating labels of a token
and the end of turn each; up to 4 new tokens where text is generated, at temperature 0.3 and top_k 50.
    expected                 label_probabilities: a user's prompts share their prefix
    generate                 generate_answers: theirs do too
    row, expected            the same probabilities, each prompt run whole, once for all labels
    row, first token         less than that: logits after the prompt only, which can't tell "4" from "4.5"
    transformers generate    Phi3ForCausalLM, adapter merged, sdpa, left padding, KV cache
    torchtune generate       phi3, adapter merged, left padding, KV cache as long as the batch needs, as in its generate
                             recipe (its eval recipe takes the model's longest); it makes logits for all of the prompt
Prompts are sorted by length before they are batched, output layers run at the answers only where a peer lets them.
Each way runs at the setting (batch size, or tokens of a pass) that suits it best, then all take turns. Before that, in
fp32: probabilities equal those of rows run whole and those of torchtune's model label by label, logits equal those
of transformers, greedy answers are the same tokens. Otherwise the exit status is 1.
In bf16 it is shown once more, with wider limits and without the tokens.

tokens: of whole rows by those of prefixes and branches, what sharing saves at most. Time on a CPU is CPU time.
MB: most memory that is taken beyond the weights, on a GPU.
"""

import argparse
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial

import numpy as np
import torch
import torchtune
import transformers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchtune.data import left_pad_sequence
from torchtune.generation import generate as torchtune_generate
from torchtune.models.phi3 import lora_phi3, phi3
from torchtune.models.phi3._convert_weights import phi3_tune_to_hf
from torchtune.modules.common_utils import local_kv_cache
from torchtune.modules.peft import get_merged_lora_ckpt
from transformers import AutoModelForCausalLM

from personas_tune.datasets import TokenRow
from personas_tune.evaluation.readouts import Probabilities, generate_answers, label_probabilities
from personas_tune.training.batches import AnswerBatch, padded, plan_tree_round
from personas_tune.training.forward import answer_logits, device_of, fp32_head
from personas_tune.training.shared_prefix import PrefixReader

PAD, END = 0, 2
ANSWERS = [[10 + label, END] for label in range(5)]
NEW_TOKENS, TEMPERATURE, TOP_K = 4, 0.3, 50
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.15}  # of differences between probabilities
SIZES = {
    "tiny": {"num_layers": 2, "num_heads": 4, "embed_dim": 64, "intermediate_dim": 128, "lora_rank": 8},
    "small": {"num_layers": 6, "num_heads": 8, "embed_dim": 512, "intermediate_dim": 1344, "lora_rank": 32},
    "phi3_mini": {"num_layers": 32, "num_heads": 32, "embed_dim": 3072, "intermediate_dim": 8192, "lora_rank": 256},
}


@dataclass(frozen=True)
class Models:
    """The same weights three times; the peers' adapters are merged."""

    ours: nn.Module
    torchtune: nn.Module
    transformers: nn.Module

    def cast(self, dtype: torch.dtype) -> None:
        """Weights only: both libraries keep their rotary tables in fp32."""
        for model in vars(self).values():
            for weight in model.parameters():
                weight.data = weight.data.to(dtype)


@dataclass(frozen=True)
class Case:
    vocab: int
    prefix: int
    branch: int
    rows: int
    n_prompts: int

    @property
    def n_users(self) -> int:
        return max(1, self.n_prompts // self.rows)


@dataclass(frozen=True)
class Way:
    """A way to read answers; takes a batch size, or tokens of a pass."""

    run: Callable[[int], object]
    settings: Sequence[int]


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    print(
        f"{date.today()}, {hardware(args.device)}, {args.threads} threads, load {os.getloadavg()[0]:.1f}\n"
        f"torch {torch.__version__}, torchtune {torchtune.__version__}, transformers {transformers.__version__},"
        f" {args.model}, {args.dtype}",
        flush=True,
    )
    for vocab in args.vocab:
        models = build_models(args.model, vocab, args.device)
        cases = [Case(vocab, args.prefix, branch, rows, args.prompts) for branch in args.branch for rows in args.rows]
        for case in cases:
            show_equal(models, prompts_of(case), args.batch_sizes[-1], args.max_tokens[-1])
        if dtype != torch.float32:
            models.cast(dtype)
            show_equal(models, prompts_of(cases[0]), args.batch_sizes[-1], args.max_tokens[-1])
        for case in cases:
            if args.flops:
                count(models, case, args)
            else:
                compare(models, case, args)
        del models


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SIZES), default="small")
    parser.add_argument("--vocab", type=int, nargs="+", default=[4096, 32064])
    parser.add_argument("--prefix", type=int, default=600)
    parser.add_argument("--branch", type=int, nargs="+", default=[150])
    parser.add_argument("--rows", type=int, nargs="+", default=[16], help="prompts of a user, N")
    parser.add_argument("--prompts", type=int, default=32, help="of all users")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4], help="tried for each peer")
    parser.add_argument("--max-tokens", type=int, nargs="+", default=[1500, 3000, 8192], help="tried for ours")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--flops", action="store_true", help="count operations instead of seconds")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model and few tokens: seconds, figures mean nothing"
    )
    args = parser.parse_args(arguments)
    if args.quick:
        args.model, args.vocab, args.prefix, args.branch, args.rows = "tiny", [300], 60, [20], [4]
        args.prompts, args.batch_sizes, args.max_tokens, args.rounds = 8, [2], [200], 1
    return args


def hardware(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} cores, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


# Models


def build_models(name: str, vocab: int, device: str) -> Models:
    sizes = dict(SIZES[name])
    rank = sizes.pop("lora_rank")
    shape = {**sizes, "num_kv_heads": sizes["num_heads"], "vocab_size": vocab, "max_seq_len": 4096}
    torch.manual_seed(0)
    with torch.device(device), torch.no_grad():
        ours = lora_phi3(["q_proj", "k_proj"], **shape, lora_rank=rank, lora_alpha=32)
        draw_weights(ours)
        merged = {key: weight.clone() for key, weight in ours.state_dict().items()}  # merging is done in place
        merged = get_merged_lora_ckpt(merged, rank, 32)
        stock = phi3(**shape)
        stock.load_state_dict(merged)
        peer = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            transformers_config(shape), attn_implementation="sdpa"
        )
        peer.load_state_dict(phi3_tune_to_hf(merged))
    return Models(*(model.eval().requires_grad_(False) for model in (ours, stock, peer)))


def draw_weights(model: nn.Module) -> None:
    """Weights that make answers depend on the prompt, as a flat distribution would hide what goes wrong."""
    for name, weight in model.named_parameters():
        if name.startswith("tok_embeddings"):
            weight.normal_()
        elif name.startswith("output"):
            weight.normal_(std=3 / weight.shape[1] ** 0.5)  # logits of standard deviation 3
        elif "lora_b" in name:
            weight.normal_(std=0.1)
        elif weight.dim() == 2:
            weight.normal_(std=1 / weight.shape[1] ** 0.5)


def transformers_config(shape: dict[str, int]) -> transformers.Phi3Config:
    return transformers.Phi3Config(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["embed_dim"],
        intermediate_size=shape["intermediate_dim"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_heads"],
        num_key_value_heads=shape["num_kv_heads"],
        max_position_embeddings=shape["max_seq_len"],
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=END,
    )


# Prompts


def prompts_of(case: Case) -> list[list[int]]:
    """Prompts of all users; a user's begin with the same tokens."""
    draw = random.Random(0)

    def tokens(mean: int) -> list[int]:
        return draw.choices(range(20, case.vocab), k=round(mean * draw.uniform(0.9, 1.1)))

    users = [tokens(case.prefix) for _ in range(case.n_users)]
    return [[*user, 3 + row, *tokens(case.branch)] for user in users for row in range(case.rows)]


def token_ratio(case: Case) -> float:
    """Tokens of whole rows by tokens of prefixes and branches; the labels' and padding left out."""
    prompts = prompts_of(case)
    saved = sum(
        (len(user) - 1) * next(i for i, pair in enumerate(zip(*user[:2], strict=False)) if pair[0] != pair[1])
        for user in (prompts[i : i + case.rows] for i in range(0, len(prompts), case.rows))
        if len(user) > 1
    )
    total = sum(map(len, prompts))
    return total / (total - saved)


def by_length(prompts: Sequence[list[int]], batch_size: int) -> Iterator[list[int]]:
    """Batches of prompts' indices; little is padded, as lengths are alike."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    return (order[start : start + batch_size] for start in range(0, len(order), batch_size))


# Ways to read answers


def ways(models: Models, prompts: list[list[int]], args: argparse.Namespace) -> dict[str, Way]:
    return {
        "expected": Way(partial(expected, models.ours, prompts), args.max_tokens),
        "generate": Way(partial(generated, models.ours, prompts, TEMPERATURE), args.max_tokens),
        "row, expected": Way(partial(expected_by_row, models.ours, prompts), args.batch_sizes),
        "row, first token": Way(partial(first_logits, models.ours, prompts), args.batch_sizes),
        "transformers generate": Way(
            partial(generated_by_transformers, models.transformers, prompts, TEMPERATURE), args.batch_sizes
        ),
        "torchtune generate": Way(
            partial(generated_by_torchtune, models.torchtune, prompts, TEMPERATURE), args.batch_sizes
        ),
    }


def expected(model: nn.Module, prompts: list[list[int]], max_tokens: int) -> Probabilities:
    return label_probabilities(model, prompts, ANSWERS, pad_id=PAD, max_tokens=max_tokens)


def generated(model: nn.Module, prompts: list[list[int]], temperature: float, max_tokens: int) -> list[list[int]]:
    return generate_answers(
        model,
        prompts,
        [str(index) for index in range(len(prompts))],
        pad_id=PAD,
        stop_tokens=[END],
        max_new_tokens=NEW_TOKENS,
        temperature=temperature,
        top_k=TOP_K,
        max_tokens=max_tokens,
        seed=0,
    )


@torch.no_grad()
def expected_by_row(model: nn.Module, prompts: list[list[int]], batch_size: int) -> Probabilities:
    """Whole prompts are run as one batch, then all labels after each of them."""
    p = np.empty((len(prompts), len(ANSWERS)))
    with PrefixReader(model) as reader, fp32_head(model):
        for chosen in by_length(prompts, batch_size):
            rows = [[[TokenRow(prompts[i] + answer, len(prompts[i])) for answer in ANSWERS]] for i in chosen]
            part = plan_tree_round(rows, len(chosen), PAD)
            reader.read(part.prefixes)
            (batch,) = part.batches
            log_p = reader.logits(batch).log_softmax(-1)
            of_tokens = log_p.gather(1, batch.targets.unsqueeze(1).to(log_p.device)).cpu().double()
            p[chosen] = of_tokens.view(len(chosen), len(ANSWERS), -1).sum(-1).softmax(-1).numpy()
    return p


@torch.no_grad()
def first_logits(model: nn.Module, prompts: list[list[int]], batch_size: int) -> Tensor:
    """Logits after each prompt, shape ``(len(prompts), V)``."""
    logits: dict[int, Tensor] = {}
    with fp32_head(model):
        for chosen in by_length(prompts, batch_size):
            tokens = padded([prompts[i] for i in chosen], PAD)
            last = torch.tensor([len(prompts[i]) - 1 for i in chosen])
            batch = AnswerBatch(
                tokens, torch.arange(len(chosen)), last, torch.arange(len(chosen)), last
            )  # no targets are needed
            logits.update(zip(chosen, answer_logits(model, batch).cpu(), strict=True))
    return torch.stack([logits[index] for index in range(len(prompts))])


def generated_by_transformers(
    model: nn.Module, prompts: list[list[int]], temperature: float, batch_size: int
) -> list[list[int]]:
    sampling = {"do_sample": True, "temperature": temperature, "top_k": TOP_K} if temperature else {"do_sample": False}
    answers: dict[int, list[int]] = {}
    for chosen in by_length(prompts, batch_size):
        tokens = left_padded(model, prompts, chosen)
        out = model.generate(  # type: ignore[operator]
            tokens, attention_mask=(tokens != PAD).long(), max_new_tokens=NEW_TOKENS, **sampling
        )
        answers.update(zip(chosen, cut(out, tokens), strict=True))
    return [answers[index] for index in range(len(prompts))]


def generated_by_torchtune(
    model: nn.Module, prompts: list[list[int]], temperature: float, batch_size: int
) -> list[list[int]]:
    answers: dict[int, list[int]] = {}
    for chosen in by_length(prompts, batch_size):
        tokens = left_padded(model, prompts, chosen)
        weight = next(model.parameters())
        with local_kv_cache(
            model,
            batch_size=len(chosen),
            device=weight.device,
            dtype=weight.dtype,
            decoder_max_seq_len=tokens.shape[1] + NEW_TOKENS,
        ):
            out, _ = torchtune_generate(
                model,
                tokens,
                max_generated_tokens=NEW_TOKENS,
                pad_id=PAD,
                temperature=temperature or 1.0,
                top_k=TOP_K if temperature else 1,
                stop_tokens=[END],
            )
        answers.update(zip(chosen, cut(out, tokens), strict=True))
    return [answers[index] for index in range(len(prompts))]


def left_padded(model: nn.Module, prompts: Sequence[list[int]], chosen: Sequence[int]) -> Tensor:
    rows = [torch.tensor(prompts[index]) for index in chosen]
    tokens: Tensor = left_pad_sequence(rows, batch_first=True, padding_value=PAD)
    return tokens.to(device_of(model))


def cut(out: Tensor, prompts: Tensor) -> list[list[int]]:
    """New tokens of each row up to where it ends."""
    answers: list[list[int]] = out[:, prompts.shape[1] :].tolist()
    return [answer[: answer.index(END)] if END in answer else answer for answer in answers]


# Equality


def show_equal(models: Models, prompts: list[list[int]], batch_size: int, max_tokens: int) -> None:
    """Print how far the ways' answers differ; stop if it is too far. In bf16 near ties are decided either way."""
    p = expected(models.ours, prompts, max_tokens)
    by_row = abs(p - expected_by_row(models.ours, prompts, batch_size)).max()
    some = [0, len(prompts) - 1]
    by_label = abs(p[some] - expected_label_by_label(models.torchtune, [prompts[i] for i in some])).max()
    mine = first_logits(models.ours, [prompts[i] for i in some], 1)
    logits = max(
        (mine[n] - last_logits(models.transformers, prompts[i])).abs().max().item() for n, i in enumerate(some)
    )
    answers = generated(models.ours, prompts, 0, max_tokens)
    same = {
        "transformers": generated_by_transformers(models.transformers, prompts, 0, batch_size),
        "torchtune": generated_by_torchtune(models.torchtune, prompts, 0, batch_size),
    }
    n_same = {peer: sum(a == b for a, b in zip(answers, theirs, strict=True)) for peer, theirs in same.items()}
    print(
        f"  probabilities (standard deviation over prompts {p.std(axis=0).mean():.2f}) differ by {by_row:.0e} from rows"
        f" run whole, by {by_label:.0e} from torchtune's model label by label; logits (standard deviation"
        f" {mine.std():.1f}) by {logits:.0e} from transformers;\n  the same greedy answers: "
        + ", ".join(f"{n} of {len(prompts)} of {peer}" for peer, n in n_same.items()),
        flush=True,
    )
    dtype = next(models.ours.parameters()).dtype
    limit = LIMITS[dtype]
    if not max(by_row, by_label) <= limit or not logits <= 10 * limit:
        raise SystemExit(f"probabilities differ by more than {limit}, or logits by more than {10 * limit}")
    if dtype == torch.float32 and min(n_same.values()) < len(prompts):
        raise SystemExit("greedy answers are not the same tokens")


@torch.no_grad()
def expected_label_by_label(model: nn.Module, prompts: list[list[int]]) -> Probabilities:
    """Each label's answer written out after its prompt, by the model's own forward alone."""
    log_p = np.empty((len(prompts), len(ANSWERS)))
    for row, prompt in enumerate(prompts):
        for label, answer in enumerate(ANSWERS):
            tokens = torch.tensor([prompt + answer], device=device_of(model))
            of_tokens = model(tokens)[0, len(prompt) - 1 : -1].log_softmax(-1)
            log_p[row, label] = of_tokens.gather(1, tokens[0, len(prompt) :, None]).sum().item()
    return torch.from_numpy(log_p).softmax(-1).numpy()


@torch.no_grad()
def last_logits(model: nn.Module, prompt: list[int]) -> Tensor:
    out = model(torch.tensor([prompt], device=device_of(model)), logits_to_keep=1)
    return torch.as_tensor(out.logits[0, -1].float().cpu())


# Time


def compare(models: Models, case: Case, args: argparse.Namespace) -> None:
    prompts = prompts_of(case)
    each = ways(models, prompts, args)
    best = {name: best_setting(way, args.device) for name, way in each.items()}
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in each}
    for _ in range(args.rounds):
        for name, way in each.items():
            runs[name].append(measured(partial(way.run, best[name]), args.device))
    rates = {name: len(prompts) / statistics.median(seconds for seconds, _ in run) for name, run in runs.items()}
    print(
        f"vocabulary {case.vocab}, prefix {case.prefix}, branch {case.branch}, N {case.rows}, {case.n_users} users,"
        f" tokens {token_ratio(case):.2f}, load {os.getloadavg()[0]:.1f}\n"
        "                          rows/s  (at)   expected is   generate is       MB"
    )
    for name, rate in rates.items():
        times = "".join(f"{rates[ours] / rate:12.2f} x" for ours in ("expected", "generate"))
        print(f"{name:<22}{rate:10.2f} {f'({best[name]})':>6}{times}{max(mb for _, mb in runs[name]):9.0f}", flush=True)


def count(models: Models, case: Case, args: argparse.Namespace) -> None:
    """What each way computes, at its first setting: no time can be better than in proportion to that."""
    prompts = prompts_of(case)
    each = ways(models, prompts, args)
    flops = {name: operations(partial(way.run, way.settings[0])) / len(prompts) for name, way in each.items()}
    print(
        f"vocabulary {case.vocab}, prefix {case.prefix}, branch {case.branch}, N {case.rows}, {case.n_users} users,"
        f" tokens {token_ratio(case):.2f}\n                       GFLOP a row   expected is   generate is"
    )
    for name, of_row in flops.items():
        times = "".join(f"{of_row / flops[ours]:12.2f} x" for ours in ("expected", "generate"))
        print(f"{name:<22}{of_row / 1e9:12.2f}{times}", flush=True)


def operations(run: Callable[[], object]) -> int:
    """Of matrix products; on a CPU attention kernels aren't counted."""
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def best_setting(way: Way, device: str) -> int:
    """The fastest of a way's settings; one that doesn't fit into memory counts as slow."""

    def seconds(setting: int) -> float:
        try:  # on a GPU the first run of a shape makes ready
            return min(measured(partial(way.run, setting), device)[0] for _ in range(1 if device == "cpu" else 2))
        except torch.OutOfMemoryError:
            return float("inf")

    return min(way.settings, key=seconds)


def measured(run: Callable[[], object], device: str) -> tuple[float, float]:
    """Seconds and, on a GPU, the most MB that are taken beyond those before."""
    if device == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start, 0.0
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, start = torch.cuda.memory_allocated(), time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start, (torch.cuda.max_memory_allocated() - before) / 1e6


if __name__ == "__main__":
    main()
