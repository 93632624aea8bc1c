"""The documentation as a site: it builds without a warning, and its table of contents has every page."""

import re
import runpy
import shutil
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = {str(page.relative_to(DOCS).with_suffix("")): page for page in sorted(DOCS.glob("**/*.md"))}
CONF = runpy.run_path(str(DOCS / "conf.py"))
INDEX = PAGES["index"].read_text(encoding="utf-8")

needs_sphinx = pytest.mark.skipif(
    not all(map(find_spec, ("sphinx", "myst_parser", "furo"))), reason="the docs extra is not installed"
)


def build(docs: Path, out: Path) -> tuple[int, str]:
    """Build as `make docs` does; gives the exit status and what was printed."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    flags = re.findall(r"python -m sphinx (.*) -d \S+ docs build/docs", makefile)[0].split()
    words = [sys.executable, "-m", "sphinx", *flags, "-d", out / "trees", docs, out / "html"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, done.stdout + done.stderr


@needs_sphinx
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    status, printed = build(DOCS, tmp_path)
    assert status == 0, printed
    assert {str(page.relative_to(tmp_path / "html").with_suffix("")) for page in tmp_path.glob("html/**/*.html")} > {
        *PAGES
    }
    contents = re.findall(r'href="([\w/]+)\.html"', (tmp_path / "html" / "index.html").read_text(encoding="utf-8"))
    assert set(contents) >= {*PAGES} - {"index"}


@needs_sphinx
@pytest.mark.parametrize(
    "mistake",
    ["[a](nothing.md)", "[a](page.md#no-such-heading)", "```{eval-rst}\n.. autofunction:: personas_tune.nothing\n```"],
    ids=["page", "heading", "function"],
)
def test_what_a_page_names_must_exist(mistake: str, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    shutil.copy(DOCS / "conf.py", docs)
    (docs / "index.md").write_text("# A\n\n## B\n\n[a page](page.md)\n", encoding="utf-8")
    (docs / "page.md").write_text(f"# C\n\n{mistake}\n", encoding="utf-8")
    status, printed = build(docs, tmp_path)
    assert status == 1
    assert printed.count("WARNING:") == 1


def test_the_contents_follow_the_index_section_by_section() -> None:
    index = "# Top\n[not](this.md)\n## First\n* [a](a.md): and [b](c/b.md)\n## Next\n| [d](d.md) |\n"
    assert CONF["contents_of"](index) == [("First", ["a", "c/b"]), ("Next", ["d"])]


def test_every_page_is_in_the_contents_once() -> None:
    contents = [page for _, pages in CONF["contents_of"](INDEX) for page in pages]
    assert Counter(contents) == Counter({*PAGES} - {"index"})


@pytest.mark.parametrize("name", PAGES)
def test_headings_of_a_page_are_unique_and_the_first_is_its_title(name: str) -> None:
    text = re.sub(r"^```.*?^```", "", PAGES[name].read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^(#+) (.+)$", text, flags=re.MULTILINE)
    assert [level for level, _ in headings].count("#") == 1
    assert headings[0][0] == "#"
    repeated = [heading for heading, count in Counter(heading.lower() for _, heading in headings).items() if count > 1]
    assert not repeated
