"""HTML and SVG as nested calls; whatever isn't markup already is escaped."""

from collections.abc import Iterable
from html import escape
from unicodedata import bidirectional, category

_TURNING = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}  # change the order of what follows


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Child = str | None


def tag(name: str, *children: Child, **attributes: object) -> Markup:
    """An element.

    Args:
        name: Of the element.
        children: Its content: markup as it is, other texts escaped, None left out.
        attributes: A trailing underscore is dropped, others become hyphens; None is left out, floats are rounded
            to hundredths.

    Example:
        >>> tag("p", "a < b", tag("b", "!"), class_="note")
        '<p class="note">a &lt; b<b>!</b></p>'
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_clean(_attribute(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{written}>{join(children)}</{name}>")


def join(children: Iterable[Child]) -> Markup:
    """Children one after the other, escaped where they aren't markup."""
    return Markup("".join(clean(child) for child in children if child is not None))


def clean(text: str) -> Markup:
    """Escaped text without control characters, halves of letters and marks that turn text; markup stays as it is."""
    return text if isinstance(text, Markup) else _clean(text)


def _clean(text: str) -> Markup:
    return Markup(escape("".join(letter for letter in text if _is_readable(letter))))


def _is_readable(letter: str) -> bool:
    if letter.isprintable() or letter in "\n\t":
        return True
    return category(letter) not in ("Cc", "Cs") and bidirectional(letter) not in _TURNING


def number(value: float | None, digits: int = 3, *, sign: bool = False) -> str:
    """A figure with a fixed number of decimals and a true minus; a dash where there is none."""
    if value is None:
        return "\N{EN DASH}"
    rounded = round(value, digits) + 0.0  # no -0.000
    return f"{rounded:{'+' if sign else ''}.{digits}f}".replace("-", "\N{MINUS SIGN}")


def percent(share: float | None, digits: int = 0) -> str:
    """A share in percent."""
    return number(share, digits) if share is None else f"{number(100 * share, digits)}%"


def count(n: int, noun: str) -> str:
    """A number of things, thousands apart.

    Example:
        >>> count(1, "user"), count(6757, "row")
        ('1 user', '6,757 rows')
    """
    return f"{n:,} {noun}" + ("" if n == 1 else "s")


def _attribute(value: object) -> str:
    return f"{round(value, 2) + 0.0:g}" if isinstance(value, float) else str(value)
