"""Packages, their versions, and whether `tune run` finds the recipes; nothing here needs torch to work."""

import importlib
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from personas_tune.doctor.findings import Finding, found
from personas_tune.doctor.stages import RECIPES

PACKAGE = "personas-tune"
OPTIONAL = ("peft", "sentence-transformers", "spacy", "wandb", "tensorboard", "mlflow")
AGAIN = f"pip install --force-reinstall {PACKAGE}"


def check_packages() -> list[Finding]:
    """Whether Python and each required package have a version that works, and torch, torchao and torchtune fit."""
    return [check_python(), *map(_check_requirement, _requirements(None)), check_imports()]


def check_python() -> Finding:
    """Whether this Python is one that the package claims."""
    try:
        claimed = SpecifierSet(metadata(PACKAGE)["Requires-Python"] or "")
    except PackageNotFoundError:
        return Finding("missing", f"{PACKAGE} itself is not installed", f"pip install {PACKAGE}")
    running = platform.python_version()
    mend = f"make an environment of python {claimed}"
    return found(claimed.contains(running, prereleases=True), f"python {running} (works: {claimed or 'any'})", mend)


def check_imports() -> Finding:
    """Whether torch, torchao and torchtune fit together."""
    for name in ("torch", "torchtune"):
        try:
            importlib.import_module(name)
        except Exception as error:  # any error at all is the finding
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            return Finding("missing", f"{name} does not import ({reason})", AGAIN)
    return Finding("ok", "torch, torchao and torchtune import together")


def check_extras() -> list[Finding]:
    """Which optional packages are there; none of them has to be."""
    findings = []
    for extra in OPTIONAL:
        wanted = list(_requirements(extra))
        each = [_check_requirement(requirement) for requirement in wanted]
        if each:
            all_good = all(finding.state == "ok" for finding in each)
            what = f"{extra}: {', '.join(finding.what for finding in each)}"
            findings.append(Finding("ok" if all_good else "note", what, f"pip install '{PACKAGE}[{extra}]' if wanted"))
    return findings


def check_commands() -> list[Finding]:
    """Whether the shell finds this environment's `tune`, and `tune run` this package's recipes."""
    lost = [name for name in RECIPES if find_spec(name) is None]
    recipes = found(not lost, f"recipes: {len(RECIPES) - len(lost)} of {len(RECIPES)}", f"{', '.join(lost)}: {AGAIN}")
    return [_check_tune(), recipes, *_find_strays()]


def _check_tune() -> Finding:
    ours, first = Path(sys.executable).parent / "tune", shutil.which("tune")
    if first is not None and (not ours.exists() or Path(first).samefile(ours)):
        return Finding("ok", f"tune is {first}")
    if ours.exists():
        other = "no `tune`" if first is None else f"another `tune` ({first})"
        return Finding("note", f"the shell finds {other}", f"activate this environment, or run {ours}")
    return Finding("missing", "no command `tune`", AGAIN)


def _find_strays() -> Iterator[Finding]:
    """Files of this folder that `tune run` may take for a recipe, or for torchtune's own package of recipes."""
    for name in RECIPES:
        stray, spec = Path.cwd() / f"{name}.py", find_spec(name)
        if stray.is_file() and not (spec is not None and spec.origin is not None and stray.samefile(spec.origin)):
            what = f"{stray.name} in this folder may run in the place of the installed recipe"
            yield Finding("note", what, "rename it: `tune run` takes any module's name")
    if (Path.cwd() / "recipes" / "__init__.py").is_file():
        what = "recipes/ in this folder hides torchtune's own package of recipes from --nproc_per_node"
        yield Finding("note", what, "run from another folder if you use stock recipes")


def _requirements(extra: str | None) -> Iterator[Requirement]:
    """What the package requires: always for None, else for one of its extras."""
    try:
        lines = requires(PACKAGE) or []
    except PackageNotFoundError:
        return
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is None:
            is_asked = extra is None
        elif extra is None:
            is_asked = requirement.marker.evaluate({"extra": ""})
        else:
            is_asked = requirement.marker.evaluate({"extra": extra}) and not requirement.marker.evaluate({"extra": ""})
        if is_asked:
            yield requirement


def _check_requirement(requirement: Requirement) -> Finding:
    mend = f"pip install '{requirement.name}{requirement.specifier}'"
    try:
        installed = version(requirement.name)
    except PackageNotFoundError:
        return Finding("missing", f"{requirement.name} is not installed", mend)
    good = requirement.specifier.contains(installed, prereleases=True)
    return found(good, f"{requirement.name} {installed} (works: {requirement.specifier or 'any'})", mend)
