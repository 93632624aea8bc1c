"""Two-phase training on shared prefixes: loss and gradients of separate rows, however it is done."""

import multiprocessing
import weakref
from itertools import zip_longest

import pytest
import torch
import torch.distributed as dist
from shared_rows import backward, difference, rows_of_users, small_phi3
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.fsdp import fully_shard
from torchtune import training
from torchtune.modules import TransformerSelfAttentionLayer

from personas_tune.datasets import TokenRow
from personas_tune.training import shared_prefix


@pytest.mark.parametrize("branches_per_pass", [1, 2, 3, 5, 12])
def test_passes_of_any_size_give_the_gradients_of_separate_rows(branches_per_pass: int) -> None:
    model = small_phi3()
    rows, names = rows_of_users()
    alone = [backward(model, [row], ["u"], "off") for row in rows]
    expected = {name: sum(gradients[name] for _, gradients in alone) for name in alone[0][1]}
    loss, found = backward(model, rows, names, branches_per_pass=branches_per_pass)
    assert loss == pytest.approx(sum(loss for loss, _ in alone), rel=1e-6)
    assert difference(found, expected) < 1e-5


def test_each_prefix_is_run_once_and_each_branch_once() -> None:
    model = small_phi3()
    rows, names = rows_of_users(n_users=2, n_rows=4)
    n_run = []
    model.tok_embeddings.register_forward_hook(lambda _, inputs, __: n_run.append(inputs[0].numel()))
    backward(model, rows, names, branches_per_pass=1)
    prefixes = {"0": 9, "1": 10}
    branches = [len(row.tokens) - prefixes[name] for row, name in zip(rows, names, strict=True)]
    assert sorted(n_run) == sorted([*prefixes.values(), *branches])


def test_gradients_are_handed_over_after_each_backward() -> None:
    model = small_phi3()
    rows, names = rows_of_users(n_users=1, n_rows=4)
    _, whole = backward(model, rows, names, branches_per_pass=2)
    parts: list[dict[str, Tensor]] = []

    def take() -> None:
        parts.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
        for weight in model.parameters():
            weight.grad = None

    backward(model, rows, names, branches_per_pass=2, on_gradients=take)
    assert len(parts) == 3  # two passes of branches, one prefix
    summed = {name: sum(part[name] for part in parts if name in part) for name in whole}
    assert difference(summed, whole) < 1e-6


class Saved:
    """What stands for a tensor that autograd keeps."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # or a node's output would keep the node


class Kept:
    """Counts the bytes that autograd keeps for backward passes, and the most that it kept at a time."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def count(self):
        return torch.autograd.graph.saved_tensors_hooks(self._keep, lambda saved: saved.tensor)

    def _keep(self, tensor: Tensor) -> Saved:
        saved = Saved(tensor)
        self._change(tensor.nbytes)
        weakref.finalize(saved, self._change, -tensor.nbytes)
        return saved

    def _change(self, n_bytes: int) -> None:
        self.now += n_bytes
        self.most = max(self.most, self.now)


