"""What README and docs say exists: links, commands, keys, defaults, and all that we take from torchtune."""

import ast
import inspect
import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from personas_tune.cli import RECIPES
from personas_tune.config import bundled_configs, load_experiment
from personas_tune.schema import Component, Experiment

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
CONFIGS = sorted(ROOT.glob("configs/*.yaml"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")

page_by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """A heading's anchor as GitHub makes it: lower case, spaces to hyphens, punctuation gone."""
    headings = re.findall(r"^#+ (.+)$", without_code(read(page)), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@page_by_page
def test_every_relative_link_leads_to_a_file_and_heading(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(read(page))):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.is_relative_to(ROOT), target
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def test_every_page_can_be_reached_from_the_index() -> None:
    reached, waiting = set(), [ROOT / "docs" / "index.md"]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        links = re.findall(r"\]\(([^)#\s:]+\.md)", read(page))
        waiting += [target for link in links if (target := (page.parent / link).resolve()) not in {*reached, *waiting}]
    assert {page for page in PAGES if page.is_relative_to(ROOT / "docs")} <= reached


def shell_lines(text: str) -> Iterator[str]:
    """Lines of code blocks and inline code, continued lines joined; comment marks of a YAML's head are taken off."""
    joined = re.sub(r"\\\n[# ]*", " ", text)
    for block in re.findall(r"```\w*\n(.*?)```", joined, flags=re.DOTALL):
        yield from block.splitlines()
    yield from re.findall(r"`([^`\n]+)`", joined)
    yield from (line.removeprefix("#").strip() for line in joined.splitlines() if line.startswith("#  "))


def tune_commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """Recipe and arguments of each `tune run persona_*` command."""
    for line in shell_lines(text):
        words = shlex.split(line, comments=True) if "tune run" in line and line.count("'") % 2 == 0 else []
        recipe = next((word for word in words[2:] if word.startswith("persona_")), None)
        if words[:2] == ["tune", "run"] and recipe is not None:
            yield recipe, words[words.index(recipe) + 1 :]


@pytest.mark.parametrize("page", [*PAGES, *CONFIGS], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_names_a_recipe_and_a_config_and_sets_known_keys(page: Path) -> None:
    copied = dict(re.findall(r"personas-tune cp (\S+\.yaml) (\w\S*\.yaml)", read(page)))
    own = {copy: original for original, copy in copied.items()}
    for recipe, arguments in tune_commands(read(page)):
        assert recipe in RECIPES
        assert arguments[:1] == ["--config"], arguments
        config = own.get(arguments[1], arguments[1])
        assert config in bundled_configs(), config
        overrides = [word for word in arguments[2:] if not word.startswith("$")]
        load_experiment(config, overrides)


def test_the_pages_do_hold_commands() -> None:
    commands = [recipe for page in PAGES for recipe, _ in tune_commands(read(page))]
    assert set(commands) == set(RECIPES)


def schema_keys(model: type[BaseModel] = Experiment, prefix: str = "") -> dict[str, FieldInfo]:
    """Every dotted key with its field; NAME stands for a name that the user gives."""
    keys = {}
    for name, field in model.model_fields.items():
        keys[f"{prefix}{name}"] = field
        for kind in kinds_of(field):
            below = f"{prefix}{name}."
            if get_origin(kind) is dict:
                kind, below = get_args(kind)[1], f"{below}NAME."
            if inspect.isclass(kind) and issubclass(kind, BaseModel):
                keys |= schema_keys(kind, below)
    return keys


def kinds_of(field: FieldInfo) -> tuple[Any, ...]:
    is_union = get_origin(field.annotation) in (Union, UnionType)
    return get_args(field.annotation) if is_union else (field.annotation,)


def keys_of(node: Any, prefix: str = "") -> set[str]:
    if not isinstance(node, dict):
        return set()
    found = set()
    for name, value in node.items():
        found |= {f"{prefix}{name}", *keys_of(value, f"{prefix}{name}.")}
    return found


KEYS = schema_keys()
COMPONENTS = {key for key, field in KEYS.items() if Component in kinds_of(field)}
KEYS_IN_CONFIGS = {key for config in CONFIGS for key in keys_of(yaml.safe_load(read(config)))}


def is_known(key: str) -> bool:
    """Whether the schema has a key; a component's own keys count when a bundled config has them."""
    in_component = any(key.startswith(f"{name}.") for name in COMPONENTS) and key in KEYS_IN_CONFIGS
    return key in KEYS or in_component or key.rpartition(".")[0] == "data.columns"


def knob_rows(page: Path) -> Iterator[dict[str, str]]:
    """The rows of the table under the heading Knobs, cells by column."""
    _, _, section = read(page).partition("\n## Knobs\n")
    rows = [line for line in section.partition("\n## ")[0].splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]
    for row in cells[2:]:
        yield dict(zip(cells[0], row, strict=True))


def written(value: Any) -> str:
    """A value as YAML has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, int | float) else str(value)


RECIPE_PAGES = sorted(ROOT.glob("docs/recipes/*.md"))


@pytest.mark.parametrize("page", RECIPE_PAGES, ids=lambda page: page.stem)
def test_knobs_are_keys_of_the_schema_and_their_defaults_are_its_defaults(page: Path) -> None:
    rows = list(knob_rows(page))
    assert rows
    for row in rows:
        keys = re.findall(r"`([^`]+)`", row["key"])
        assert keys, row
        for key in keys:
            assert is_known(key), key
            if row.get("default") and key in KEYS:
                assert row["default"] == written(KEYS[key].get_default(call_default_factory=True)), key


SECTIONS = "data|distill|personas|retrieval|prompt|training|evaluation|base_training"


@page_by_page
def test_keys_named_in_passing_are_known_too(page: Path) -> None:
    named = re.findall(rf"`((?:{SECTIONS})(?:\.\w+)+)(?=[`=:])", without_code(read(page)))
    unknown = [key for key in named if not is_known(key) and not key.endswith((".parquet", ".json"))]
    assert not unknown


def test_a_mistyped_key_would_be_found() -> None:
    wrong = ["personas.kk", "optimizer.learning_rat", "adapter_sets.NAME.pre", "epochs.more", "nothing"]
    assert not any(map(is_known, wrong))
    assert all(map(is_known, ["personas.k", "optimizer.lr", "adapter_sets.NAME.per", "data.cohort.n_users"]))


def test_every_recipe_has_a_page() -> None:
    assert {page.stem for page in RECIPE_PAGES} == set(RECIPES)


@pytest.mark.parametrize("page", RECIPE_PAGES, ids=lambda page: page.stem)
def test_a_recipes_page_has_its_command_its_knobs_and_what_it_takes(page: Path) -> None:
    assert page.stem in {recipe for recipe, _ in tune_commands(read(page))}
    assert {"Knobs", "Time"} <= set(re.findall(r"^## (\w+)", read(page), flags=re.MULTILINE))


def names_from_torchtune(source: str) -> set[str]:
    """All that a module takes from torchtune: imports, attributes of imported modules, dotted strings."""
    tree = ast.parse(source)
    names, modules = set(), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torchtune":
            for alias in node.names:
                names.add(f"{node.module}.{alias.name}")
                modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.split(".")[0] == "torchtune"}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names |= (
                set(re.findall(r"torchtune(?:\.\w+)+", node.value)) if re.fullmatch(r"[\w.]+", node.value) else set()
            )
    used = {
        f"{modules[node.value.id]}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules
    }
    # Of a module such as torchtune.training, its members count.
    return {name for name in names if not any(member.startswith(f"{name}.") for member in used)} | used


def all_names_from_torchtune() -> set[str]:
    sources = [*ROOT.glob("personas_tune/**/*.py"), *ROOT.glob("recipes/*.py")]
    in_code = {name for source in sources for name in names_from_torchtune(read(source))}
    in_configs = {name for config in CONFIGS for name in re.findall(r"_component_: (torchtune\.[\w.]+)", read(config))}
    return in_code | in_configs


def test_names_are_found_however_they_are_imported() -> None:
    source = "from torchtune import training\nfrom torchtune.a.b import c as d\nimport torchtune.e\n"
    source += "training.f(d.g)\nx = 'torchtune.h.i'\ny = 'see torchtune.j'\n"
    found = names_from_torchtune(source)
    assert found == {"torchtune.training.f", "torchtune.a.b.c.g", "torchtune.e", "torchtune.h.i"}


def test_the_torchtune_page_lists_what_is_taken_and_nothing_else() -> None:
    page = read(ROOT / "docs" / "torchtune.md")
    _, _, section = page.partition("\n## What is taken\n")
    listed = set(re.findall(r"`(torchtune\.[\w.]+)`", section.partition("\n## ")[0]))
    assert listed == all_names_from_torchtune()


def test_error_messages_of_the_troubleshooting_page_are_the_codes_own() -> None:
    """Names and numbers stand where the dots are; the remedy stands apart from what is wrong."""
    _, _, section = read(ROOT / "docs" / "troubleshooting.md").partition("\n## Error messages\n")
    quoted = re.findall(r"^\| `(.+?)` \|", section.partition("\n## ")[0], flags=re.MULTILINE)
    code = " ".join(read(source) for source in [*ROOT.glob("personas_tune/**/*.py"), *ROOT.glob("recipes/*.py")])
    assert len(quoted) > 20
    parts = [part.strip() for message in quoted for part in re.split(r"\.\.\.|; ", message)]
    assert not [part for part in parts if part not in code]


def test_benchmarks_that_pages_name_exist() -> None:
    named = {name for page in PAGES for name in re.findall(r"\b((?:benchmarks|tests)/\w+\.py)\b", read(page))}
    assert named
    assert not [name for name in named if not (ROOT / name).is_file()]


def make_commands(lines: Iterable[str]) -> set[str]:
    """The targets that `make` is asked for."""
    commands = [line.partition("#")[0].split() for line in lines]
    return {word for words in commands if words[:1] == ["make"] for word in words[1:] if "=" not in word}


def test_make_commands_are_targets_and_ci_runs_those_of_the_readme() -> None:
    targets = set(re.findall(r"^([a-z]+):", MAKEFILE, flags=re.MULTILINE))
    in_pages = {page: make_commands(shell_lines(read(page))) for page in PAGES}
    in_ci = make_commands(line.removeprefix("step ") for line in read(ROOT / ".ci" / "run").splitlines())
    assert in_pages[ROOT / "README.md"] == {"quickstart", "test"}
    assert {"quickstart", "test", "lint", "types", "docs"} == in_ci
    assert set().union(in_ci, *in_pages.values()) <= targets


def test_make_base_runs_the_commands_at_the_heads_of_its_configs() -> None:
    configs = [ROOT / "configs" / name for name in ("quickstart_base.yaml", "quickstart_llama3_base.yaml")]
    in_configs = [command for config in configs for command in tune_commands(read(config))]
    recipe = MAKEFILE.partition("\nbase:")[2].partition("\n\n")[0].replace("$(BIN)/", "")
    in_makefile = list(tune_commands(f"```\n{recipe.replace(chr(9), '')}\n```"))
    prepared = ("persona_prepare", ["--config", "quickstart.yaml"])
    assert all(command in [prepared, *in_configs] for command in in_makefile)
    assert next(command for command in in_configs if command[0] == "persona_pipeline") in in_makefile
    assert all(("persona_base", ["--config", config.name]) in in_makefile for config in configs)


def test_no_page_names_paths_of_one_machine_or_package_hosts() -> None:
    files = [*PAGES, *CONFIGS, ROOT / "Makefile", ROOT / ".ci" / "run", ROOT / "pyproject.toml"]
    foreign = re.compile(
        r"(?<![\w.~}])/(work|root|home|tmp|opt|Users)/|py(pi|thonhosted)\.|download\.pytorch|index-url"
    )
    found = {str(file.relative_to(ROOT)): match.group() for file in files if (match := foreign.search(read(file)))}
    assert not found
