"""``report/index.html`` of a made-up experiment: what stands on it, what can't get onto it, what is missing."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from evaluated import HOSTILE, make_hostile, write_evaluated

from personas_tune.errors import DataError
from personas_tune.report.page import write_report
from personas_tune.report.run import read_run
from personas_tune.report.write import build_report
from personas_tune.workspace import Workspace, to_json

FIGURES = {
    "rmse", "mae", "table", "paired-baseline", "paired-best", "paired-hybrid", "faithfulness", "distribution",
    "calibration", "confusion", "distribution-by-persona", "map", "elbow", "silhouette", "words", "own-versus-other",
    "loss", "train-size", "examples", "settings",
}  # fmt: skip
TABLES = {"table", "faithfulness", "examples", "settings"}


class Page(HTMLParser):
    """The elements of a page: names, attributes, and the text in each figure."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self._figure: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag == "figure":
            self._figure = dict(attributes)["id"]
            self.texts[self._figure or ""] = ""

    def handle_endtag(self, tag: str) -> None:
        if tag == "figure":
            self._figure = None

    def handle_data(self, data: str) -> None:
        if self._figure is not None:
            self.texts[self._figure] += data


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return write_evaluated(tmp_path_factory.mktemp("evaluated") / "run")


@pytest.fixture
def copy(evaluated: Workspace, tmp_path: Path) -> Workspace:
    return Workspace.at(shutil.copytree(evaluated.root, tmp_path / "copy"))


@pytest.fixture(scope="module")
def text(evaluated: Workspace) -> str:
    return write_report(read_run(evaluated))


def test_every_figure_is_there_with_its_caption_and_in_words(text: str) -> None:
    page = Page(text)
    assert set(page.texts) == FIGURES
    assert text.count("<figcaption>") == len(FIGURES)
    told = [attributes["aria-label"] for _, attributes in page.elements if attributes.get("role") == "img"]
    assert len(told) == len(FIGURES - TABLES)
    assert all(len(each or "") > 20 for each in told)
    assert 'id="absent"' not in text


def test_the_page_asks_for_nothing_and_runs_nothing(text: str) -> None:
    assert "http" not in text.replace("http-equiv", "")
    assert re.findall(r"url\(|@import|\bsrc=|<script|<link|javascript:", text) == []
    assert "default-src 'none'" in text
    links = [attributes["href"] for name, attributes in Page(text).elements if name == "a"]
    assert links
    assert all(f'id="{str(link).removeprefix("#")}"' in text for link in links)


def test_texts_of_users_stay_texts(copy: Workspace, text: str) -> None:
    make_hostile(copy)
    hostile = Page(write_report(read_run(copy)))
    assert {name for name, _ in hostile.elements} == {name for name, _ in Page(text).elements}
    assert not [key for _, attributes in hostile.elements for key in attributes if key.startswith("on")]
    assert set(hostile.texts) == FIGURES
    for figure in ("table", "words", "settings"):
        assert HOSTILE in hostile.texts[figure]
    assert hostile.texts["examples"].count(HOSTILE) >= 30


def test_figures_are_those_of_the_metrics(evaluated: Workspace, text: str) -> None:
    metrics = json.loads(evaluated.metrics.read_text())
    page = Page(text)
    for row in [*metrics["agents"], *metrics["baselines"]]:
        assert f"{row['rmse']:.3f}" in page.texts["rmse"]
        assert f"{row['mae']:.3f}" in page.texts["table"]
        assert f"{row['kappa']:.3f}" in page.texts["faithfulness"]
        assert f"{row['rmse_ci'][0]:.3f} to {row['rmse_ci'][1]:.3f}" in page.texts["table"]
    assert "leaky" in page.texts["table"]
    assert "paper’s RMSE" in page.texts["table"]
    for cell in ("0.910", "1.020", "0.970", "1.000"):
        assert cell in page.texts["own-versus-other"]
    assert "the lowest error for 2 of 2 personas" in page.texts["own-versus-other"]
    assert "2.10.0" in page.texts["settings"]
    (hybrid,) = [pair for pair in metrics["paired"] if pair["a"] == "hybrid_persona"]
    assert f"{abs(hybrid['difference']):.3f}" in page.texts["paired-hybrid"]


