"""What all charts are drawn with: a frame, its axes, lines, markers and labels, as inline SVG.

Colours come from the page's style (classes ``c0`` to ``c7``), so one drawing serves light and dark. Nothing is told
by colour alone: series also differ in marker and dash and are named where they end.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from personas_tune.report.markup import Child, Markup, tag

N_COLOURS = 8
_DASHES = (None, "6 3", "2 2", "8 3 2 3", "1 3", "10 4", "4 4", "3 2 1 2")
_LETTER = 5.9  # mean width of a letter in the charts' text size
_STEPS = (1, 2, 2.5, 5, 10)

_RINGS = range(0, 120, 6)
_ANGLES = [math.pi * each / 6 for each in range(12)]

Span = tuple[float, float]
Ticks = Sequence[tuple[float, str]]
Point = tuple[float, float]


@dataclass(frozen=True)
class Frame:
    """A chart's area and what its axes run over.

    Args:
        x: Values at the left and right end.
        y: Values at the bottom and top.
        width: In units of about a pixel, as are the others.
        height: With both margins.
        left: Margin for the labels of the y axis.
        right: Margin for names at the ends of lines.
        top: Margin for the title of the y axis.
        bottom: Margin for the labels of the x axis.
    """

    x: Span
    y: Span
    width: float = 360
    height: float = 240
    left: float = 40
    right: float = 12
    top: float = 26
    bottom: float = 38

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a value lies in the drawing."""
        return (
            self.left + (self.width - self.left - self.right) * share_of(x, self.x),
            self.height - self.bottom - (self.height - self.top - self.bottom) * share_of(y, self.y),
        )


def share_of(value: float, span: Span) -> float:
    """Where in a span a value lies, 0 to 1."""
    low, high = span
    return 0.5 if high == low else (value - low) / (high - low)


def ticks_in(span: Span, n: int = 5) -> list[float]:
    """About ``n`` round values within a span.

    Example:
        >>> ticks_in((0.83, 1.12), 4)
        [0.9, 1.0, 1.1]
    """
    low, high = span
    if high <= low:
        return [low]
    rough = (high - low) / n
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * each for each in _STEPS if power * each >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(place * step, 10) for place in range(first, last + 1)]


def padded(values: Sequence[float], share: float = 0.06) -> Span:
    """The span of some values with room at both ends."""
    low, high = min(values), max(values)
    room = (high - low) * share or abs(high) * share or 1.0
    return low - room, high + room


def tick_texts(ticks: Sequence[float]) -> list[tuple[float, str]]:
    """Values on an axis with their texts, all with as many decimals as one of them needs."""
    digits = max((len(f"{tick:.6f}".rstrip("0").partition(".")[2]) for tick in ticks), default=0)
    return [(tick, f"{tick:,.{digits}f}".replace("-", "\N{MINUS SIGN}")) for tick in ticks]


def draw(frame: Frame, *marks: Child) -> Markup:
    """A chart; its figure tells readers without sight what it shows."""
    size = f"0 0 {frame.width:g} {frame.height:g}"
    return tag("svg", *marks, viewBox=size, class_="chart", aria_hidden="true")


def draw_axes(
    frame: Frame,
    x_title: str,
    y_title: str,
    x_ticks: Ticks | None = None,
    y_ticks: Ticks | None = None,
) -> Markup:
    """Both axes with light lines across; ticks are values with their texts, round numbers for None."""
    across = y_ticks if y_ticks is not None else tick_texts(ticks_in(frame.y))
    along = x_ticks if x_ticks is not None else tick_texts(ticks_in(frame.x))
    (left, bottom), (right, _) = frame.at(frame.x[0], frame.y[0]), frame.at(frame.x[1], frame.y[0])
    marks = []
    for value, label in across:
        _, y = frame.at(frame.x[0], value)
        marks.append(tag("line", x1=left, x2=right, y1=y, y2=y, class_="grid"))
        marks.append(write(left - 6, y + 3.5, label, "end"))
    for value, label in along:
        x, _ = frame.at(value, frame.y[0])
        marks.append(tag("line", x1=x, x2=x, y1=bottom, y2=bottom + 4, class_="axis"))
        marks.append(write(x, bottom + 15, label, "middle"))
    marks.append(tag("line", x1=left, x2=right, y1=bottom, y2=bottom, class_="axis"))
    marks.append(write((left + right) / 2, frame.height - 5, x_title, "middle", "title"))
    marks.append(write(4, 11, y_title, class_="title"))
    return tag("g", *marks)


