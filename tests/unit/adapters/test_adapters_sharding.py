"""A base over two gloo processes: what it computes, what each process holds, and that none waits in vain."""

import multiprocessing
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from tiny import TINY, base_sections
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor
from torchtune.config import instantiate
from torchtune.models.phi3._position_embeddings import Phi3RotaryPositionalEmbeddings
from torchtune.modules.peft import get_adapter_params

from personas_tune.adapters.base_model import BaseModel, load_base
from personas_tune.adapters.sharding import in_lockstep, is_sharded
from personas_tune.datasets import TokenRow
from personas_tune.errors import CheckpointError, ConfigError, PersonasTuneError
from personas_tune.evaluation.readouts import generate_answers, label_probabilities
from personas_tune.training.self_check import check_sharing
from personas_tune.training.shared_prefix import backward_rows

WIDE = {**TINY, "embed_dim": 256, "num_heads": 2, "num_kv_heads": 2, "intermediate_dim": 256}  # NF4 needs blocks
Rows = tuple[list[TokenRow], list[str]]


def in_two_processes(work: Callable[[int], Any], folder: Path) -> list[Any]:
    """What the work returned in each of two processes."""
    context = multiprocessing.get_context("fork")
    files = [folder / f"result{rank}.pt" for rank in (0, 1)]
    arguments = [(work, rank, str(folder / "store"), file) for rank, file in enumerate(files)]
    processes = [context.Process(target=run_as, args=each, daemon=True) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0, "a process failed, or waits in vain"
    return [torch.load(file, weights_only=False) for file in files]


def run_as(work: Callable[[int], Any], rank: int, store: str, file: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    torch.save(work(rank), file)
    dist.barrier()
    dist.destroy_process_group()


def load(checkpoint: Path, sharded: bool, model: dict[str, Any] | None = None, **more: Any) -> BaseModel:
    sections = base_sections(checkpoint, **(model or {}))
    return load_base(**sections, **{"device": "cpu", "dtype": "fp32", "sharded": sharded, **more})


def with_adapter(base: BaseModel) -> BaseModel:
    """An adapter that changes something, the same in each process."""
    adapter = base.bank.add_new("a", seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in adapter.masters.items():
            if "lora_b" in name:
                weight.normal_(std=0.1, generator=generator)
    return base


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, TINY["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def logits_of(base: BaseModel, rank: int) -> Tensor:
    with torch.no_grad(), base.bank.use("a"):
        return base.model.eval()(tokens(1 + rank, 9 + rank, seed=rank))


# What it computes


def save_random(folder: Path, tiny: Path, **model: Any) -> dict[str, dict[str, Any]]:
    """Write random weights in torchtune's own format; gives the sections that load them."""
    sections = base_sections(tiny, **model)
    torch.manual_seed(0)
    network = instantiate(OmegaConf.create({**sections["model"], "quantize_base": False}))
    adapters = get_adapter_params(network)
    torch.save({name: value for name, value in network.state_dict().items() if name not in adapters}, folder / "w.pt")
    sections["checkpointer"] = {
        "_component_": "torchtune.training.FullModelTorchTuneCheckpointer",
        "checkpoint_dir": str(folder), "checkpoint_files": ["w.pt"], "model_type": "PHI3_MINI",
        "output_dir": str(folder),
    }  # fmt: skip
    return sections


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_logits_are_those_of_one_process(tiny_checkpoint, tmp_path, dtype) -> None:
    models = [{}, {"use_dora": True}, {"use_dora": True, "apply_lora_to_output": True}]

    def work(rank: int) -> list[Tensor]:
        return [logits_of(with_adapter(load(tiny_checkpoint, True, model, dtype=dtype)), rank) for model in models]

    found = in_two_processes(work, tmp_path)
    for index, model in enumerate(models):
        whole = with_adapter(load(tiny_checkpoint, False, model, dtype=dtype))
        for rank in (0, 1):
            torch.testing.assert_close(found[rank][index], logits_of(whole, rank), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dora", [False, True])
def test_nf4_is_quantised_as_in_one_process(tiny_checkpoint, tmp_path, dora) -> None:
    sections = save_random(tmp_path, tiny_checkpoint, **WIDE, use_dora=dora, quantize_base=True)

    def work(rank: int) -> tuple[Tensor, int]:
        base = with_adapter(load_base(**sections, device="cpu", dtype="fp32", sharded=True))
        return logits_of(base, rank), n_quantised(base.model)

    whole = with_adapter(load_base(**sections, device="cpu", dtype="fp32"))
    for rank, (found, n_held) in enumerate(in_two_processes(work, tmp_path)):
        torch.testing.assert_close(found, logits_of(whole, rank), atol=1e-6, rtol=0)
        assert n_held == n_quantised(whole.model) / 2 > 0


def n_quantised(model: nn.Module) -> int:
    held = [weight.to_local() if isinstance(weight, DTensor) else weight.data for weight in model.parameters()]
    return sum(part.quantized_data.numel() for part in held if hasattr(part, "quantized_data"))


def test_tied_embeddings_stay_tied(tmp_path, tiny_checkpoint) -> None:
    builder = {"_component_": "torchtune.models.qwen2.lora_qwen2", "tie_word_embeddings": True}
    sections = save_random(tmp_path, tiny_checkpoint, **builder)

    def work(rank: int) -> Tensor:
        return logits_of(with_adapter(load_base(**sections, device="cpu", dtype="fp32", sharded=True)), rank)

    whole = with_adapter(load_base(**sections, device="cpu", dtype="fp32"))
    for rank, found in enumerate(in_two_processes(work, tmp_path)):
        torch.testing.assert_close(found, logits_of(whole, rank), atol=1e-6, rtol=0)


def test_each_process_holds_half_of_the_base_and_all_of_the_adapter(tiny_checkpoint, tmp_path) -> None:
    def work(rank: int) -> tuple[int, int, bool]:
        base = with_adapter(load(tiny_checkpoint, True))
        logits_of(base, rank)  # what was gathered for it is dropped
        parts = [weight for weight in base.model.parameters() if isinstance(weight, DTensor)]
        trainable = [weight for weight in base.model.parameters() if weight.requires_grad]
        assert not any(isinstance(weight, DTensor) for weight in trainable)
        held = sum(part.to_local().untyped_storage().nbytes() for part in parts)  # views of a whole would show
        return held, sum(weight.numel() for weight in trainable), is_sharded(base.model)

    whole = load(tiny_checkpoint, False)
    n_bytes = sum(weight.nbytes for weight in whole.model.parameters() if not weight.requires_grad)
    found = in_two_processes(work, tmp_path)
    assert sum(held for held, _, _ in found) == n_bytes
    assert all(abs(held - n_bytes / 2) < 0.01 * n_bytes for held, _, _ in found)
    assert all(n == whole.bank.n_parameters and sharded for _, n, sharded in found)
    assert not is_sharded(whole.model)


# Gradients


def rows_of_process(rank: int) -> Rows:
    """Two users of three rows, or one of four and a row that shares nothing."""
    users, n_rows = ((0, 1), 3) if rank == 0 else ((2,), 4)
    rows, names = [], []
    for user in users:
        prefix = tokens(9 + user, seed=user).tolist()
        for row in range(n_rows):
            prompt = [*prefix, 5 + row, *tokens(2 + row, seed=row).tolist()]
            rows.append(TokenRow([*prompt, 7, 8], len(prompt)))
            names.append(str(user))
    return (rows, names) if rank == 0 else ([*rows, TokenRow([8, 9, 3, 7], 2)], [*names, "alone"])


def agree(shape: list[int]) -> list[int]:
    shapes: list[list[int]] = [[], []]
    dist.all_gather_object(shapes, shape)
    return [max(sizes) for sizes in zip_longest(*shapes, fillvalue=0)]


def gradients_of(base: BaseModel, parts: list[Rows], sharing: str = "auto", **options: Any) -> dict[str, Tensor]:
    base.model.train()
    with base.bank.use("a") as adapter:
        for rows, names in parts:
            backward_rows(
                base.model, rows, names, nn.CrossEntropyLoss(), pad_id=0, sharing=sharing,
                branches_per_pass=2, on_gradients=lambda: base.bank.take_gradients(1), **options,
            )  # fmt: skip
    return {name: weight.grad for name, weight in adapter.masters.items() if weight.grad is not None}


def summed(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    for gradient in gradients.values():
        dist.all_reduce(gradient)
    return gradients


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_of_different_rows_sum_to_those_of_one_process(tiny_checkpoint, tmp_path, checkpointed, dora) -> None:
    def work(rank: int) -> dict[str, Tensor]:
        base = with_adapter(
            load(tiny_checkpoint, True, {"use_dora": dora}, enable_activation_checkpointing=checkpointed)
        )
        gradients_of(base, [rows_of_process(rank)], agree=agree)
        return summed(gradients_of(base, [rows_of_process(rank)], agree=agree))  # on top of the first ones

    whole = with_adapter(load(tiny_checkpoint, False, {"use_dora": dora}))
    expected = gradients_of(whole, [rows_of_process(0), rows_of_process(1)] * 2, "off")
    for found in in_two_processes(work, tmp_path):
        assert difference(found, expected) < 1e-5


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's own, at a graph break
def test_compiled_layers_are_sharded_too(tiny_checkpoint, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "eager")
    sections = save_random(tmp_path, tiny_checkpoint, num_layers=1)
    rows, names = rows_of_process(0)

    def work(rank: int) -> tuple[dict[str, Tensor], int]:
        one = rank == 0  # both would take twice as long
        base = with_adapter(load_base(**sections, device="cpu", dtype="fp32", sharded=True, compile=one))
        return summed(gradients_of(base, [(rows[:2], names[:2])])), counters["stats"]["unique_graphs"]

    whole = with_adapter(load_base(**sections, device="cpu", dtype="fp32"))
    expected = gradients_of(whole, [(rows[:2], names[:2])] * 2)
    (found, n_graphs), (same, _) = in_two_processes(work, tmp_path)
    assert difference(found, expected) < 1e-5
    assert difference(same, found) == 0
    assert n_graphs > 0


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    a, b = (torch.cat([part[name].flatten().double() for name in expected]) for part in (found, expected))
    assert b.norm() > 0
    return float((a - b).norm() / b.norm())


def test_shared_prefixes_are_checked_on_the_same_rows_in_each_process(tiny_checkpoint, tmp_path) -> None:
    def work(rank: int) -> tuple[int, str | None]:
        base = with_adapter(load(tiny_checkpoint, True))
        with base.bank.use("a"):
            check = check_sharing(
                base.model, *rows_of_process(0), nn.CrossEntropyLoss(), pad_id=0, branches_per_pass=2
            )  # fmt: skip
        return check.n_rows, check.problem

    assert in_two_processes(work, tmp_path) == [(3, None)] * 2


# Uneven work


PROMPTS = [[*tokens(30, seed=user).tolist(), 9 + row] for user in range(4) for row in range(3)]
ANSWERS = [[5, 8], [6, 8], [7, 7, 8]]


def readouts(base: BaseModel, chosen: slice) -> tuple[Any, list[list[int]]]:
    prompts = PROMPTS[chosen]
    names = [f"{index}" for index in range(len(PROMPTS))][chosen]
    with base.bank.use("a"):
        p = label_probabilities(base.model, prompts, ANSWERS, pad_id=0, max_tokens=40)
        texts = generate_answers(
            base.model, prompts, names, pad_id=0, stop_tokens=[8], max_new_tokens=5,
            temperature=1.0, top_k=None, max_tokens=60, seed=0,
        )  # fmt: skip
    return p, texts


@pytest.mark.parametrize(("dtype", "parts"), [("fp32", (slice(0, 10), slice(10, 12))), ("bf16", (None, slice(0, 12)))])
def test_readouts_in_lockstep_are_those_of_one_process(tiny_checkpoint, tmp_path, parts, dtype) -> None:
    def work(rank: int) -> list[Any]:
        base = with_adapter(load(tiny_checkpoint, True, {"lora_dropout": 0.5}, dtype=dtype))
        state = torch.get_rng_state()
        found = []
        for _ in range(2):  # it starts over
            with in_lockstep(base.model):
                found.append(readouts(base, parts[rank]) if parts[rank] else None)
        assert torch.equal(torch.get_rng_state(), state)
        return found

    whole = with_adapter(load(tiny_checkpoint, False, dtype=dtype))
    for part, found in zip(parts, in_two_processes(work, tmp_path), strict=True):
        if part is None:
            continue
        expected_p, expected_texts = readouts(whole, part)
        for p, texts in found:
            assert p == pytest.approx(expected_p, abs=1e-6)
            assert texts == expected_texts


def test_a_model_in_one_process_needs_no_lockstep(load_tiny) -> None:
    base = load_tiny()
    with in_lockstep(base.model):
        base.model(tokens(1, 3))
    assert base.model.training


def test_an_error_ends_the_block_at_once(tiny_checkpoint, tmp_path) -> None:
    def work(rank: int) -> None:
        base = load(tiny_checkpoint, True)
        with pytest.raises(ZeroDivisionError) if rank == 0 else nullcontext(), in_lockstep(base.model):
            base.model(tokens(1, 3))
            assert 1 / rank
        if rank == 0:  # the other one waits; here it is let go, not ended
            with in_lockstep(base.model):
                pass

    in_two_processes(work, tmp_path)


# What is refused


def refusals(attempts: list[Callable[[], object]], folder: Path) -> list[PersonasTuneError]:
    """The errors that both processes raise alike, one an attempt."""

    def work(rank: int) -> list[PersonasTuneError]:
        errors = []
        for attempt in attempts:
            with pytest.raises(PersonasTuneError) as caught:
                attempt()
            errors.append(type(caught.value)(str(caught.value)))
        return errors

    first, second = in_two_processes(work, folder)
    assert [(type(error), str(error)) for error in first] == [(type(error), str(error)) for error in second]
    return first


def test_a_checkpoint_that_is_damaged_or_does_not_fit_is_told_by_all(tiny_checkpoint, tmp_path) -> None:
    damaged, lacking = (Path(shutil.copytree(tiny_checkpoint, tmp_path / name)) for name in ("damaged", "lacking"))
    (damaged / "model.safetensors").write_bytes((damaged / "model.safetensors").read_bytes()[:5000])
    weights = load_file(lacking / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, lacking / "model.safetensors")
    cases = [
        (damaged, {}),
        (lacking, {}),
        (tiny_checkpoint, {"vocab_size": 500}),
        (tiny_checkpoint, {"num_heads": 8, "num_kv_heads": 4}),
    ]
    found = refusals([partial(load, folder, True, model) for folder, model in cases], tmp_path)
    for error, (folder, model) in zip(found, cases, strict=True):
        with pytest.raises(CheckpointError) as expected:
            load(folder, False, model)
        assert (type(error), str(error)) == (CheckpointError, str(expected.value))


def test_nf4_that_can_not_be_cut_evenly_is_refused(tiny_checkpoint, tmp_path) -> None:
    # A scale of scales belongs to 256 blocks of 64 weights: here there is one for each matrix.
    sizes = {**WIDE, "embed_dim": 128, "num_heads": 2, "num_kv_heads": 2, "intermediate_dim": 128}
    sections = save_random(tmp_path, tiny_checkpoint, **sizes, quantize_base=True)
    attempt = partial(load_base, **sections, device="cpu", dtype="fp32", sharded=True)
    (error,) = refusals([attempt], tmp_path)
    assert isinstance(error, ConfigError)
    assert str(error).startswith("parallel: this model can't be cut into 2 parts (")


def test_a_model_whose_buffers_nothing_fills_is_refused(tiny_checkpoint, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Phi3RotaryPositionalEmbeddings, "rope_init", property())  # as if it had none
    monkeypatch.setattr(Phi3RotaryPositionalEmbeddings, "__init__", with_a_buffer)
    (error,) = refusals([partial(load, tiny_checkpoint, True)], tmp_path)
    assert isinstance(error, ConfigError)
    assert str(error).startswith("parallel: this model can't be spread over processes (nothing fills layers.0.attn.")


def with_a_buffer(module: nn.Module, dim: int, **_: Any) -> None:
    nn.Module.__init__(module)
    module.register_buffer("cache", torch.empty(dim), persistent=False)
