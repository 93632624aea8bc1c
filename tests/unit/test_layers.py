"""The folder tree says who may import whom (docs/design.md); these tests read every import statement."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
PACKAGE = PROJECT / "personas_tune"

# What each part may import of the package, beside itself. Later entries stand on earlier ones.
MAY_IMPORT = {
    "personas_tune": set(),
    "errors": set(),
    "addresses": set(),
    "schema": set(),
    "workspace": {"personas_tune", "errors"},
    "processes": {"errors"},
    "config": {"errors", "addresses", "schema", "processes"},
    "llm": {"errors", "workspace"},
    "embedding": {"errors", "addresses", "workspace", "llm"},
    "interactions": {"errors", "workspace"},
    "memory": {"errors", "workspace", "llm"},
    "personas": {"errors", "workspace", "embedding"},
    "retrieval": {"errors", "workspace", "embedding"},
    "collaborative": {"errors"},
    "prompts": {"errors", "schema", "workspace"},
    "datasets": {"errors", "schema", "workspace", "prompts", "retrieval"},
    "adapters": {"errors", "schema", "workspace", "prompts", "datasets"},
    "training": {"errors", "schema", "workspace", "processes", "prompts", "datasets", "adapters"},
    "evaluation": {"errors", "schema", "workspace", "prompts", "datasets", "adapters", "training", "collaborative"},
    "export": {"errors", "workspace", "adapters"},
    "agents": {
        "errors",
        "schema",
        "workspace",
        "config",
        "llm",
        "embedding",
        "memory",
        "personas",
        "retrieval",
        "collaborative",
        "prompts",
        "datasets",
        "adapters",
        "training",
        "evaluation",
        "export",
    },
    "report": {"errors", "workspace", "prompts", "datasets", "evaluation"},
    "doctor": {
        "personas_tune",
        "errors",
        "schema",
        "workspace",
        "config",
        "llm",
        "prompts",
        "datasets",
        "adapters",
        "training",
    },
    "cli": {"personas_tune", "errors", "workspace", "config", "memory", "report", "doctor"},
}
PARTS_WITHOUT_TORCH = (
    "llm",
    "embedding",
    "interactions",
    "memory",
    "personas",
    "retrieval",
    "collaborative",
    "prompts",
)
MODULES_WITHOUT_TORCH = (
    "errors", "schema", "workspace", "processes", "config", "cli", "doctor",
    "evaluation.metrics", "evaluation.intervals", "evaluation.baselines",
    "evaluation.prompt_numbers", "evaluation.table", "report.write", "evaluation.comparisons",
    "evaluation.distributions", "evaluation.faithfulness", "evaluation.ordinal_scores",
)  # fmt: skip
TORCH = {"torch", "torchtune", "torchao"}
# Which parts a library has its home in; nobody else imports it.
HOMES = {
    "faiss": {"retrieval"},
    "sklearn": {"embedding", "personas", "evaluation"},
    "sentencepiece": {"training"},
    "tiktoken": {"training"},
    "tokenizers": {"training"},
    "matplotlib": {"personas"},
    "pydantic": {"config", "schema", "memory"},
    "openai": {"llm"},
    "sqlite3": {"llm"},
    "sentence_transformers": {"embedding"},
    "spacy": {"personas"},
    "huggingface_hub": {"export"},
    "peft": set(),  # tests only
    "transformers": set(),
}
KNOWS_CONFIGS = {"config", "doctor", "adapters"}  # may see omegaconf


@dataclass(frozen=True)
class Import:
    """An import statement: the module it stands in, the dotted name it asks for, and whether it runs on import."""

    module: str
    target: str
    on_import: bool


def name_of(file: Path) -> str:
    parts = file.relative_to(PROJECT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}
RECIPES = {file.stem: file for file in sorted((PROJECT / "recipes").glob("*.py"))}


@cache
def imports_of(module: str) -> list[Import]:
    file = {**FILES, **RECIPES}[module]
    return list(_walk(ast.parse(file.read_text(encoding="utf-8")), module, on_import=True))


def _walk(node: ast.AST, module: str, on_import: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(module, name.name, on_import) for name in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"{module} imports relatively"
        for name in node.names:
            below = f"{node.module}.{name.name}"
            yield Import(module, below if below in FILES else str(node.module), on_import)
    elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return
    else:
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from _walk(child, module, on_import and not inside)


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def is_ours(target: str) -> bool:
    return target.split(".")[0] == "personas_tune"


def reached_from(module: str) -> set[str]:
    """Libraries that are imported when ``module`` is: its own imports, those of what it imports, and packages above."""
    libraries: set[str] = set()
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        current = waiting.pop()
        packages = [current.rsplit(".", depth)[0] for depth in range(current.count(".") + 1)]
        for each in packages:
            if each in seen:
                continue
            seen.add(each)
            for found in imports_of(each):
                if found.on_import and is_ours(found.target):
                    waiting.append(found.target)
                elif found.on_import:
                    libraries.add(found.target.split(".")[0])
    return libraries


ALL = [found for module in FILES for found in imports_of(module)]


def test_this_test_sees_the_imports():
    assert len(FILES) > 60
    assert Import("personas_tune.workspace", "personas_tune.errors", True) in ALL
    assert Import("personas_tune.workspace", "pyarrow.parquet", False) in ALL
    assert "torch" in reached_from("personas_tune.evaluation.readouts")
    assert "torch" in reached_from("personas_tune.datasets.source")  # through the package's __init__


def test_every_part_has_its_place_here():
    assert {part_of(module) for module in FILES} == set(MAY_IMPORT)


def test_the_allowed_imports_point_downward_only():
    above = list(MAY_IMPORT)
    for part, allowed in MAY_IMPORT.items():
        assert all(above.index(other) < above.index(part) for other in allowed), part


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_a_part_imports_only_parts_below_it(part):
    found = {each for each in ALL if part_of(each.module) == part and is_ours(each.target)}
    wrong = [each for each in found if part_of(each.target) not in MAY_IMPORT[part] | {part}]
    assert wrong == []


@pytest.mark.parametrize("module", [name for name in FILES if part_of(name) in PARTS_WITHOUT_TORCH])
def test_the_lower_parts_reach_no_torch(module):
    assert not reached_from(module) & TORCH


@pytest.mark.parametrize("name", MODULES_WITHOUT_TORCH)
def test_measuring_and_configs_reach_no_torch(name):
    assert not reached_from(f"personas_tune.{name}") & TORCH


@pytest.mark.parametrize("recipe", ["persona_prepare", "persona_distill", "persona_cluster", "persona_raft"])
def test_the_first_stages_run_without_torch(recipe):
    targets = [each.target for each in imports_of(recipe)]
    reached = set().union(*(reached_from(target) for target in targets if is_ours(target)))
    assert not (reached | {target.split(".")[0] for target in targets}) & TORCH


@pytest.mark.parametrize("library", HOMES)
def test_a_library_is_imported_at_its_home_only(library):
    users = {part_of(each.module) for each in ALL if each.target.split(".")[0] == library}
    assert bool(users) == bool(HOMES[library])
    assert users <= HOMES[library]


def test_no_table_library_beside_arrow_and_numpy():
    assert not {each.target.split(".")[0] for each in ALL} & {"pandas", "polars"}


def test_the_library_knows_nothing_of_recipes():
    assert not {each.target.split(".")[0] for each in ALL} & (set(RECIPES) | {"recipes"})


def test_configs_stay_out_of_the_library():
    users = {part_of(each.module) for each in ALL if each.target.split(".")[0] == "omegaconf"}
    assert users <= KNOWS_CONFIGS
    modules = {each.module for each in ALL if each.target.split(".")[0] == "omegaconf"}
    assert modules <= {"personas_tune.config", "personas_tune.doctor", "personas_tune.adapters.base_model"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_imports_no_other_recipe(recipe):
    assert not {each.target.split(".")[0] for each in imports_of(recipe)} & (set(RECIPES) | {"recipes"})


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_says_what_it_is_for_and_how_it_is_started(recipe):
    docstring = ast.get_docstring(ast.parse(RECIPES[recipe].read_text(encoding="utf-8")))
    assert docstring
    assert f"tune run {recipe} --config " in docstring


def test_importing_the_package_is_light():
    heavy = ["torch", "torchtune", "torchao", "faiss", "sklearn", "scipy", "openai", "pyarrow", "numpy", "omegaconf"]
    code = f"import personas_tune, sys; print([name for name in {heavy} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_the_console_script_lists_without_torch():
    code = (
        "import sys\nfrom personas_tune import cli\n"
        "try:\n    cli.main(['ls'])\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "print([name for name in ('torch', 'torchtune', 'faiss', 'sklearn', 'pyarrow') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"
