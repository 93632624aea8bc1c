"""The check before a run finds sharing that is wrong, and touches nothing."""

from dataclasses import replace

import pytest
import torch
from shared_rows import rows_of_users, small_phi3
from torch import nn

from personas_tune.training import shared_prefix
from personas_tune.training.self_check import SharingCheck, check_sharing
from personas_tune.training.shared_prefix import PrefixReader, attend_with_prefix


def check(model: nn.Module, n_users: int = 2, n_rows: int = 4, branches_per_pass: int = 3) -> SharingCheck:
    rows, names = rows_of_users(n_users, n_rows)
    return check_sharing(model, rows, names, nn.CrossEntropyLoss(), pad_id=0, branches_per_pass=branches_per_pass)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sound_sharing_passes(dtype: torch.dtype) -> None:
    found = check(small_phi3().to(dtype))
    assert (found.problem, found.is_done, found.n_rows) == (None, True, 4)
    assert 0 < found.difference < found.tolerance
    assert found.tolerance == (1e-5 if dtype == torch.float32 else 5e-2)


def test_small_groups_are_compared_as_they_will_be_run() -> None:
    assert check(small_phi3(), branches_per_pass=8).n_rows == 8
    assert check(small_phi3(), n_rows=10, branches_per_pass=3).n_rows == 4  # a second pass is enough


def wrong_positions(monkeypatch) -> None:
    logits = PrefixReader.logits
    monkeypatch.setattr(
        PrefixReader, "logits", lambda self, batch: logits(self, replace(batch, input_pos=batch.input_pos + 1))
    )


def non_causal_mask(monkeypatch) -> None:
    def attend(q, k, v, prefix_k, prefix_v, runs, mask):
        everything = torch.ones(len(q), q.shape[2], k.shape[2], dtype=torch.bool)
        return attend_with_prefix(q, k, v, prefix_k, prefix_v, runs, everything)

    monkeypatch.setattr(shared_prefix, "attend_with_prefix", attend)


def lost_gradient(monkeypatch) -> None:
    monkeypatch.setattr(PrefixReader, "backward", lambda self: None)


@pytest.mark.parametrize("fault", [wrong_positions, non_causal_mask, lost_gradient])
def test_a_fault_is_told_with_its_size(fault, monkeypatch) -> None:
    fault(monkeypatch)
    found = check(small_phi3())
    assert found.difference > 1e-2
    assert f"4 rows differ from those of separate rows by {found.difference:.1e}" in found.problem


def test_a_difference_that_is_no_number_is_a_problem() -> None:
    assert SharingCheck(n_rows=4, difference=float("nan"), tolerance=1e-5).problem is not None


def test_random_states_dropout_and_gradients_are_left_alone() -> None:
    model = small_phi3(lora_dropout=0.3).train()
    state = torch.get_rng_state()
    found = check(model)
    assert found.problem is None
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert all(weight.grad is None for weight in model.parameters())


def test_rows_that_share_nothing_leave_the_check_to_do() -> None:
    assert not check(small_phi3(), n_rows=1).is_done


def test_a_model_that_can_not_share_is_told() -> None:
    found = check(small_phi3(attn_dropout=0.1).train())
    assert found.is_done
    assert "dropout within the attention" in found.problem