def test_only_the_own_adapter_s_cells_are_framed(text: str) -> None:
    matrix = text[text.index('id="own-versus-other"') : text.index('id="loss"')]
    framed = re.findall(r'class="own"></rect><text[^>]*>([^<]+)<', matrix)
    assert sorted(framed) == ["0.910", "1.000"]


def test_equal_inputs_give_equal_bytes_wherever_they_lie(evaluated: Workspace, copy: Workspace, text: str) -> None:
    assert write_report(read_run(copy)) == text
    assert build_report(copy.root).read_text(encoding="utf-8") == text


def test_a_report_is_written_again_when_its_inputs_have_changed(copy: Workspace) -> None:
    page = build_report(copy.root)
    written = page.stat().st_mtime_ns
    assert build_report(copy.root).stat().st_mtime_ns == written
    metrics = json.loads(copy.metrics.read_text())
    metrics["agents"][0]["rmse"] = 7.654
    copy.metrics.write_text(to_json(metrics))
    assert "7.654" in build_report(copy.root).read_text(encoding="utf-8")
    assert build_report(copy.root).stat().st_mtime_ns != written


def test_what_isn_t_there_is_named_with_its_reason(copy: Workspace) -> None:
    for file in (copy.clustering, copy.personas, *copy.root.glob("adapters/*/losses.parquet")):
        file.unlink()
    for file in copy.root.glob("eval/predictions_*"):
        file.unlink()
    metrics = json.loads(copy.metrics.read_text())
    del metrics["own_versus_other"]
    for row in [*metrics["agents"], *metrics["baselines"]]:
        for key in ("distribution", "confusion", "calibration_curve", "kappa", "skill"):
            row.pop(key)
    copy.metrics.write_text(to_json(metrics))
    (copy.root / "eval" / "manifest.json").unlink()
    text = write_report(read_run(copy))
    absent = {"distribution", "calibration", "confusion", "distribution-by-persona", "map", "elbow", "silhouette",
              "words", "own-versus-other", "loss", "train-size", "examples"}  # fmt: skip
    assert set(Page(text).texts) == FIGURES - absent
    reasons = re.findall(r'<li id="absent-([\w-]+)"><b>[^<]+</b>: ([^<]{10,})\.</li>', text)
    assert {figure for figure, _ in reasons} == absent


def test_metrics_of_before_the_report_still_make_one(copy: Workspace) -> None:
    metrics = json.loads(copy.metrics.read_text())
    newer = {"accuracy", "within_1", "kappa", "pearson", "spearman", "pairwise_order", "distribution", "nll", "rps",
             "ece", "calibration_curve", "confusion", "skill", "published"}  # fmt: skip
    for kind in ("agents", "baselines"):
        metrics[kind] = [{key: row[key] for key in row if key not in newer} for row in metrics[kind]]
    metrics["paired"] = [
        {key: pair[key] for key in ("a", "b", "difference", "low", "high")} for pair in metrics["paired"]
    ]
    copy.metrics.write_text(
        to_json({key: metrics[key] for key in ("agents", "baselines", "oracle", "paired", "settings")})
    )
    text = write_report(read_run(copy))
    assert {"rmse", "table", "paired-best", "map"} <= set(Page(text).texts)
    assert "run persona_eval again" in text


def test_an_agent_that_never_answers_leaves_gaps_and_no_traceback(copy: Workspace) -> None:
    metrics = json.loads(copy.metrics.read_text())
    best = min(metrics["agents"], key=lambda row: row["rmse_filled"])
    nothing = dict.fromkeys(("js", "wasserstein", "variance_ratio", "true", "simulated"))
    best["distribution"].update(overall=nothing, per_user={}, per_persona={"0": nothing, "1": nothing})
    n = len(best["confusion"])
    best.update(n_parsed=0, urr=1.0, calibration_curve=[], confusion=[[0] * n] * n, kappa=None, skill={})
    best.update(rmse=None, mae=None, rmse_ci=[None, None], mae_ci=[None, None], macro_rmse=None, macro_mae=None)
    metrics["own_versus_other"]["persona"]["rmse"][0] = [None, None]
    copy.metrics.write_text(to_json(metrics))
    page = Page(write_report(read_run(copy)))
    assert FIGURES - set(page.texts) == {"distribution-by-persona", "train-size"}
    assert "100.0%" in page.texts["table"]