def write(x: float, y: float, text: str, anchor: str = "start", class_: str | None = None) -> Markup:
    """A line of text in a chart."""
    return tag("text", text, x=x, y=y, text_anchor=None if anchor == "start" else anchor, class_=class_)


def draw_line(frame: Frame, points: Sequence[tuple[float, float]], series: int) -> Markup:
    """Points joined by the line of a series."""
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in (frame.at(*point) for point in points))
    dash = _DASHES[series % len(_DASHES)]
    return tag("polyline", points=places, class_=f"line c{series % N_COLOURS}", stroke_dasharray=dash)


def draw_marker(x: float, y: float, series: int, size: float = 4, title: str | None = None) -> Markup:
    """A series' marker: of eight shapes, full for the first eight series and hollow for the next."""
    hollow = " hollow" if series // N_COLOURS % 2 else ""
    path = _SHAPES[series % len(_SHAPES)].format(s=f"{size:g}", t=f"{2 * size:g}", h=f"{size * 0.6:g}")
    told = None if title is None else tag("title", title)
    place = f"translate({x:.1f} {y:.1f})"
    return tag("path", told, d=path, transform=place, class_=f"mark c{series % N_COLOURS}{hollow}")


_SHAPES = (
    "M-{s} 0a{s} {s} 0 1 0 {t} 0a{s} {s} 0 1 0 -{t} 0z",  # circle
    "M-{s} -{s}h{t}v{t}h-{t}z",  # square
    "M0 -{s}L{s} {s}H-{s}z",  # triangle
    "M0 -{s}L{s} 0L0 {s}L-{s} 0z",  # diamond
    "M-{s} -{s}H{s}L0 {s}z",  # triangle, point down
    "M-{s} -{s}L{s} {s}M{s} -{s}L-{s} {s}",  # cross
    "M0 -{s}V{s}M-{s} 0H{s}",  # plus
    "M-{h} -{s}H{h}L{s} 0L{h} {s}H-{h}L-{s} 0z",  # hexagon
)


def draw_names(frame: Frame, ends: Sequence[tuple[float, float, str, int]]) -> Markup:
    """Names right of where lines end (x, y, name, series), moved apart where they would overlap."""
    x = max(frame.at(end[0], end[1])[0] for end in ends) + 7
    placed = sorted((frame.at(end[0], end[1])[1], end[2], end[3]) for end in ends)
    heights = moved_apart([place[0] for place in placed], 12, frame.top + 4, frame.height - frame.bottom)
    named = zip(heights, placed, strict=True)
    return tag("g", *(write(x, y + 3.5, name, class_=f"name c{series % N_COLOURS}") for y, (_, name, series) in named))


def room_for(names: Sequence[str]) -> float:
    """The right margin that names at the ends of lines need."""
    return 14 + _LETTER * max(map(len, names))


def moved_apart(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Rising places at least ``gap`` apart, moved as little as a pass down and a pass up allow."""
    moved = list(places)
    for index in range(len(moved)):
        moved[index] = max(moved[index], low if index == 0 else moved[index - 1] + gap)
    for index in reversed(range(len(moved))):
        moved[index] = min(moved[index], high if index == len(moved) - 1 else moved[index + 1] - gap)
    return moved


def kept_apart(places: Sequence[Point], gap: float) -> list[Point]:
    """Each place, or the nearest one on rings around it that is ``gap`` away from those before it."""
    kept: list[Point] = []
    for x, y in places:
        tried = ((x + r * math.cos(a), y + r * math.sin(a)) for r in _RINGS for a in _ANGLES)
        free = (place for place in tried if all(math.dist(place, other) >= gap for other in kept))
        kept.append(next(free, (x, y)))
    return kept
