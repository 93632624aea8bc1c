import re

import pytest

from personas_tune.evaluation.table import write_table


def measured(name, rmse=1.0, n_parsed=100, **more):
    low, high = (None, None) if rmse is None else (rmse - 0.05, rmse + 0.05)
    errors = {"rmse": rmse, "mae": rmse, "macro_rmse": rmse, "rmse_ci": [low, high], "mae_ci": [low, high]}
    filled = {"rmse_filled": 1.23456, "mae_filled": 0.5}
    parsed = {"n": 100, "n_parsed": n_parsed, "urr": 1 - n_parsed / 100}
    return {"name": name, **parsed, **errors, **filled, **faithfulness(), **more}


def faithfulness(points=None):
    overall = {"js": 0.01, "wasserstein": 0.2, "variance_ratio": 0.9, "true": [0.5, 0.5], "simulated": [0.4, 0.6]}
    agreement = {"accuracy": 0.41, "within_1": 0.82, "kappa": 0.33, "pearson": 0.44, "spearman": None}
    scores = {"pairwise_order": 0.65, "nll": 1.4, "rps": 0.12, "ece": 0.03}
    return {**agreement, **scores, "distribution": {"overall": overall, "points": {**overall, **(points or {})}}}


def agent(name, **more):
    origin = {"base": "default", "adapters": None, "memories": "both", "readout": "expected"}
    return measured(name, **(origin | more))


def make_metrics(**more):
    mae = {"mae": {"difference": 0.02, "low": -0.01, "high": 0.05}}
    metrics = {
        "agents": [agent("phi3", rmse=1.1), agent("phi3_persona", rmse=0.9, adapters="persona")],
        "baselines": [measured("constant", tuned={"label": 4.0}), measured("user_mean", tuned={"shrinkage": 8.0})],
        "oracle": None,
        "paired": [
            {"a": "phi3_persona", "b": "phi3", "difference": -0.2, "low": -0.25, "high": -0.15, **mae},
            {"a": "phi3_persona", "b": "constant", "difference": -0.01, "low": -0.05, "high": 0.03, **mae},
            {"a": "phi3", "b": "constant", "difference": 0.1, "low": 0.05, "high": 0.15, **mae},
        ],
        "settings": {
            "historical_average": "outside",
            "traits": "train",
            "n_users": 12,
            "n_rows": 100,
            "seed": 42,
            "n_resamples": 9999,
            "confidence": 0.95,
        },
    }
    return metrics | more


