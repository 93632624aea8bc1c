"""The ``personas-tune`` command: list and copy what is bundled, show users and results, say what this machine lacks."""

import argparse
import difflib
import shutil
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from personas_tune import __version__
from personas_tune.config import bundled_config, bundled_configs, exit_status_of
from personas_tune.errors import ConfigError

RECIPES = {
    "persona_prepare": "logs and item metadata -> data/",
    "persona_distill": "data/ -> profiles and memories in memory/",
    "persona_cluster": "profiles -> personas/",
    "persona_raft": "memories retrieved for every rating -> samples/",
    "persona_lora": "samples/ and a base -> adapters/",
    "persona_eval": "adapters/ -> eval/ with the table, report/",
    "persona_export": "adapters/ -> PEFT folders or merged checkpoints to serve, in export/",
    "persona_base": "a tiny base from nothing (offline use) -> base/",
    "persona_pipeline": "all stages in order",
}


def list_bundled() -> None:
    """Print the recipes and configs that ``tune run`` takes by name."""
    width = max(len(name) for name in [*RECIPES, *bundled_configs()])
    print("RECIPES (tune run RECIPE --config CONFIG)")
    for name, purpose in RECIPES.items():
        print(f"  {name:<{width}}  {purpose}")
    print("CONFIGS (copy one with `personas-tune cp CONFIG .`)")
    for name in bundled_configs():
        print(f"  {name:<{width}}  {_purpose_of(_bundled_file(name))}")


def copy_bundled(name: str, destination: Path, *, force: bool) -> None:
    """Copy a bundled config or recipe.

    Raises:
        ConfigError: If there is none of that name, or the destination can't be written, or exists and ``force``
            isn't set.
    """
    source = _bundled_file(name)
    target = destination / source.name if destination.is_dir() else destination
    if target.exists() and not force:
        raise ConfigError("file exists", where=str(target), remedy="add --force to overwrite it")
    if not target.parent.is_dir():
        raise ConfigError("no such folder", where=str(target.parent), remedy="make it first")
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise ConfigError(f"can't be written ({error})", where=str(target), remedy="copy it elsewhere") from error
    print(f"copied to {target}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the console script."""
    parser = argparse.ArgumentParser(prog="personas-tune", description="companion of `tune run persona_*`")
    parser.add_argument("--version", action="version", version=f"personas-tune {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("ls", help="list the bundled recipes and configs")
    cp = commands.add_parser("cp", help="copy a bundled config or recipe")
    cp.add_argument("name")
    cp.add_argument("destination", type=Path)
    cp.add_argument("--force", action="store_true", help="overwrite")
    show = commands.add_parser("show", help="print a user's history, profile as it grew, memories and persona")
    show.add_argument("user", metavar="USER", help="a user id, as in data/users.parquet")
    show.add_argument("--in", dest="folder", type=Path, metavar="DIR", help="the output_dir of an experiment")
    show.add_argument("--html", type=Path, metavar="FILE", help="write a page instead")
    report = commands.add_parser("report", help="write an evaluated experiment's report, or two runs side by side")
    report.add_argument("folder", type=Path, metavar="DIR", help="the output_dir of an experiment")
    report.add_argument("--against", type=Path, metavar="OTHER", help="the output_dir of another")
    doctor = commands.add_parser("doctor", help="say what is missing on this machine, with the mending command")
    doctor.add_argument("--config", help="also check what this experiment needs, and whether it would fit")
    doctor.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the config")
    doctor.add_argument("--gpu-memory", type=float, metavar="GB", help="ask about such a GPU instead of this machine's")
    parsed = parser.parse_args(arguments)
    if parsed.command == "ls":
        sys.exit(exit_status_of(list_bundled))
    if parsed.command == "cp":
        sys.exit(exit_status_of(lambda: copy_bundled(parsed.name, parsed.destination, force=parsed.force)))
    if parsed.command == "show":
        from personas_tune.memory.show import show_user

        sys.exit(exit_status_of(lambda: show_user(parsed.user, parsed.folder, parsed.html)))
    if parsed.command == "report":
        from personas_tune.report.write import show_report

        sys.exit(exit_status_of(lambda: show_report(parsed.folder, parsed.against)))
    from personas_tune.doctor import print_findings

    sys.exit(exit_status_of(lambda: print_findings(parsed.config, parsed.overrides, parsed.gpu_memory)))


def _purpose_of(config: Path) -> str:
    first_line = config.read_text(encoding="utf-8").splitlines()[0]
    return first_line.removeprefix("#").strip()


def _bundled_file(name: str) -> Path:
    recipe, config = name.removesuffix(".py"), bundled_config(name)
    if recipe in RECIPES:
        return _recipe_file(recipe)
    if config is not None:
        return config
    near = difflib.get_close_matches(name, [*RECIPES, *bundled_configs()], n=1)
    hint = f"did you mean {near[0]}?" if near else "`personas-tune ls` lists what there is"
    raise ConfigError("no recipe and no config of that name is bundled", where=repr(name), remedy=hint)


def _recipe_file(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise ConfigError(f"recipe {name} is not installed", remedy="pip install --force-reinstall personas-tune")
    return Path(spec.origin)
