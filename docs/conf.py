"""Sphinx reads the Markdown pages as they are on GitHub; the table of contents is made of index.md's links."""

import re
from typing import TYPE_CHECKING

from personas_tune import __version__

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "personas-tune"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["conf.py"]
html_theme = "furo"
html_title = f"{project} {release}"
html_copy_source = False
html_show_copyright = False
highlight_language = "text"

# Links are written for GitHub: anchors as it makes them, .md files by their relative path.
myst_heading_anchors = 4

# Spelt out, numpy's array types fill lines; the link to the source shows them as they are written.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
# Types and errors have no page of their own here; functions, methods and labels that are named must exist.
nitpick_ignore_regex = [("py:(class|exc)", ".*")]


def contents_of(index: str) -> list[tuple[str, list[str]]]:
    """Heading and pages (without suffix) of each section of the index, in its order."""
    sections = re.split(r"^## ", index, flags=re.MULTILINE)[1:]
    return [(section.splitlines()[0], re.findall(r"\]\(([\w/]+)\.md\)", section)) for section in sections]


def _toctree(heading: str, pages: list[str]) -> str:
    return "\n".join(["```{toctree}", ":hidden:", f":caption: {heading}", "", *pages, "```", ""])


def _add_contents(app: "Sphinx", page: str, source: list[str]) -> None:
    """GitHub would show a toctree as code, so it isn't in the file."""
    if page == "index":
        source[0] += "\n" + "\n".join(_toctree(*section) for section in contents_of(source[0]))


def setup(app: "Sphinx") -> None:
    """Called by Sphinx."""
    app.connect("source-read", _add_contents)
