"""The report's kinds of chart: bars in pairs, matrices, lines, a scatter and ranked words."""

from collections.abc import Mapping, Sequence

from personas_tune.report.markup import Markup, number, tag
from personas_tune.report.plots import (
    N_COLOURS,
    Frame,
    Span,
    Ticks,
    draw,
    draw_axes,
    draw_line,
    draw_marker,
    draw_names,
    kept_apart,
    room_for,
    write,
)

Points = Sequence[tuple[float, float]]
_DARK = 0.55  # cells at least so dark have light figures


def draw_pairs(
    labels: Sequence[str], pairs: Mapping[str, Sequence[float]], top: float, *, small: bool = False
) -> Markup:
    """Bars side by side at each label: the first series hollow, the second full.

    Args:
        labels: Below the bars.
        pairs: Shares by series, of which there are two.
        top: Share at the upper end of the axis.
        small: Whether it is one of many.
    """
    size = {"width": 200.0, "height": 120.0, "left": 30.0, "right": 2.0, "bottom": 20.0} if small else {}
    frame = Frame((0, len(labels)), (0, top), **size, top=8)
    every = 2 if small and len(labels) > 6 else 1
    ticks = [(at + 0.5, label) for at, label in enumerate(labels) if (at + 1) % every == 0]
    rises = [(share, f"{100 * share:g}%") for share in _shares_up_to(top)]
    bars = [
        _bar(frame, at + 0.12 + 0.4 * series, 0.36, share, "true" if series == 0 else "simulated", f"{label}: {name}")
        for series, (name, shares) in enumerate(pairs.items())
        for at, (label, share) in enumerate(zip(labels, shares, strict=True))
    ]
    return draw(frame, draw_axes(frame, "" if small else "rating", "", ticks, rises), *bars)


def _shares_up_to(top: float) -> list[float]:
    step = next(step for step in (0.05, 0.1, 0.2, 0.25, 0.5) if top / step <= 5 or step == 0.5)
    return [round(step * at, 2) for at in range(int(top / step + 1e-9) + 1)]


def _bar(frame: Frame, x: float, width: float, share: float, class_: str, name: str) -> Markup:
    (left, bottom), (right, top) = frame.at(x, 0), frame.at(x + width, share)
    told = tag("title", f"{name} {number(100 * share, 1)}%")
    return tag("rect", told, x=left, y=top, width=right - left, height=bottom - top, class_=class_)


def draw_matrix(
    shades: Sequence[Sequence[float | None]],
    texts: Sequence[Sequence[str]],
    row_names: Sequence[str],
    column_names: Sequence[str],
    titles: tuple[str, str],
    marked: Sequence[tuple[int, int]] = (),
) -> Markup:
    """Cells with a figure in each.

    Args:
        shades: How dark each cell is, 0 to 1; None for empty.
        texts: What is printed in each.
        row_names: Left of the rows.
        column_names: Below the columns, of one line or two.
        titles: Of rows and columns.
        marked: Cells with a frame.
    """
    left = 30 + 6.0 * max(map(len, row_names))
    cell = (360 - left - 4) / len(column_names)
    height = min(cell, 46)
    frame = Frame((0, len(column_names)), (len(row_names), 0), 360, 18 + height * len(row_names) + 50, left, 4, 18, 50)
    cells = [
        _cell(frame, row, column, shades[row][column], texts[row][column], (row, column) in marked)
        for row in range(len(row_names))
        for column in range(len(column_names))
    ]
    cells.sort(key=lambda drawn: "marked" in drawn)  # frames lie above their neighbours
    names = [write(left - 6, frame.at(0, at + 0.5)[1] + 3.5, name, "end") for at, name in enumerate(row_names)]
    names += [
        write(frame.at(at + 0.5, 0)[0], frame.height - 36 + 12 * line, part, "middle")
        for at, name in enumerate(column_names)
        for line, part in enumerate(name.split("\n"))
    ]
    names.append(write(0, 10, titles[0], class_="title"))
    names.append(write((left + 356) / 2, frame.height - 6, titles[1], "middle", "title"))
    return draw(frame, *cells, *names)


def _cell(frame: Frame, row: int, column: int, shade: float | None, text: str, marked: bool) -> Markup:
    (left, top), (right, bottom) = frame.at(column, row), frame.at(column + 1, row + 1)
    is_dark = shade is not None and shade >= _DARK
    place = {"x": left + 0.75, "y": top + 0.75, "width": right - left - 1.5, "height": bottom - top - 1.5}
    rect = tag("rect", **place, class_="cell", fill_opacity=0.04 + 0.9 * (shade or 0.0))
    frame_mark = tag("rect", **place, class_="own") if marked else None
    class_ = "in-dark" if is_dark else "in-light"
    figure = write((left + right) / 2, (top + bottom) / 2 + 3.5, text, "middle", class_)
    return tag("g", rect, frame_mark, figure, class_="marked" if marked else None)


