"""The report in a real browser: it renders whole, light and dark, wide and narrow, and asks for nothing."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from evaluated import write_evaluated
from PIL import Image

from personas_tune.report.write import build_comparison, build_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser: {', '.join(BROWSERS)}")

DARK, LIGHT = 0, 1  # as --blink-settings=preferredColorScheme counts
WIDE, NARROW = 1400, 380

# The page's own policy forbids scripts: what measures runs in a copy without the policy.
MEASURE = """<script>
addEventListener('load', () => {
  const box = element => { const b = element.getBoundingClientRect(); return [b.x, b.y + scrollY, b.width, b.height]; };
  const figures = Object.fromEntries([...document.querySelectorAll('figure')].map(f => [f.id, box(f)]));
  const drawn = Object.fromEntries([...document.querySelectorAll('figure svg:not(svg svg)')].map((s, i) =>
    [s.closest('figure').id + ' ' + i, box(s).slice(2)]));
  const told = {figures, drawn, width: document.documentElement.scrollWidth, inner: innerWidth,
    height: document.documentElement.scrollHeight, dark: matchMedia('(prefers-color-scheme: dark)').matches};
  (window === parent ? write : message => parent.postMessage(message, '*'))(JSON.stringify(told));
});
function write(text) {
  document.body.append(Object.assign(document.createElement('pre'), {id: 'told', textContent: text}));
}
addEventListener('message', event => write(event.data));
</script>"""


class Look(NamedTuple):
    """What the browser said: standard output, and the page's messages on its console."""

    out: str
    console: list[str]


def look_at(page: Path, folder: Path, scheme: int, size: tuple[int, int], *wanted: str) -> Look:
    """Open a page in a browser with a profile of its own and no network."""
    profile = folder / f"profile_{len(list(folder.glob('profile_*')))}"
    options = [
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
        "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--v=0",
        f"--user-data-dir={profile}", f"--blink-settings=preferredColorScheme={scheme}",
        f"--window-size={size[0]},{size[1]}",
    ]  # fmt: skip
    command = [str(BROWSER), *options, *wanted, page.as_uri()]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return Look(ran.stdout, [line for line in ran.stderr.splitlines() if "CONSOLE" in line])


def measure(page: Path, folder: Path, scheme: int, width: int) -> dict[str, Any]:
    """Sizes of all figures; in a frame of that width, because a window is never narrower than 500 pixels."""
    copy = folder / f"measured_{page.name}"
    without_policy = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text(encoding="utf-8"))
    copy.write_text(without_policy.replace("</body>", f"{MEASURE}</body>"), encoding="utf-8")
    if width < 500:
        frame = folder / f"frame_{page.name}"
        iframe = f'<iframe src="{copy.name}" style="border:0;width:{width}px;height:900px"></iframe>'
        frame.write_text(
            f'<meta name="color-scheme" content="light dark"><body>{MEASURE}{iframe}</body>', encoding="utf-8"
        )
        copy = frame
    seen = look_at(copy, folder, scheme, (width, 900), "--virtual-time-budget=3000", "--dump-dom")
    told = re.search(r'<pre id="told">(\{"figures":\{"\w.*?)</pre>', seen.out)
    assert told is not None, seen.out[-2000:]
    measured: dict[str, Any] = json.loads(html.unescape(told[1]))
    return measured


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("browser")


@pytest.fixture(scope="module")
def page(folder: Path) -> Path:
    write_evaluated(folder / "other", skill=0.5)
    return build_report(write_evaluated(folder / "run").root)


@pytest.fixture(scope="module")
def wide(page: Path, folder: Path) -> dict[str, Any]:
    return measure(page, folder, LIGHT, WIDE)


@pytest.fixture(scope="module")
def comparison(page: Path, folder: Path) -> Path:
    return build_comparison(folder / "run", folder / "other")


def figure_ids(page: Path) -> set[str]:
    return set(re.findall(r'<figure id="([\w-]+)"', page.read_text(encoding="utf-8")))


def assert_all_drawn(measured: dict[str, Any], ids: set[str], width: int) -> None:
    assert measured["inner"] == width
    assert measured["width"] <= width, "the page is wider than the window"
    assert set(measured["figures"]) == ids
    for name, (x, _, figure_width, height) in measured["figures"].items():
        assert x >= 0, name
        assert x + figure_width <= width, name
        assert figure_width > 150, name
        assert height > 50, name
    assert measured["drawn"]
    assert all(w > 100 and h > 20 for w, h in measured["drawn"].values())


def test_every_figure_has_its_place_on_a_wide_page(wide: dict[str, Any], page: Path) -> None:
    assert len(figure_ids(page)) == 20
    assert_all_drawn(wide, figure_ids(page), WIDE)
    assert wide["dark"] is False


@pytest.mark.parametrize("which", ["report", "comparison"])
def test_a_narrow_page_shows_the_same_and_doesn_t_scroll_sideways(
    page: Path, comparison: Path, folder: Path, which: str
) -> None:
    shown = page if which == "report" else comparison
    narrow = measure(shown, folder, DARK, NARROW)
    assert_all_drawn(narrow, figure_ids(shown), NARROW)
    assert narrow["dark"] is True


@pytest.mark.parametrize(("scheme", "paper"), [(LIGHT, range(230, 256)), (DARK, range(0, 60))])
def test_figures_are_painted_and_the_console_stays_empty(
    page: Path, folder: Path, wide: dict[str, Any], scheme: int, paper: range
) -> None:
    assert_painted(page, wide, folder, scheme, paper)


def test_a_comparison_is_painted_and_its_console_stays_empty(comparison: Path, folder: Path) -> None:
    measured = measure(comparison, folder, LIGHT, WIDE)
    assert_all_drawn(measured, figure_ids(comparison), WIDE)
    assert_painted(comparison, measured, folder, LIGHT, range(230, 256))


def assert_painted(page: Path, measured: dict[str, Any], folder: Path, scheme: int, paper: range) -> None:
    picture = folder / f"{page.stem}_{scheme}.png"
    seen = look_at(page, folder, scheme, (WIDE, int(measured["height"]) + 1), f"--screenshot={picture}")
    assert seen.console == []
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    assert pixels.shape[1] == WIDE
    assert set(pixels[2, 2].tolist()) <= set(paper)
    colours = pixels.astype(np.int64) @ (65536, 256, 1)
    for name, (x, y, width, height) in measured["figures"].items():
        region = colours[int(y) : int(y + height), int(x) : int(x + width)]
        found, counts = np.unique(region, return_counts=True)
        assert len(found) > 20, f"{name} is blank"
        assert counts.max() < 0.995 * region.size, f"{name} is all but blank"


def test_what_the_policy_forbids_would_be_seen_on_the_console(page: Path, folder: Path) -> None:
    bad = folder / "bad.html"
    added = '<img src="https://example.org/x.png"><script>alert(1)</script></body>'
    bad.write_text(page.read_text(encoding="utf-8").replace("</body>", added), encoding="utf-8")
    seen = look_at(bad, folder, LIGHT, (WIDE, 600), "--dump-dom")
    assert sum("Content Security Policy" in line for line in seen.console) >= 2