def cells_of(table: str, name: str) -> list[list[str]]:
    """The cells of each line whose first cell is ``name``."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [row for row in rows if row[0] == name]


def test_agents_come_first_then_baselines_then_the_floor():
    table = write_table(make_metrics(oracle=measured("Bayes-optimal", rmse=0.7)))
    names = [line.split("|")[1].strip() for line in table.split("\n\n")[0].splitlines()]
    assert names == ["predictor", names[1], "phi3", "phi3_persona", "constant 4", "user_mean", "Bayes-optimal"]


def test_an_agents_row_holds_its_origin_and_its_errors_with_intervals():
    (row,) = cells_of(write_table(make_metrics()).split("\n\n")[0], "phi3_persona")
    expected = ["default", "persona", "both", "expected", "100", "0.900 [0.850, 0.950]", "0.900 [0.850, 0.950]"]
    assert row == ["phi3_persona", *expected, "0.00%", "0.900"]


def test_baselines_leave_out_what_only_agents_have():
    (row,) = cells_of(write_table(make_metrics()).split("\n\n")[0], "constant 4")
    assert row[1:5] == ["-", "-", "-", "-"]


def test_filled_errors_are_shown_when_an_agent_left_rows_unanswered():
    table = write_table(make_metrics(agents=[agent("phi3", n_parsed=97, readout="generate")]))
    assert cells_of(table, "phi3")[0][-4:] == ["3.00%", "1.235", "0.500", "1.000"]
    assert "Filled: all rows" in table
    assert "illed" not in write_table(make_metrics())


def test_an_agent_that_never_answered_shows_dashes_for_its_errors():
    row = cells_of(write_table(make_metrics(agents=[agent("phi3", rmse=None, n_parsed=0)])), "phi3")[0]
    assert (row[6], row[7], row[-1]) == ("-", "-", "-")


def test_faithfulness_is_a_table_of_its_own_with_a_row_for_every_predictor():
    block = write_table(make_metrics(oracle=measured("Bayes-optimal"))).split("\n\n")[1]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
    assert header == [
        "faithfulness", "accuracy", "within 1", "kappa", "Pearson", "Spearman", "order", "NLL", "RPS", "ECE",
        "JS", "W1", "var.",
    ]  # fmt: skip
    assert [row[0] for row in rows] == ["phi3", "phi3_persona", "constant 4", "user_mean", "Bayes-optimal"]
    assert rows[0][1:] == [
        "0.410", "0.820", "0.330", "0.440", "-", "0.650", "1.400", "0.120", "0.030", "0.010", "0.200", "0.900",
    ]  # fmt: skip


def test_where_an_agent_draws_its_ratings_the_distances_of_its_points_stand_beside():
    drawing = agent("phi3", **faithfulness(points={"js": 0.3, "variance_ratio": 0.1}))
    table = write_table(make_metrics(agents=[drawing]))
    block = table.split("\n\n")[1]
    assert block.splitlines()[0].split("|")[-4:-1] == [" JS pts ", " W1 pts ", " var. pts "]
    assert cells_of(block, "phi3")[0][-6:] == ["0.010", "0.200", "0.900", "0.300", "0.200", "0.100"]
    assert cells_of(block, "user_mean")[0][-6:] == ["0.010", "0.200", "0.900"] * 2
    assert "simulate by drawing" in table
    assert "simulate by drawing" not in write_table(make_metrics())


def test_published_figures_add_a_column_and_change_nothing_else():
    published = agent("phi3", rmse=1.1, published={"rmse": 1.171, "mae": 0.881, "urr": 0.0177})
    plain, table = (write_table(make_metrics(agents=[each])) for each in (agent("phi3", rmse=1.1), published))
    (row,) = cells_of(table.split("\n\n")[0], "phi3")
    assert row == [*cells_of(plain.split("\n\n")[0], "phi3")[0], "1.171 / 0.881 / 1.77%"]
    assert cells_of(table.split("\n\n")[0], "user_mean")[0][-1] == "-"
    assert "paper RMSE / MAE / URR" in table
    assert "aper" not in plain


def test_the_tables_fit_a_wide_terminal():
    drawing = agent("phi3_persona_generate", **faithfulness(points={"js": 0.3}), n_parsed=97)
    lines = write_table(make_metrics(agents=[drawing])).splitlines()
    assert max(len(line) for line in lines if line.startswith("|")) <= 190


def test_differences_say_whether_the_agent_is_better():
    rows = cells_of(write_table(make_metrics()).split("\n\n")[2], "phi3_persona")
    mae = "+0.020 [-0.010, +0.050]"
    assert rows == [
        ["phi3_persona", "phi3", "-0.200 [-0.250, -0.150]", "better", mae],
        ["phi3_persona", "constant", "-0.010 [-0.050, +0.030]", "not told apart", mae],
    ]
    (worse,) = cells_of(write_table(make_metrics()).split("\n\n")[2], "phi3")
    assert worse[2:4] == ["+0.100 [+0.050, +0.150]", "worse"]


def test_a_difference_without_interval_is_not_told_apart():
    unknown = {"difference": 0.1, "low": None, "high": None}
    pair = {"a": "phi3", "b": "constant", **unknown, "mae": unknown}
    assert cells_of(write_table(make_metrics(paired=[pair])).split("\n\n")[2], "phi3")[0][2:] == [
        "+0.100 [-, -]",
        "not told apart",
        "+0.100 [-, -]",
    ]


def test_of_very_many_differences_those_with_the_best_are_shown():
    names = [f"agent{number}" for number in range(12)]
    agents = [agent(name, rmse_filled=2.0 - (name == "agent7")) for name in names]
    hybrids = [measured(f"hybrid_{name}", rmse_filled=0.5) for name in ("agent1", "without_agent")]
    best, bias, other = (
        measured(name, rmse_filled=at) for name, at in (("mf", 1.0), ("user_item_bias", 1.1), ("x", 1.2))
    )
    unknown = {"difference": 0.1, "low": None, "high": None}
    named = [(a, b) for a in names for b in [*names[: names.index(a)], "mf", "user_item_bias", "x"]]
    named.append(("hybrid_agent1", "hybrid_without_agent"))
    paired = [{"a": a, "b": b, **unknown, "mae": unknown} for a, b in named]
    table = write_table(make_metrics(agents=agents, baselines=[best, bias, other, *hybrids], paired=paired))
    shown = [tuple(row[:2]) for name in [*names, "hybrid_agent1"] for row in cells_of(table.split("\n\n")[2], name)]
    assert shown == [(a, b) for a, b in named if {a, b} & {"agent7", "mf", "user_item_bias", "hybrid_agent1"}]
    assert f"- {len(shown)} of {len(named)} differences are shown" in table


def test_without_differences_there_is_no_table_of_them():
    assert "against" not in write_table(make_metrics(paired=[]))


@pytest.mark.parametrize("setting", ["historical_average", "traits"])
def test_leaky_settings_are_named_as_such(setting):
    metrics = make_metrics()
    assert "leaky" not in write_table(metrics)
    metrics["settings"][setting] = "all"
    assert len(re.findall(r"all, leaky \(the paper's way\)", write_table(metrics))) == 1


def test_notes_tell_rows_users_seed_intervals_and_what_was_tuned():
    table = write_table(make_metrics())
    for fact in (
        "100 test rows of 12 users",
        "seed 42",
        "historical_average: outside",
        "traits: train",
        "[95%]",
        "9999 resamples of users",
        "user_mean (shrinkage 8)",
    ):
        assert fact in table


def test_hybrids_are_not_said_to_be_fitted_as_baselines_are():
    rows = [measured("user_mean", tuned={"shrinkage": 8.0}), measured("hybrid_phi3", tuned={"alpha": 2.0})]
    lines = write_table(make_metrics(baselines=rows)).splitlines()
    (baselines,) = (line for line in lines if line.startswith("- Baselines are fitted"))
    (hybrids,) = (line for line in lines if line.startswith("- Hybrids are fitted"))
    assert baselines.endswith("user_mean (shrinkage 8).")
    assert hybrids.endswith(
        "latest train rows of each user and tuned by cross-validation on these: hybrid_phi3 (alpha 2)."
    )


def test_agents_calibrated_on_what_they_know_have_notes():
    known = agent("phi3", calibrated_on_trained_rows=True, calibrated_on_final_profiles=True)
    table = write_table(make_metrics(agents=[known, agent("other")]))
    assert "rows that the adapters were trained on: phi3." in table
    assert "(prompt.profile: final): phi3." in table
    assert "knew" not in write_table(make_metrics())


@pytest.mark.parametrize(
    ("more", "is_noted"), [({"readout": "generate"}, True), ({"calibrated": True}, True), ({}, False)]
)
def test_what_is_measured_otherwise_with_every_adapter_is_noted(more, is_noted):
    matrix = {"adapters": ["0"], "personas": ["0"], "n": [9], "rmse": [[1.0]], "mae": [[1.0]]}
    matrix["own_minus_other"] = dict.fromkeys(("difference", "low", "high"))
    table = write_table(make_metrics(agents=[agent("phi3", **more)], own_versus_other={"phi3": matrix}))
    assert ("calibrated one before calibration" in table) == is_noted


def test_columns_are_aligned_and_numbers_stand_right():
    for block in write_table(make_metrics()).split("\n\n")[:3]:
        lines = block.splitlines()
        assert len({len(line) for line in lines}) == 1
        bars = {tuple(place for place, character in enumerate(line) if character == "|") for line in lines}
        assert len(bars) == 1
    assert "-: |" in lines[1]


def test_a_bar_in_a_name_does_not_break_the_table():
    table = write_table(make_metrics(agents=[agent("odd|name")]))
    assert r"odd\|name" in table


def test_no_nan_or_none_stands_in_the_table():
    table = write_table(make_metrics(agents=[agent("phi3", rmse=None, n_parsed=0)]))
    assert not re.search(r"\b(nan|none)\b", table, re.IGNORECASE)
