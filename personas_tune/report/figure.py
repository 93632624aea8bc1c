"""A figure of the page: a title, a sentence that says what to see, and the drawing; or why there is none."""

from collections.abc import Sequence
from dataclasses import dataclass

from personas_tune.report.markup import Child, Markup, clean, tag

WIDE, BROAD, HALF, SMALL = "wide", "broad", "half", "small"


@dataclass(frozen=True)
class Figure:
    """A figure.

    Args:
        id: Its anchor.
        title: What is shown.
        says: What to see in it, in a sentence or two.
        body: The drawing.
        told: The drawing in words, for readers who can't see it; None if the body is a table.
        size: How much of the page's width it takes.
    """

    id: str
    title: str
    says: str
    body: Markup
    told: str | None = None
    size: str = SMALL


@dataclass(frozen=True)
class Absent:
    """A figure that can't be drawn.

    Args:
        id: The anchor it would have.
        title: What it would show.
        why: What isn't there, and what would bring it.
    """

    id: str
    title: str
    why: str


def write_figure(figure: Figure) -> Markup:
    """The figure as HTML."""
    caption = tag("figcaption", tag("h3", figure.title), tag("p", figure.says))
    seen = {"role": "img", "aria_label": figure.told} if figure.told is not None else {}
    return tag("figure", caption, tag("div", figure.body, class_="body", **seen), id=figure.id, class_=figure.size)


def write_panels(panels: Sequence[tuple[str, Markup]], class_: str = "panels") -> Markup:
    """Charts side by side, each below its name."""
    return tag("div", *(tag("div", tag("h4", name), chart) for name, chart in panels), class_=class_)


def write_table(header: Sequence[Child], rows: Sequence[Sequence[Child]], n_text: int = 1) -> Markup:
    """A table that scrolls in a box of its own.

    Args:
        header: Names of the columns.
        rows: Cells; a row's first is its name.
        n_text: So many columns from the left are text, the others figures.
    """
    head = tag("tr", *(_cell("th", cell, column < n_text, scope="col") for column, cell in enumerate(header)))
    body = (
        tag(
            "tr",
            _cell("th", row[0], True, scope="row"),
            *(_cell("td", row[at], at < n_text) for at in range(1, len(row))),
        )
        for row in rows
    )
    table = tag("table", tag("thead", head), tag("tbody", *body))
    return tag("div", table, class_="scroll", tabindex=0, role="group", aria_label="table")


def write_notes(notes: Sequence[Child]) -> Markup:
    """Small print below a table."""
    return tag("ul", *(tag("li", note) for note in notes), class_="notes")


def _cell(name: str, content: Child, is_text: bool, scope: str | None = None) -> Markup:
    return tag(name, clean(content or ""), class_="text" if is_text else None, scope=scope)
