from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCAB, model_section
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from tiny import base_sections
from torch.nn.functional import cross_entropy
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler
from torchtune import config as torchtune_config
from torchtune.data import padded_collate, padded_collate_dpo, padded_collate_sft
from torchtune.datasets import ConcatDataset, PackedDataset

from personas_tune.datasets import (
    PrefixItem,
    RatingSource,
    SharedPrefixDataset,
    TokenRow,
    collate_shared_prefixes,
    persona_prefix_dataset,
    persona_rating_dataset,
)
from personas_tune.datasets.ratings import labelled
from personas_tune.errors import ConfigError
from personas_tune.workspace import Workspace

N_USERS, N_ROWS = 3, 5


def users_rows(seed: int = 0) -> tuple[list[TokenRow], list[str]]:
    """Rows of random tokens and lengths; those of a user begin alike."""
    draw = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (), generator=draw))
        return torch.randint(3, VOCAB, (length,), generator=draw).tolist()

    rows, names = [], []
    for user in range(N_USERS):
        prefix = tokens(5, 12)
        for number in range(N_ROWS):
            row = [*prefix, 3 + number, *tokens(2, 9)]
            rows.append(TokenRow(row, len(row) - 2))
            names.append(f"u{user}")
    return rows, names


def step_of(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients as the stock recipes take them."""
    labels = batch.pop("labels")
    labels = torch.hstack((labels[..., 1:], torch.full_like(labels[:, :1], -100)))
    model.zero_grad()
    loss = cross_entropy(model(**batch).flatten(0, 1), labels.flatten())
    loss.backward()
    return loss.detach(), {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_all_gradients_are_those_of_the_rows_on_their_own(family: str) -> None:
    torch.manual_seed(0)
    model = torchtune_config.instantiate(OmegaConf.create(model_section(family, "attention")))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    rows, names = users_rows()
    alone = [labelled(row) for row in rows]
    loss, gradients = step_of(model, padded_collate_sft(alone))
    items = list(SharedPrefixDataset(rows, names, rows_per_item=3))
    batch = collate_shared_prefixes([*items[1:], items[0]])
    assert batch["tokens"].numel() < 0.8 * padded_collate_sft(alone)["tokens"].numel()
    shared_loss, shared = step_of(model, batch)
    torch.testing.assert_close(shared_loss, loss, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        assert gradient.norm() > 0, name
        assert (shared[name] - gradient).norm() < 1e-5 * gradient.norm(), name


def test_another_row_or_another_order_of_branches_changes_nothing_for_a_row() -> None:
    model = torchtune_config.instantiate(OmegaConf.create(model_section("phi3")))
    rows = [TokenRow([7, 8, 9, 10 + i, 20 + i, 30 + i], 5) for i in range(3)]
    wrong = TokenRow([7, 8, 9, 50, 51, 52, 53, 54], 6)
    seen = []
    for others in ([rows[1], rows[2]], [wrong, rows[1]]):
        item = PrefixItem(prefix=[7, 8, 9], branches=[labelled(row, 3) for row in (*others, rows[0])])
        batch = collate_shared_prefixes([item])
        labels = batch.pop("labels")
        assert labels[0, -1] == 30
        seen.append(model(**batch)[0, -2])
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-6, atol=1e-6)


def test_a_hand_made_batch() -> None:
    item = PrefixItem(
        prefix=[7, 8], branches=[labelled(TokenRow([7, 8, 9, 5], 3), 2), labelled(TokenRow([7, 8, 4, 6], 3), 2)]
    )
    batch = collate_shared_prefixes([item, {"tokens": [1, 2], "labels": [-100, 2]}], padding_idx=0, ignore_idx=-100)
    assert batch["tokens"].tolist() == [[7, 8, 9, 5, 4, 6], [1, 2, 0, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 5, -100, 6], [-100, 2, -100, -100, -100, -100]]
    assert batch["input_pos"].tolist() == [[0, 1, 2, 3, 2, 3], [0, 1, 0, 0, 0, 0]]
    assert batch["mask"].int().tolist() == [
        [
            [1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0],
            [1, 1, 1, 1, 0, 0],
            [1, 1, 0, 0, 1, 0],
            [1, 1, 0, 0, 1, 1],
        ],
        [
            [1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [0, 0, 1, 0, 0, 0],
            [0, 0, 1, 1, 0, 0],
            [0, 0, 1, 1, 1, 0],
            [0, 0, 1, 1, 1, 1],
        ],
    ]


def test_other_datasets_items_are_batched_as_torchtune_batches_them() -> None:
    batch = [{"tokens": [1, 2, 3], "labels": [-100, 2, 3]}, {"tokens": [4, 5], "labels": [4, 5], "extra": 1}]
    ours, stock = collate_shared_prefixes(batch, 9, -100), padded_collate_sft(batch, 9, -100)
    assert ours.keys() == stock.keys() == {"tokens", "labels"}
    assert all(torch.equal(ours[name], stock[name]) for name in ours)


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=30), st.integers(1, 5), st.integers(5, 30), st.integers())
def test_every_row_is_in_one_group_of_its_name_that_is_not_too_large(
    names: list[str], rows_per_item: int, longest: int, seed: int
) -> None:
    rows = [TokenRow([ord(name), 1, 2, 3 + number, 4], 4) for number, name in enumerate(names)]
    items = SharedPrefixDataset(rows, names, rows_per_item=rows_per_item, max_seq_len=longest, seed=seed % 99)
    assert sorted(index for group in items.groups for index in group) == list(range(len(names)))
    for group, item in zip(items.groups, items, strict=False):
        assert len({names[index] for index in group}) == 1
        assert len(group) <= rows_per_item
        assert collate_shared_prefixes([item])["tokens"].shape[1] <= longest
        for index, branch in zip(group, item.branches, strict=True):
            assert item.prefix + branch["tokens"] == rows[index].tokens


def test_groups_are_as_large_as_the_limits_let_them() -> None:
    rows = [TokenRow([1, 2, 3, 4 + number, 5], 4) for number in range(8)]
    sizes = [
        Counter(len(group) for group in SharedPrefixDataset(rows, ["u"] * 8, rows_per_item=n, max_seq_len=m).groups)
        for n, m in ((8, None), (3, None), (8, 9), (8, 5), (8, 3))
    ]
    assert sizes == [{8: 1}, {3: 2, 2: 1}, {3: 2, 2: 1}, {1: 8}, {1: 8}]


def test_the_seed_chooses_which_rows_come_together() -> None:
    rows, names = users_rows()
    groups = [SharedPrefixDataset(rows, names, rows_per_item=2, seed=seed).groups for seed in (0, 0, 1)]
    assert groups[0] == groups[1]
    assert {frozenset(group) for group in groups[0]} != {frozenset(group) for group in groups[2]}


@pytest.fixture
def tokenizer(tiny_checkpoint: Path) -> Any:
    return torchtune_config.instantiate(OmegaConf.create(base_sections(tiny_checkpoint)["tokenizer"]))


def test_the_builder_groups_all_rows_of_the_plain_dataset_by_user(tokenizer: Any, experiment: Workspace) -> None:
    plain = persona_rating_dataset(tokenizer, source=str(experiment.root), persona=1)
    shared = persona_prefix_dataset(tokenizer, source=str(experiment.root), persona=1, rows_per_item=4)
    assert (len(plain), len(shared)) == (18, 6)  # three users with six rows
    whole = [(item.prefix + b["tokens"], b["labels"][-2:]) for item in shared for b in item.branches]
    assert sorted(whole) == sorted((item["tokens"], item["labels"][-2:]) for item in plain)
    profile = "I like the"
    assert all(tokenizer.decode(item.prefix).count(profile) == 1 for item in shared)
    assert not any(profile in tokenizer.decode(b["tokens"]) for item in shared for b in item.branches)


def test_rows_with_different_profiles_are_not_grouped(tokenizer: Any, experiment: Workspace) -> None:
    experiment.prompt_settings.write_text(
        '{"template": "movies", "profile": "before_target", "labels": ["1", "2", "3", "4", "5"]}'
    )
    shared = persona_prefix_dataset(tokenizer, source=str(experiment.root), rows_per_item=99)
    names = [RatingSource(experiment.root).prefix_name(s) for s in RatingSource(experiment.root).samples("train")]
    assert len(shared) == len(set(names))


def test_an_item_is_no_longer_than_a_row_may_be(tokenizer: Any, experiment: Workspace) -> None:
    tokenizer.max_seq_len = 600
    shared = persona_prefix_dataset(tokenizer, source=str(experiment.root), rows_per_item=99)
    lengths = [collate_shared_prefixes([item])["tokens"].shape[1] for item in shared]
    assert max(lengths) <= 600
    assert 6 < len(shared) < 36


def test_processes_share_the_items_out(tokenizer: Any, experiment: Workspace) -> None:
    shared = ConcatDataset(
        [
            persona_prefix_dataset(tokenizer, source=str(experiment.root), rows_per_item=3),
            persona_rating_dataset(tokenizer, source=str(experiment.root), split="test"),
        ]
    )
    samplers = [StatefulDistributedSampler(shared, num_replicas=2, rank=rank, shuffle=True) for rank in (0, 1)]
    seen = [list(sampler) for sampler in samplers]
    assert sorted(seen[0] + seen[1]) == list(range(12 + 18))
    batch = collate_shared_prefixes([shared[index] for index in seen[0]])
    assert (batch["labels"] != -100).sum() > 0


NO_PREFIXES = "collate_fn: a collate function asks rows with a shared prefix for 'tokens'; set collate_fn="


def test_packing_is_told_apart(tokenizer: Any, experiment: Workspace) -> None:
    shared = persona_prefix_dataset(tokenizer, source=str(experiment.root))
    with pytest.raises(ConfigError, match=NO_PREFIXES):
        PackedDataset(shared, max_seq_len=1024)


COLLATORS = {
    "SFT and distilling recipes": padded_collate_sft,
    "DPO recipes": padded_collate_dpo,
    "PPO recipe": partial(padded_collate, pad_direction="left", keys_to_pad=["tokens", "labels"], padding_idx=0),
}


@pytest.mark.parametrize("collate", COLLATORS.values(), ids=COLLATORS)
def test_collators_that_know_no_prefixes_are_told_apart(collate: Callable[..., Any]) -> None:
    items = [PrefixItem(prefix=[7, 8], branches=[labelled(TokenRow([7, 8, 9, 5], 3), 2)]) for _ in range(2)]
    with pytest.raises(ConfigError, match="set collate_fn="):
        collate(items)


COUNT = "use a whole number of 1 or more"


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"packed": True}, "dataset.packed: shared prefixes can't be packed; leave it out"),
        ({"rows_per_item": 0}, f"dataset.rows_per_item: 0 can't be used; {COUNT}"),
        ({"rows_per_item": "4"}, f"dataset.rows_per_item: '4' can't be used; {COUNT}"),
        ({"rows_per_item": 2.5}, f"dataset.rows_per_item: 2.5 can't be used; {COUNT}"),
        ({"rows_per_item": None}, f"dataset.rows_per_item: None can't be used; {COUNT}"),
        ({"rows_per_item": True}, f"dataset.rows_per_item: True can't be used; {COUNT}"),
        ({"seed": -1}, "dataset.seed: -1 can't be used; use a whole number of 0 or more"),
    ],
)
def test_what_cannot_be_is_refused(tokenizer: Any, experiment: Workspace, keys: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        persona_prefix_dataset(tokenizer, source=str(experiment.root), **keys)


@pytest.mark.parametrize("build", [persona_rating_dataset, persona_prefix_dataset])
@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"memories": "all"}, "dataset.memories: 'all' can't be used; use short, long or both"),
        ({"memories": ["short"]}, "dataset.memories: ['short'] can't be used; use short, long or both"),
        ({"persona": "0"}, "dataset.persona: '0' can't be used; use a whole number of 0 or more"),
        ({"split": ["train", "test"]}, "dataset.split: ['train', 'test'] can't be used; use train or test"),
        ({"source": None}, "dataset.source: None can't be used; name the output_dir of an experiment"),
    ],
)
def test_both_builders_refuse_what_they_cannot_use(
    build: Any, tokenizer: Any, experiment: Workspace, keys: dict[str, Any], line: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        build(tokenizer, **{"source": str(experiment.root), **keys})
    assert str(caught.value) == line