def draw_lines(
    frame: Frame,
    series: Mapping[str, Points],
    x_title: str,
    y_title: str,
    *,
    dots: bool = True,
    x_ticks: Ticks | None = None,
    whiskers: Mapping[str, Sequence[tuple[float, float, float]]] | None = None,
) -> Markup:
    """A line a series, named at its end.

    Args:
        frame: The area; its right margin is widened for the names.
        series: Points by name, from left to right.
        x_title: Of the axis.
        y_title: Of the axis.
        dots: Whether points have markers.
        x_ticks: Values with their texts; round numbers for None.
        whiskers: By name, x with the lower and upper end of an interval.
    """
    frame = Frame(frame.x, frame.y, right=max(12.0, room_for(list(series))))
    marks = []
    for at, (name, points) in enumerate(series.items()):
        marks += [_draw_whisker(frame, at, *ends) for ends in (whiskers or {}).get(name, ())]
        marks.append(draw_line(frame, points, at))
        marks += [draw_marker(*frame.at(*point), at, 3.2) for point in (points if dots else points[-1:])]
    ends = [(*points[-1], name, at) for at, (name, points) in enumerate(series.items())]
    return draw(frame, draw_axes(frame, x_title, y_title, x_ticks), *marks, draw_names(frame, ends))


def _draw_whisker(frame: Frame, series: int, x: float, low: float, high: float) -> Markup:
    (place, bottom), (_, top) = frame.at(x, low), frame.at(x, high)
    return tag("line", x1=place, x2=place, y1=bottom, y2=top, class_=f"whisker c{series % N_COLOURS}")


def draw_curve(
    x: Span,
    y: Span,
    points: Points,
    titles: tuple[str, str],
    chosen: Mapping[str, float],
    x_ticks: Ticks,
) -> Markup:
    """One line, with chosen places on the x axis named."""
    frame = Frame(x, y)
    marks = [draw_axes(frame, *titles, x_ticks)]
    for name, at in chosen.items():
        place, bottom = frame.at(at, y[0])
        marks.append(tag("line", x1=place, x2=place, y1=frame.top - 14, y2=bottom, class_="zero"))
        anchor = "start" if place < 200 else "end"
        marks.append(write(place + (5 if anchor == "start" else -5), frame.top - 5, name, anchor, "strong"))
    marks += [draw_line(frame, points, 0), *(draw_marker(*frame.at(*point), 0, 3.2) for point in points)]
    return draw(frame, *marks)


def draw_map(points: Mapping[str, Points]) -> Markup:
    """Points of several groups, each with its own marker and its name at the group's middle."""
    xs = [x for group in points.values() for x, _ in group]
    ys = [y for group in points.values() for _, y in group]
    frame = Frame(_room(xs), _room(ys), height=300, left=8, right=8, top=8, bottom=8)
    size = 4.0 if len(xs) < 400 else 2.5
    marks = [
        draw_marker(*frame.at(x, y), at, size, f"persona {name}")
        for at, (name, group) in enumerate(points.items())
        for x, y in group
    ]
    middles = [
        frame.at(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group))
        for group in points.values()
    ]
    names = [
        write(x, y + 7, name, "middle", "big") for name, (x, y) in zip(points, kept_apart(middles, 22), strict=True)
    ]
    outline = tag("rect", x=0.5, y=0.5, width=frame.width - 1, height=frame.height - 1, class_="outline")
    return draw(frame, outline, *marks, *names)


def _room(values: Sequence[float]) -> Span:
    low, high = min(values), max(values)
    room = 0.05 * (high - low) or 1.0
    return low - room, high + room


def draw_ranked(words: Sequence[tuple[str, float, str]], series: int) -> Markup:
    """Words by falling score, each with a bar and what a pointer is told; rows as high as the text."""
    top = max((score for _, score, _ in words), default=1.0) or 1.0
    rows = []
    for word, score, told in words:
        bar = tag("span", style=f"width:{100 * max(score, 0.0) / top:.1f}%", class_=f"bar b{series % N_COLOURS}")
        rows.append(tag("li", tag("span", word, class_="word"), tag("span", bar, class_="track"), title=told))
    return tag("ol", *rows, class_="ranked")
