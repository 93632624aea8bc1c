"""The pages: one file each, nothing loaded from anywhere, no script, the same bytes for the same inputs."""

from collections.abc import Iterable, Sequence
from importlib.resources import files

from personas_tune.report.accuracy import accuracy_figures
from personas_tune.report.examples import example_figure
from personas_tune.report.faithful import faithful_figures
from personas_tune.report.figure import Absent, Figure, write_figure
from personas_tune.report.groups import persona_figures
from personas_tune.report.headline import outcome, write_headline
from personas_tune.report.learning import learning_figures
from personas_tune.report.markup import Child, Markup, clean, tag
from personas_tune.report.run import Run
from personas_tune.report.settings import settings_figure

# Nothing may be requested, run or sent, whatever a title or an answer holds.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

Section = tuple[str, str, Sequence[Figure | Absent]]


def write_report(run: Run) -> str:
    """``report/index.html``."""
    sections: list[Section] = [
        ("accuracy", "How accurate?", accuracy_figures(run)),
        ("faithful", "How faithful?", faithful_figures(run)),
        ("personas", "Do personas help?", persona_figures(run)),
        ("learning", "How did it learn?", learning_figures(run)),
        ("looking", "Look inside", [example_figure(run), settings_figure(run)]),
    ]
    return write_page(f"User simulation report: {outcome(run)}", write_headline(run), sections)


def write_page(title: str, header: Markup, sections: Sequence[Section]) -> str:
    """A page of sections, with what is absent named at its end.

    Args:
        title: Of the window.
        header: The top of the page.
        sections: Anchor, heading and figures of each.
    """
    absent = [each for _, _, figures in sections for each in figures if isinstance(each, Absent)]
    drawn = [section for section in sections if any(isinstance(each, Figure) for each in section[2])]
    links = (tag("a", heading, href=f"#{anchor}") for anchor, heading, _ in drawn)
    main = [header, tag("nav", *links), *(_section(*section) for section in drawn), _write_absent(absent)]
    head = [
        Markup('<meta charset="utf-8">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup('<meta name="color-scheme" content="light dark">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
        tag("title", title),
        tag("style", Markup(_style())),
    ]
    html = tag("html", _lines(tag("head", _lines(*head)), tag("body", tag("main", _lines(*main)))), lang="en")
    return f"<!DOCTYPE html>\n{html}\n"


def _section(anchor: str, heading: str, figures: Iterable[Figure | Absent]) -> Markup:
    drawn = [write_figure(figure) for figure in figures if isinstance(figure, Figure)]
    return tag("section", tag("h2", heading), tag("div", _lines(*drawn), class_="figures-of"), id=anchor)


def _write_absent(absent: Sequence[Absent]) -> Markup | None:
    if not absent:
        return None
    rows = (tag("li", tag("b", each.title), f": {each.why}.", id=f"absent-{each.id}") for each in absent)
    return tag("section", tag("h2", "Not shown"), tag("ul", *rows, class_="notes"), id="absent")


def _lines(*children: Child) -> Markup:
    return Markup("\n".join(["", *(clean(child) for child in children if child is not None), ""]))


def _style() -> str:
    return files("personas_tune.report").joinpath("style.css").read_text(encoding="utf-8")
