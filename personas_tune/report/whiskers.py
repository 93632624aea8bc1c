"""Dots with whiskers in rows: a name, an estimate with its interval drawn, and the same in figures.

Positions are percentages, so that rows stretch with the page while their text keeps its size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from personas_tune.report.markup import Markup, number, tag
from personas_tune.report.plots import Span, draw_marker, padded, share_of, tick_texts, ticks_in

CIRCLE, SQUARE, TRIANGLE, DIAMOND, DOWN, CROSS, PLUS = range(7)
_HEIGHT = 26


@dataclass(frozen=True)
class Whisker:
    """A row.

    Args:
        name: What was measured.
        value: The estimate.
        low: The interval's lower end; None where there is no interval, as the upper end.
        high: The upper end.
        shape: Of the marker; colour goes with it.
        published: A figure to mark in the same row by a cross.
        strong: Whether the name is printed bold.
    """

    name: str
    value: float
    low: float | None
    high: float | None
    shape: int = CIRCLE
    published: float | None = None
    strong: bool = False


def draw_whiskers(rows: Sequence[Whisker], title: str, *, zero: bool = False, digits: int = 3) -> Markup:
    """Rows over one axis.

    Args:
        rows: From the top down.
        title: Of the axis.
        zero: Whether values are differences: signed, with a line at 0.
        digits: Decimals of the printed figures.
    """
    values = [each for row in rows for each in (row.value, row.low, row.high, row.published) if each is not None]
    span = padded([*values, 0.0] if zero else values)
    ticks = ticks_in(span, 4)
    drawn = [_row(row, span, ticks, zero, digits) for row in rows]
    return tag("div", *drawn, _axis(span, ticks, title), class_="whiskers")


def _row(row: Whisker, span: Span, ticks: Sequence[float], zero: bool, digits: int) -> Markup:
    lines = [tag("line", x1=_at(tick, span), x2=_at(tick, span), y1=0, y2="100%", class_="grid") for tick in ticks]
    if zero:
        lines.append(tag("line", x1=_at(0.0, span), x2=_at(0.0, span), y1=0, y2="100%", class_="zero"))
    marks = [_whisker(row, span), _place(row.value, span, row.shape, 4.5)]
    if row.published is not None:
        marks.append(_place(row.published, span, CROSS, 4))
    figures = [number(row.value, digits, sign=zero), _interval(row, zero, digits)]
    return tag(
        "div",
        tag("span", *_breakable(row.name), class_="of strong" if row.strong else "of"),
        tag("svg", *lines, *marks, height=_HEIGHT, aria_hidden="true"),
        tag("span", *figures, class_="figures"),
        class_="row",
    )


def _breakable(name: str) -> list[str]:
    """A name that may go on in the next line after an underscore."""
    parts = name.split("_")
    return [piece for part in parts[:-1] for piece in (f"{part}_", Markup("<wbr>"))] + parts[-1:]


def _whisker(row: Whisker, span: Span) -> Markup | None:
    if row.low is None or row.high is None:
        return None
    y = _HEIGHT / 2
    return tag("line", x1=_at(row.low, span), x2=_at(row.high, span), y1=y, y2=y, class_=f"whisker c{row.shape}")


def _place(value: float, span: Span, shape: int, size: float) -> Markup:
    return tag("svg", draw_marker(0, 0, shape, size), x=_at(value, span), y=_HEIGHT / 2, overflow="visible")


def _interval(row: Whisker, zero: bool, digits: int) -> Markup | None:
    if row.low is None or row.high is None:
        return None
    return tag("small", f" {number(row.low, digits, sign=zero)} to {number(row.high, digits, sign=zero)}")


def _axis(span: Span, ticks: Sequence[float], title: str) -> Markup:
    labels = [tag("text", text, x=_at(tick, span), y=12, text_anchor="middle") for tick, text in tick_texts(ticks)]
    svg = tag("svg", *labels, tag("text", title, x="50%", y=29, text_anchor="middle", class_="title"), height=34)
    return tag("div", svg, class_="row scale", aria_hidden="true")


def _at(value: float, span: Span) -> str:
    return f"{100 * share_of(value, span):.2f}%"
