import math

import numpy as np
import pytest
import torch

from personas_tune.datasets import RatingDataset, RatingSource
from personas_tune.evaluation.predict import Sampling, predict_distributions, predict_texts, prediction_table
from personas_tune.evaluation.readouts import (
    expected_ratings,
    generate_answers,
    label_probabilities,
    most_likely_ratings,
    parse_rating,
)

HALF_STARS = ["0.5", "1", "1.5", "2", "2.5", "3", "3.5", "4", "4.5", "5"]


def brute_force(model, prompt: list[int], answers: list[list[int]]) -> np.ndarray:
    """Token by token, one label at a time, with the stock forward."""
    log_p = []
    for answer in answers:
        total, row = 0.0, list(prompt)
        for token in answer:
            logits = model(torch.tensor([row]))[0, -1].double()
            total += logits.log_softmax(-1)[token].item()
            row.append(token)
        log_p.append(total)
    p = np.exp(np.array(log_p) - max(log_p))
    return p / p.sum()


@pytest.mark.parametrize("labels", [["1", "2", "3", "4", "5"], HALF_STARS], ids=["whole", "half"])
@torch.no_grad()
def test_label_probabilities_equal_brute_force_and_sum_to_one(load_tiny, tmp_path, labels) -> None:
    from tiny import write_experiment

    base = load_tiny()
    source = RatingSource(write_experiment(tmp_path / "run", labels).root)
    dataset = RatingDataset(base.tokenizer, source, source.samples("test")[:5], "both")
    prompts = [row.prompt for row in dataset.rows]
    answers = [base.tokenizer.answer_tokens(label) for label in labels]
    base.bank.add_new("a", seed=0)
    with base.bank.use("a"):
        for weight in base.bank._working.values():
            weight.normal_(std=0.3)
        for max_tokens in (1, 700):
            p = label_probabilities(base.model, prompts, answers, pad_id=0, max_tokens=max_tokens)
            assert p.sum(axis=1) == pytest.approx(np.ones(5), abs=1e-12)
            expected = np.stack([brute_force(base.model, prompt, answers) for prompt in prompts])
            np.testing.assert_allclose(p, expected, rtol=1e-4)
    assert p.std(axis=0).max() > 1e-4  # the prompts do matter


def forwards(model) -> list[tuple[int, ...]]:
    """The shapes of the tokens that the model is run on from now on."""
    shapes: list[tuple[int, ...]] = []
    model.tok_embeddings.register_forward_hook(lambda _, inputs, __: shapes.append(tuple(inputs[0].shape)))
    return shapes


def test_prompts_are_grouped_whatever_their_order_and_prefixes_read_once(load_tiny) -> None:
    base = load_tiny()
    rng = np.random.default_rng(0)
    users = [rng.integers(3, 300, 40 + user).tolist() for user in range(3)]
    prompts = [user + rng.integers(3, 300, int(rng.integers(5, 9))).tolist() for user in users for _ in range(6)]
    prompts.append(rng.integers(3, 300, 30).tolist())  # begins like none of them
    answers = [[5, 2], [6, 2], [7, 8, 2]]
    shapes = forwards(base.model)
    p = label_probabilities(base.model, prompts, answers, pad_id=0, max_tokens=120)
    prefixes = [rows * length for rows, length in shapes if length >= 29]
    assert sum(prefixes) == sum(len(user) for user in users) + 29
    shapes.clear()
    order = rng.permutation(len(prompts))
    shuffled = label_probabilities(base.model, [prompts[i] for i in order], answers, pad_id=0, max_tokens=10_000)
    assert len(shapes) == 2  # all prefixes at once, all branches at once
    np.testing.assert_allclose(shuffled, p[order], rtol=1e-5)


def test_passes_stay_within_their_tokens(load_tiny) -> None:
    base = load_tiny()
    prompts = [[*range(3, 103), n, n + 1, n + 2, n + 3] for n in range(20)]
    shapes = forwards(base.model)
    label_probabilities(base.model, prompts, [[5, 2], [6, 2]], pad_id=0, max_tokens=140)
    assert shapes[0] == (1, 100)
    assert [rows for rows, _ in shapes[1:]] == [5, 5, 5, 5]
    assert all(100 + rows * length <= 140 for rows, length in shapes[1:])


def test_expected_and_most_likely_ratings_by_hand() -> None:
    p = np.array([[0.1, 0.2, 0.7], [0.4, 0.4, 0.2]])
    assert expected_ratings(p, [1, 3, 5]).tolist() == pytest.approx([4.2, 2.6])
    assert most_likely_ratings(p, [1, 3, 5]).tolist() == [5, 1]


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("4", 4.0),
        (" 4.", 4.0),
        ("Rating: 5/5", 5.0),
        ("I give it 3 stars", 3.0),
        ("10", None),
        ("45", None),
        ("4.7", None),
        ("4.00", 4.0),
        ("-2", None),
        ("", None),
        ("four", None),
        ("0", None),
    ],
)
def test_parsing_whole_ratings(text: str, rating: float | None) -> None:
    assert parse_rating(text, ["1", "2", "3", "4", "5"]) == rating


@pytest.mark.parametrize(("text", "rating"), [("4.5", 4.5), ("4", 4.0), ("0.5!", 0.5), ("4.25", None), ("5.0", 5.0)])
def test_parsing_half_star_ratings(text: str, rating: float | None) -> None:
    assert parse_rating(text, HALF_STARS) == rating


