"""What the report is drawn and worded with, against answers worked out by hand."""

import doctest
import math
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from personas_tune.report import markup, plots
from personas_tune.report.accuracy import VERDICT_SHAPES, verdict
from personas_tune.report.examples import spread_over
from personas_tune.report.faithful_table import value_at
from personas_tune.report.figure import Figure
from personas_tune.report.groups import shades_of
from personas_tune.report.headline import outcome, sentence
from personas_tune.report.learning import learning_figures, loss_curves, share_curves, validation_curves
from personas_tune.report.markup import Markup, number, percent, tag
from personas_tune.report.plots import Frame, kept_apart, moved_apart, tick_texts, ticks_in
from personas_tune.report.run import Run, pair_of
from personas_tune.report.settings import differing, flat
from personas_tune.report.whiskers import CIRCLE, DIAMOND, SQUARE, TRIANGLE, Whisker, draw_whiskers


@pytest.mark.parametrize("module", [markup, plots])
def test_the_examples_in_the_docstrings_are_right(module: Any) -> None:
    tried = doctest.testmod(module)
    assert tried.attempted > 0
    assert tried.failed == 0


# Markup


def test_text_is_escaped_and_markup_isn_t_and_attributes_always_are() -> None:
    made = tag("a", "<b>", Markup("<i>"), None, title='"<', class_=None, data_x=Markup("<"))
    assert made == '<a title="&quot;&lt;" data-x="&lt;">&lt;b&gt;<i></a>'


def test_control_characters_are_left_out_and_other_scripts_are_not() -> None:
    assert tag("p", "a\x00\x1b\u202eb\n\u00a0\u3000\u4e2d\u05d0") == "<p>ab\n\u00a0\u3000\u4e2d\u05d0</p>"
    family = "\U0001f468\u200d\U0001f469"  # one picture of two, by a zero-width joiner
    assert tag("p", family, title=f"\ud800{family}\x07\u2067") == f'<p title="{family}">{family}</p>'


def test_numbers_have_a_true_minus_and_no_negative_zero() -> None:
    assert number(-1.2345) == "\N{MINUS SIGN}1.234"
    assert number(-0.0001, sign=True) == "+0.000"
    assert (number(None), percent(None)) == ("\N{EN DASH}", "\N{EN DASH}")
    assert percent(0.256) == "26%"


# Plots


def test_a_frame_puts_low_values_left_and_down() -> None:
    frame = Frame((1, 3), (10, 20), width=100, height=60, left=10, right=10, top=5, bottom=15)
    assert frame.at(1, 10) == (10, 45)
    assert frame.at(3, 20) == (90, 5)
    assert frame.at(2, 15) == (50, 25)


@pytest.mark.parametrize("span", [(0.83, 1.12), (-3.0, 4.5), (0.0, 1e6), (1e-5, 2e-5), (2.0, 2.0)])
def test_ticks_are_few_and_within_the_span(span: tuple[float, float]) -> None:
    ticks = ticks_in(span)
    assert 1 <= len(ticks) <= 6
    assert all(span[0] - 1e-9 <= tick <= span[1] + 1e-9 for tick in ticks)
    assert len({text for _, text in tick_texts(ticks)}) == len(ticks) or span[1] < 1e-4


def test_ticks_have_equally_many_decimals() -> None:
    assert tick_texts([-0.5, 0.25, 1.0]) == [(-0.5, "\N{MINUS SIGN}0.50"), (0.25, "0.25"), (1.0, "1.00")]


def test_names_that_would_overlap_are_moved_apart_within_the_bounds() -> None:
    assert moved_apart([10, 11, 50], 12, 0, 100) == [10, 22, 50]
    assert moved_apart([95, 99], 12, 0, 100) == [88, 100]


def test_labels_of_one_place_are_kept_apart_and_others_stay() -> None:
    placed = kept_apart([(0, 0), (0, 0), (100, 0), (1, 1)], 22)
    assert (placed[0], placed[2]) == ((0, 0), (100, 0))
    assert all(math.dist(a, b) >= 22 for at, a in enumerate(placed) for b in placed[:at])


