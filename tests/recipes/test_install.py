"""The wheel: all that is bundled is in it, and it runs from another folder with nothing of the sources."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from personas_tune.cli import RECIPES

ROOT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "recipes", "configs", "personas_tune")
TESTED = """
import persona_lora, personas_tune, personas_tune.configs
from personas_tune.cli import main
print(persona_lora.__file__, personas_tune.__file__, personas_tune.configs.__file__, sep="\\n")
main(["ls"])
"""

pytestmark = pytest.mark.slow


def pip(*words: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def can_build_offline() -> bool:
    try:
        return int(version("setuptools").partition(".")[0]) >= 77
    except PackageNotFoundError:
        return False


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is left in the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(source, folder)
    isolation = ["--no-build-isolation"] if can_build_offline() else []
    pip("wheel", "--no-deps", *isolation, "--wheel-dir", folder / "dist", folder)
    (built,) = (folder / "dist").glob("personas_tune-*.whl")
    return built


def test_the_wheel_holds_recipes_package_configs_bases_and_nothing_else(wheel: Path) -> None:
    def below(folder: str, place: str) -> set[str]:
        files = (path for path in (ROOT / folder).rglob("*") if path.is_file())
        kept = (path for path in files if path.suffix != ".pyc" and ".egg-info" not in str(path))
        return {f"{place}{path.relative_to(ROOT / folder)}" for path in kept}

    expected = (
        below("recipes", "") | below("configs", "personas_tune/configs/") | below("personas_tune", "personas_tune/")
    )
    assert {f"{recipe}.py" for recipe in RECIPES} | {"personas_tune/py.typed"} <= expected
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == expected


def test_an_installed_wheel_runs_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    pip("install", "--no-deps", "--target", target, wheel)
    elsewhere.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", TESTED],
        cwd=elsewhere, env={**os.environ, "PYTHONPATH": str(target)}, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    places, _, listing = done.stdout.partition("RECIPES")
    assert all(place.startswith(str(target)) for place in places.splitlines())
    for name in [*RECIPES, *(path.name for path in (ROOT / "configs").glob("*.yaml"))]:
        assert f"  {name} " in listing
    assert (target / "bin" / "personas-tune").is_file()
