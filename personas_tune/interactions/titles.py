"""Film titles as MovieLens writes them."""

import re

_YEAR = re.compile(r"\s*\((\d{4})(?:\s*[-–]\s*\d{0,4})?\)\s*$")
_ARTICLES = "The|A|An|Les|Le|La|L'|El|Los|Las|Il|Das|Der|Die"
_TRAILING_ARTICLE = re.compile(rf"^([^(]+), ({_ARTICLES})(?=$| \()")


def split_title(text: str) -> tuple[str, int | None]:
    """A title in its natural order, and the year that stood behind it.

    Example:
        >>> split_title("Big Lebowski, The (1998)")
        ('The Big Lebowski', 1998)
        >>> split_title("Babylon 5")
        ('Babylon 5', None)
    """
    text = text.strip()
    found = _YEAR.search(text)
    if found is None or found.start() == 0:
        return _in_natural_order(text), None
    return _in_natural_order(text[: found.start()]), int(found[1])


def _in_natural_order(title: str) -> str:
    def move(found: re.Match[str]) -> str:
        name, article = found.groups()
        return f"{article}{name}" if article.endswith("'") else f"{article} {name}"

    return _TRAILING_ARTICLE.sub(move, title)