def generate(base, prompts, **changes):
    options = {
        "pad_id": 0, "stop_tokens": base.tokenizer.stop_tokens, "max_new_tokens": 4, "temperature": 0.9, "top_k": 50,
        "max_tokens": 5000, "seed": 1, **changes,
    }  # fmt: skip
    return generate_answers(base.model, prompts, [str(i) for i in range(len(prompts))], **options)


@torch.no_grad()
def test_greedy_generation_equals_torchtune_s(load_tiny, experiment) -> None:
    from torchtune.generation import generate as stock_generate

    base = load_tiny()
    source = RatingSource(experiment.root)
    prompts = [row.prompt for row in RatingDataset(base.tokenizer, source, source.samples("test")[:4], "both").rows]
    mine = generate(base, prompts, temperature=0, stop_tokens=[])
    for prompt, answer in zip(prompts, mine, strict=True):
        stock, _ = stock_generate(base.model, torch.tensor(prompt), max_generated_tokens=4, top_k=1)
        assert stock[0, len(prompt) :].tolist() == answer


def test_drawn_answers_do_not_depend_on_batching(load_tiny, experiment) -> None:
    base = load_tiny()
    source = RatingSource(experiment.root)
    prompts = [row.prompt for row in RatingDataset(base.tokenizer, source, source.samples("test")[:6], "both").rows]
    together = generate(base, prompts)
    assert together == generate(base, prompts, max_tokens=1)
    assert together != generate(base, prompts, seed=2)
    assert len({tuple(answer) for answer in together}) > 1


def test_generation_reads_prefix_and_branches_once_and_then_a_token_at_a_time(load_tiny) -> None:
    base = load_tiny()
    prompts = [[*range(3, 103), n, n + 1][: 102 - n % 2] for n in range(4)]
    shapes = forwards(base.model)
    generate(base, prompts, stop_tokens=[], max_new_tokens=3)
    assert shapes == [(1, 100), (4, 3), (4, 1), (4, 1)]  # a branch ends with the token to be predicted


def test_drawn_answers_are_those_of_whole_rows_run_again_for_each_token(load_tiny) -> None:
    from personas_tune.adapters.bank import stable_seed
    from personas_tune.evaluation.readouts import _draw

    base = load_tiny()
    prompts = [[*range(3, 43), n, *[7] * (n % 3)] for n in range(5)]
    answers = generate(base, prompts, stop_tokens=[])
    for index, prompt in enumerate(prompts):
        generator, row = torch.Generator().manual_seed(stable_seed(1, str(index))), list(prompt)
        for _ in range(4):
            logits = base.model(torch.tensor([row]))[:, -1]
            row += _draw(logits, [generator], temperature=0.9, top_k=50)
        assert answers[index] == row[len(prompt) :]


def test_generation_stops_where_the_context_ends(load_tiny) -> None:
    base = load_tiny()
    longest = base.max_seq_len
    prompts = [[20] * (longest - 2), [20] * 5]
    answers = generate(base, prompts, stop_tokens=[], temperature=0)
    assert [len(answer) for answer in answers] == [2, 4]


def test_generation_draws_from_the_softmax_of_the_top_k() -> None:
    from personas_tune.evaluation.readouts import _draw

    logits = torch.tensor([0.0, 1.0, 2.0, -9.0]).repeat(20_000, 1)
    generator = torch.Generator().manual_seed(0)
    drawn = np.bincount(_draw(logits, [generator] * 20_000, temperature=0.5, top_k=2), minlength=4) / 20_000
    odds = math.exp((2.0 - 1.0) / 0.5)
    assert drawn.tolist() == pytest.approx([0, 1 / (1 + odds), odds / (1 + odds), 0], abs=0.01)


def test_each_user_is_answered_by_its_adapter(load_tiny, experiment) -> None:
    base = load_tiny()
    source = RatingSource(experiment.root)
    dataset = RatingDataset(base.tokenizer, source, source.samples("test"), "both")
    labels = source.labels
    weights = base.bank.add_new("a", seed=0).state_dict()
    base.bank.add_loaded("b", {k: w + 0.5 for k, w in weights.items()}, where="test")

    def p_of(assignment):
        return predict_distributions(base, dataset, range(len(dataset)), assignment, labels, 2000, lambda n: None)

    users = sorted({sample.user_id for sample in dataset.samples})
    all_a, all_b = p_of(dict.fromkeys(users, "a")), p_of(dict.fromkeys(users, "b"))
    mixed = p_of({user: "b" if user == "u3" else "a" for user in users})
    of_u3 = np.array([sample.user_id == "u3" for sample in dataset.samples])
    np.testing.assert_allclose(mixed[of_u3], all_b[of_u3], rtol=1e-5)
    np.testing.assert_allclose(mixed[~of_u3], all_a[~of_u3], rtol=1e-5)
    assert np.abs(all_a - all_b).max() > 1e-3
    np.testing.assert_allclose(p_of(None), all_a, rtol=1e-4)  # a fresh adapter does nothing, neither does none


def test_the_prediction_table_has_the_contract_s_columns(load_tiny, experiment) -> None:
    from personas_tune.workspace import COLUMNS

    base = load_tiny()
    source = RatingSource(experiment.root)
    dataset = RatingDataset(base.tokenizer, source, source.samples("test"), "both")
    rows = range(len(dataset))
    p = predict_distributions(base, dataset, rows, None, source.labels, 2000, lambda n: None)
    texts = predict_texts(base, dataset, rows, None, Sampling(4, 0.3, 50, 0), 4000, lambda n: None)
    for generated in (None, texts):
        table = prediction_table(dataset.samples, p, source.labels, generated)
        assert table.column_names == list(COLUMNS["predictions"])
        assert (table["text"].null_count == 0) == (generated is not None)