def test_memory_does_not_grow_with_the_rows_of_a_user() -> None:
    model = small_phi3()

    def most_kept(n_rows: int, **options) -> int:
        kept = Kept()
        prompt = list(range(20))
        rows = [TokenRow([*prompt, row, 3, 4, 3, 7], 23) for row in range(n_rows)]
        with kept.count():
            backward(model, rows, ["u"] * n_rows, **options)
        assert kept.now == 0
        return kept.most

    few, many = most_kept(4, branches_per_pass=2), most_kept(16, branches_per_pass=2)
    assert many == few
    assert most_kept(16, branches_per_pass=8) > many
    assert most_kept(16, branches_per_pass=16, sharing="off") > 2 * most_kept(16, branches_per_pass=16)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_recomputes_each_phase_as_it_was(dropout: float) -> None:
    rows, names = rows_of_users()
    found = []
    for checkpointed in (False, True):
        model = small_phi3(lora_dropout=dropout)
        if checkpointed:
            training.set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})
        torch.manual_seed(0)
        loss, gradients = backward(model, rows, names, branches_per_pass=5)
        found.append((loss, gradients, torch.get_rng_state()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert difference(found[1][1], found[0][1]) < 1e-6  # other masks would make them differ by far more
    assert torch.equal(found[0][2], found[1][2])


@pytest.fixture
def forgetful_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's own, at a graph break
def test_compiled_layers_share_prefixes(monkeypatch, forgetful_compiler) -> None:
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "eager")
    plain, compiled = small_phi3(num_layers=1), small_phi3(num_layers=1)
    training.compile_model(compiled, verbose=False)
    n_graphs = []
    for seed in range(4):
        rows, names = rows_of_users(n_users=1, n_rows=3 + seed, prefix=9 + seed, seed=seed)
        loss, found = backward(compiled, rows, names)
        expected_loss, expected = backward(plain, rows, names, "off")
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert difference(found, expected) < 1e-5
        n_graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < n_graphs[1] == n_graphs[3]  # the second shape makes lengths variables; then nothing is compiled again


def test_bf16_differs_by_its_rounding_only() -> None:
    model = small_phi3().bfloat16()
    rows, names = rows_of_users()
    loss, found = backward(model, rows, names)
    expected_loss, expected = backward(model, rows, names, "off")
    assert loss == pytest.approx(expected_loss, rel=0.01)
    assert 0 < difference(found, expected) < 0.05


def test_attention_with_dropout_of_its_own_is_run_plain() -> None:
    model = small_phi3(attn_dropout=0.5).train()
    rows, names = rows_of_users()
    assert "dropout" in shared_prefix.obstacle(model)
    torch.manual_seed(0)
    loss, _ = backward(model, rows, names)
    torch.manual_seed(0)
    assert backward(model, rows, names, "off")[0] == loss
    assert shared_prefix.obstacle(model.eval()) is None


def test_the_model_is_left_as_it_was() -> None:
    model = small_phi3()
    rows, names = rows_of_users()
    before = [layer.attn._attention_call for layer in model.layers]
    backward(model, rows, names)
    with pytest.raises(IndexError):
        backward(model, [TokenRow([1, 2, 99, 3, 7], 3)] * 2, ["u", "u"])
    assert [layer.attn._attention_call for layer in model.layers] == before


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(model: nn.Module) -> nn.Module:
    for layer in model.layers:
        fully_shard(layer)
    return fully_shard(model)


def whole(gradients: dict[str, Tensor], n: int = 1) -> dict[str, Tensor]:
    """FSDP2 averages over processes."""
    return {name: gradient.full_tensor() * n for name, gradient in gradients.items()}


def test_fsdp2_runs_its_hooks(one_process) -> None:
    rows, names = rows_of_users()
    loss, found = backward(sharded(small_phi3()), rows, names)
    expected_loss, expected = backward(small_phi3(), rows, names, "off")
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert difference(whole(found), expected) < 1e-5


def run_as(rank: int, store: str, results) -> None:
    """One of two processes with rows of its own, for the child that it runs in."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)

    def agree(shape: list[int]) -> list[int]:
        shapes: list[list[int]] = [[], []]
        dist.all_gather_object(shapes, shape)
        return [max(sizes) for sizes in zip_longest(*shapes, fillvalue=0)]

    _, gradients = backward(sharded(small_phi3()), *rows_of_process(rank), branches_per_pass=2, agree=agree)
    if (found := whole(gradients, n=2)) and rank == 0:
        results.put({name: gradient.tolist() for name, gradient in found.items()})
    dist.destroy_process_group()


def rows_of_process(rank: int) -> tuple[list[TokenRow], list[str]]:
    """Three rounds of two passes, or one of three and a row that shares nothing."""
    if rank == 0:
        return rows_of_users(n_users=3, n_rows=4)
    rows, names = rows_of_users(n_users=1, n_rows=6, seed=1)
    return [*rows, TokenRow([8, 9, 3, 7], 2)], [*names, "alone"]


def test_sharded_processes_run_the_same_passes_on_different_rows(tmp_path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [
        context.Process(target=run_as, args=(rank, str(tmp_path / "store"), results), daemon=True) for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    found = {name: torch.tensor(gradient) for name, gradient in results.get(timeout=60).items()}
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    parts = [backward(small_phi3(), *rows_of_process(rank), "off")[1] for rank in (0, 1)]
    assert difference(found, {name: parts[0][name] + parts[1][name] for name in parts[0]}) < 1e-5