def test_a_whisker_lies_where_its_figures_say() -> None:
    drawn = draw_whiskers([Whisker("one", 0.0, -1.0, 1.0), Whisker("two", 1.0, None, None)], "x", zero=True)
    low, zero, high = (100 * plots.share_of(value, plots.padded([0, -1, 1, 1, 0])) for value in (-1, 0, 1))
    assert f'<line x1="{low:.2f}%" x2="{high:.2f}%"' in drawn
    assert drawn.count(f'x1="{zero:.2f}%" x2="{zero:.2f}%" y1="0" y2="100%" class="zero"') == 2
    assert drawn.count("whisker c") == 1


# What is read from the metrics


def run_with(agent: float, baseline: float, low: float | None, high: float | None, turned: bool = False) -> Run:
    def row(name: str, rmse: float) -> dict[str, Any]:
        return {"name": name, "rmse_filled": rmse, "readout": "expected"}

    ends = {"difference": agent - baseline, "low": low, "high": high}
    if turned and low is not None and high is not None:
        ends = {"difference": baseline - agent, "low": -high, "high": -low}
    pair = {"a": "bias", "b": "mine", **ends} if turned else {"a": "mine", "b": "bias", **ends}
    metrics = {
        "agents": [row("worse", agent + 1), row("mine", agent)],
        "baselines": [row("bias", baseline)],
        "paired": [pair],
        "settings": {"confidence": 0.95},
    }
    return Run("run", None, metrics, ("1", "5"), None, None, {}, {})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("agent", "low", "high", "says", "ends"),
    [
        (0.8, -0.2, -0.1, "The best agent, mine, predicts ratings better than the best baseline, bias", "below 0"),
        (1.1, 0.05, 0.2, "The best baseline, bias, predicts ratings better than the best agent, mine", "above 0"),
        (0.9, -0.2, 0.1, "The best agent, mine, and the best baseline, bias, can’t be told apart", "holds 0"),
    ],
)
def test_the_headline_follows_the_paired_interval(agent: float, low: float, high: float, says: str, ends: str) -> None:
    run = run_with(agent, 0.95, low, high)
    assert outcome(run) == says
    assert f"{ends}. The agent is the best of 2, picked on these very test rows;" in sentence(run)
    assert number(agent) in sentence(run)


def test_a_regression_that_no_agent_is_compared_with_is_not_the_best_baseline() -> None:
    run = run_with(0.8, 0.95, -0.2, -0.1)
    for name, error in (("hybrid_mine", 0.1), ("hybrid_without_agent", 0.2)):
        run.metrics["baselines"].append({"name": name, "rmse_filled": error})
    run.metrics["paired"].append({"a": "hybrid_mine", "b": "hybrid_without_agent", "difference": -0.1})
    assert run.hybrids == {"hybrid_mine": "hybrid_without_agent"}
    assert outcome(run).endswith("than the best baseline, bias")
    assert [row["name"] for row in run.plain_baselines] == ["bias"]


def test_without_an_interval_the_headline_claims_nothing() -> None:
    run = run_with(0.5, 0.95, None, None)
    assert "can’t be told apart" in outcome(run)
    assert "no interval" in sentence(run)


def test_a_pair_measured_the_other_way_round_changes_its_sign() -> None:
    pair = pair_of(run_with(0.8, 0.95, -0.2, -0.1, turned=True), "mine", "bias")
    assert pair is not None
    assert (pair["low"], pair["high"]) == (-0.2, -0.1)
    assert pair["difference"] == pytest.approx(-0.15)
    assert verdict(pair) == "better"
    assert pair_of(run_with(0.8, 0.95, -0.2, -0.1), "mine", "nobody") is None


def test_a_figure_that_isn_t_there_is_none_at_any_depth() -> None:
    assert value_at({"a": {"b": 2}}, ("a", "b")) == 2
    assert value_at({"a": None}, ("a", "b")) is None
    assert value_at({}, ("a", "b")) is None


def test_loss_curves_are_means_weighted_by_rows() -> None:
    step = list(range(1, 33))
    table = pa.table(
        {
            "adapter": ["set/0"] * 32 + ["set/1"],
            "step": [*reversed(step), 7],
            "loss": [*(float(s) for s in reversed(step)), 2.5],
            "n_rows": [1 if s % 2 else 3 for s in reversed(step)] + [4],
            "validation_loss": [0.5 if s in (16, 32) else None for s in reversed(step)] + [None],
        }
    )
    curves = loss_curves(table)
    assert curves["0"][:2] == [(2.0, (1 * 1 + 2 * 3) / 4), (4.0, (3 * 1 + 4 * 3) / 4)]
    assert len(curves["0"]) == 16
    assert curves["1"] == [(7.0, 2.5)]
    assert validation_curves(table) == {"0": [(16, 0.5), (32, 0.5)]}
    assert validation_curves(table.drop(["validation_loss"])) == {}