def test_unanswered_rows_leave_order_and_bold_to_the_filled_errors(copy: Workspace) -> None:
    metrics = json.loads(copy.metrics.read_text())
    rows = {row["name"]: row for row in metrics["agents"]}
    rows["persona_half"].update(rmse=0.5, mae=0.5, rmse_filled=0.5, mae_filled=0.5)
    rows["persona_text"].update(rmse=0.001, mae=0.001, rmse_filled=9.0, mae_filled=9.0)
    rows["base"].update(rmse_filled=0.012, mae_filled=0.012)
    copy.metrics.write_text(to_json(metrics))
    text = write_report(read_run(copy))
    page = Page(text)
    assert "base, an agent, comes first of agents and baselines." in page.texts["rmse"]
    told = re.findall('aria-label="(RMSE|MAE) by predictor: (.*?)"', text)
    assert [(name, ranked.split("; ")[0][:5], ranked.split("; ")[-1][:12]) for name, ranked in told] == [
        ("RMSE", "base ", "persona_text"),
        ("MAE", "base ", "persona_text"),
    ]
    table = text[text.index('<figure id="table"') : text.index('<figure id="paired-baseline"')]
    assert re.findall("<b>(.*?)</b>", table) == ["0.012", "0.012"]


def test_with_all_rows_answered_the_lowest_is_bold_and_a_leading_hybrid_is_called_one(copy: Workspace) -> None:
    metrics = json.loads(copy.metrics.read_text())
    for row in [*metrics["agents"], *metrics["baselines"]]:
        row.update(n_parsed=row["n"], urr=0.0, rmse=1.0, mae=1.0, macro_rmse=1.0)
    hybrid = next(row for row in metrics["baselines"] if row["name"] == "hybrid_persona")
    hybrid.update(rmse=0.011, mae=0.012, macro_rmse=0.013)
    metrics["oracle"] = {**hybrid, "name": "bayes_optimal"}
    copy.metrics.write_text(to_json(metrics))
    text = write_report(read_run(copy))
    assert "hybrid_persona, a hybrid (a regression that uses an agent), comes first" in Page(text).texts["rmse"]
    table = text[text.index('<figure id="table"') : text.index('<figure id="paired-baseline"')]
    assert re.findall("<b>(.*?)</b>", table) == ["0.011", "0.012", "0.013"]  # and not the floor's, which are equal
    assert "4 agents, 2 baselines, 1 hybrid" in text


def test_figures_say_what_they_are(text: str) -> None:
    texts = Page(text).texts
    assert "published figure, of its own test rows and models" in texts["rmse"]
    assert "The paper’s figures are of its own test rows and models." in texts["table"]
    assert texts["table"].count("RMSE interval") == texts["table"].count("MAE interval") == 1
    assert "1 of K" in texts["own-versus-other"]
    assert "For each true rating" in texts["confusion"]
    differences = text[text.index('<figure id="paired-baseline"') : text.index('<figure id="paired-best"')]
    js = differences[differences.index("JS, all ratings") :]
    assert re.findall(r'class="figures">[+−]\d\.(\d+)<', js)
    assert {len(digits) for digits in re.findall(r'class="figures">[+−]\d\.(\d+)<', js)} == {4}
    curve = text[text.index('<figure id="train-size"') : text.index('<figure id="examples"')]
    assert curve.count('class="whisker c0"') == 4  # two shares, in two panels


def test_markers_that_repeat_are_told(copy: Workspace) -> None:
    table = pq.read_table(copy.personas)
    assert "Markers repeat" not in Page(write_report(read_run(copy))).texts["map"]
    many = [{**row, "persona": at} for at, row in enumerate(table.to_pylist() * 17)][:17]
    pq.write_table(pa.Table.from_pylist(many, schema=table.schema), copy.personas)
    assert "Markers repeat after 16 personas." in Page(write_report(read_run(copy))).texts["map"]


def test_metrics_that_are_no_metrics_are_told(copy: Workspace) -> None:
    copy.metrics.write_text('{"agents": []}')
    with pytest.raises(DataError, match=r"metrics\.json: no 'baselines' in it; run persona_eval again"):
        read_run(copy)


def test_predictions_of_another_run_are_told(copy: Workspace) -> None:
    pq.write_table(pq.read_table(copy.predictions("base")).slice(0, 0), copy.predictions("base"))
    with pytest.raises(DataError, match="base has no prediction; run persona_eval again"):
        write_report(read_run(copy))
