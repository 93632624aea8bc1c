"""Who may import whom: downward only, and nothing heavy on the ground floor (docs/design.md)."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "personas_tune"

# Each folder may import from floors below its own, and from the modules beside the folders.
FLOORS = (
    {"embedding"},
    {"interactions", "memory", "personas", "retrieval"},
    {"prompts"},
    {"datasets"},
    {"adapters"},
    {"training"},
    {"evaluation"},
)
FOLDERS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
GROUND = {"errors", "workspace", "schema", "config"}
WITHOUT_TORCH = {"embedding", "interactions", "memory", "personas", "retrieval", "prompts"}
HOMES = {"faiss": {"retrieval"}, "torchtune": {"datasets", "adapters", "training", "evaluation"}, "openai": {"llm"}}


def imports_of(source: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def imports_of_folder(folder: str) -> dict[str, set[str]]:
    return {str(path.relative_to(ROOT)): set(imports_of(path)) for path in sorted((PACKAGE / folder).rglob("*.py"))}


def floor_of(folder: str) -> int:
    return next(number for number, floor in enumerate(FLOORS) if folder in floor)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_from_lower_floors_only(folder: str) -> None:
    for path, imports in imports_of_folder(folder).items():
        for name in imports:
            top, _, rest = name.partition(".")
            other = rest.partition(".")[0]
            if top != "personas_tune" or other in {"", folder} | GROUND:
                continue
            assert floor_of(other) < floor_of(folder), f"{path} imports {name}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_heavy_libraries_stay_at_home(folder: str) -> None:
    for path, imports in imports_of_folder(folder).items():
        for library in {name.partition(".")[0] for name in imports}:
            assert folder in HOMES.get(library, {folder}), f"{path} imports {library}"
            assert library != "torch" or folder not in WITHOUT_TORCH, f"{path} imports torch"


def test_recipes_never_import_each_other_and_nobody_imports_recipes() -> None:
    recipes = {path.stem for path in (ROOT / "recipes").glob("*.py")}
    for path in [*(ROOT / "recipes").glob("*.py"), *PACKAGE.rglob("*.py")]:
        assert not recipes & set(imports_of(path)), path


def test_importing_the_package_and_its_ground_floor_imports_no_heavy_library() -> None:
    script = (
        "import sys, personas_tune, personas_tune.config, personas_tune.workspace, personas_tune.cli\n"
        "print(*sorted({'torch', 'torchtune', 'faiss', 'openai', 'sklearn', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_a_forbidden_import_would_be_found(tmp_path: Path) -> None:
    source = tmp_path / "module.py"
    source.write_text("import torch.nn\ndef f():\n    from personas_tune.training.fit import train_bank\n")
    assert set(imports_of(source)) == {"torch.nn", "personas_tune.training.fit"}
    assert floor_of("training") > floor_of("prompts")