def test_agents_alike_but_for_their_share_make_a_curve() -> None:
    sets = {
        "all": {"per": "persona", "share": 1},
        "half": {"per": "persona", "share": 0.5},
        "short": {"per": "persona", "share": 0.5, "memories": "short"},
        "old": {"per": "all"},
    }
    agents = [{"name": f"by_{name}", "adapters": name, "rmse": 1.0} for name in sets]
    said = {
        "by_half": {"readout": "expected", "adapters": "half"},
        "by_all": {"readout": "expected", "adapters": "all"},
    }
    run = SimpleNamespace(agents=[*agents, {"name": "base", "adapters": None, "rmse": 1.0}])
    run.evaluation = {"adapter_sets": sets, "agents": said}
    curves = share_curves(run)  # type: ignore[arg-type]
    assert {name: [share for share, _ in points] for name, points in curves.items()} == {"by_all": [0.5, 1.0]}
    said["by_half"]["readout"] = "generate"
    assert share_curves(run) == {}  # type: ignore[arg-type]


@pytest.mark.parametrize("n_steps", [16, 17])
def test_losses_are_called_means_only_where_they_are(n_steps: int) -> None:
    steps = list(range(1, n_steps + 1))
    table = pa.table({"adapter": ["0"] * n_steps, "step": steps, "loss": [1.0] * n_steps, "n_rows": [1] * n_steps})
    run = SimpleNamespace(losses={"persona": table})
    (figure, _) = learning_figures(SimpleNamespace(**vars(run), agents=[], evaluation={}))  # type: ignore[arg-type]
    assert isinstance(figure, Figure)
    assert ("means of 16 equal stretches" in figure.says) == (n_steps > 16)


def test_shades_are_of_one_scale_and_small_differences_stay_light() -> None:
    assert shades_of([[0.9, 1.0], [1.0, 0.8]]) == [[pytest.approx(0.375), 0.0], [0.0, pytest.approx(0.75)]]
    shades = shades_of([[0.947, None], [0.948, 1.0]])
    assert shades[0] == [pytest.approx(0.75 * (0.001 / 0.948) / 0.05), None]
    assert shades[1] == [0.0, 0.0]


def test_verdicts_have_other_marks_than_predictors() -> None:
    drawn = {VERDICT_SHAPES[verdict({"low": low, "high": high})] for low, high in ((-2, -1), (1, 2), (-1, 1))}
    assert len(drawn) == 3
    assert not drawn & {CIRCLE, SQUARE, TRIANGLE, DIAMOND}


def test_examples_are_spread_over_the_personas_and_follow_the_seed() -> None:
    groups = [0] * 50 + [1] * 3 + [2]
    chosen = spread_over(groups, 10, seed=1)
    assert len(set(chosen)) == 10
    assert [groups[place] for place in chosen] == [0] * 6 + [1] * 3 + [2]
    assert chosen == spread_over(groups, 10, seed=1) != spread_over(groups, 10, seed=2)
    assert sorted(spread_over([0, 1], 10, seed=1)) == [0, 1]


def test_settings_are_flat_and_written_as_yaml_has_them() -> None:
    nested = {"a": {"b": None, "c": [1, True]}, "d": {}, "e": 0.5, "f": []}
    assert list(flat(nested)) == [("a.b", "null"), ("a.c", "1, true"), ("d", "{}"), ("e", "0.5"), ("f", "[]")]


def test_what_one_run_lacks_altogether_is_one_difference() -> None:
    mine = {"k": 4, "sets": {"both": {"per": "all"}}, "same": [1]}
    theirs = {"k": 5, "sets": {"both": {"per": "all"}, "more": {"per": "persona", "share": 0.5}}, "same": [1]}
    assert list(differing(mine, theirs)) == [
        ("k", "4", "5"),
        ("sets.more", "\N{EN DASH}", "per: persona, share: 0.5"),
    ]
