"""From a command line to a checked experiment.

:func:`parse` stands in the place of torchtune's decorator of the same name. It also finds the
bundled configs by name, splits an override at its first ``=``, reports all mistakes of a config at
once with the nearest known key, and turns every :class:`~personas_tune.errors.PersonasTuneError`
into lines on stderr and exit status 2.
"""

import argparse
import difflib
import functools
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from yaml import YAMLError

from personas_tune.errors import ConfigError, PersonasTuneError, raise_together
from personas_tune.schema import Experiment

EXIT_USER_ERROR = 2
BUNDLED_CONFIGS = "personas_tune.configs"
BUNDLED_BASES = "bundled://"


def bundled_configs() -> list[str]:
    """File names of the configs that ship with the package."""
    folder = resources.files(BUNDLED_CONFIGS)
    return sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def find_config(name: str) -> Path:
    """The config file called ``name``: a file at that path, else the bundled one of that name.

    Raises:
        ConfigError: If there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    for candidate in (name, f"{name}.yaml"):
        if candidate in bundled_configs():
            return Path(str(resources.files(BUNDLED_CONFIGS).joinpath(candidate)))
    near = difflib.get_close_matches(name, bundled_configs(), n=1)
    hint = f"did you mean {near[0]}?" if near else "`personas-tune ls` lists the bundled ones"
    raise ConfigError("no such file and no bundled config of that name", where=name, remedy=hint)


def load_experiment(config: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Load, override and check an experiment's YAML, with every default filled in.

    Args:
        config: A path, or the name of a bundled config.
        overrides: ``key=value`` to set (a component's key alone sets its ``_component_``), ``~key`` to remove.

    Raises:
        ConfigError: For an unreadable file or one mistake.
        SeveralErrors: For several mistakes.
    """
    path = find_config(config)
    try:
        cfg = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"not readable as YAML ({_flat(error)})", where=str(path), remedy="mend the file") from error
    if not isinstance(cfg, DictConfig):
        raise ConfigError(
            "not a mapping of keys to values", where=str(path), remedy="see `personas-tune cp quickstart.yaml .`"
        )
    for override in overrides:
        cfg = _apply_override(cfg, override)
    return check_experiment(cfg, where=str(path))


def check_experiment(cfg: DictConfig, where: str) -> DictConfig:
    """Check a config against the schema and fill in the defaults.

    Raises:
        ConfigError: For one mistake.
        SeveralErrors: For several.
    """
    try:
        plain = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(_flat(error), where=where, remedy="mend the ${...} reference") from error
    try:
        experiment = Experiment.model_validate(plain)
    except ValidationError as error:
        raise_together([mistake for entry in error.errors() for mistake in _mistakes(entry, where)])
        raise
    # Written values stay as they were written (unresolved); only missing ones are added.
    defaults = OmegaConf.create(experiment.model_dump())
    merged = OmegaConf.merge(defaults, cfg)
    assert isinstance(merged, DictConfig)
    return merged


def settings_of(cfg: DictConfig, *keys: str) -> dict[str, Any]:
    """The named sections as plain values, references unresolved, for a stage's manifest."""
    plain = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(plain, dict)
    return {key: plain[key] for key in keys}


def plain(section: Any) -> Any:
    """A section as plain Python values, references unresolved."""
    return OmegaConf.to_container(section, resolve=False)


def without_secrets(cfg: DictConfig) -> DictConfig:
    """A copy in which whatever comes from the environment stays unread, for loggers."""
    hidden = _map_strings(plain(cfg), lambda text: "(from the environment)" if "oc.env" in text else text)
    copied = OmegaConf.create(hidden)
    assert isinstance(copied, DictConfig)
    return copied


def base_sections(cfg: DictConfig, name: str | None) -> dict[str, Any]:
    """``model``, ``tokenizer`` and ``checkpointer`` of a base: ``bases.NAME``, or the top-level ones for None.

    Raises:
        ConfigError: If one of them is missing or isn't a torchtune component with such keys.
        SeveralErrors: For several mistakes.
    """
    prefix = "" if name is None else f"bases.{name}."
    keys = ("model", "tokenizer", "checkpointer")
    check_components(cfg, [f"{prefix}{key}" for key in keys])
    sections = {key: OmegaConf.to_container(OmegaConf.select(cfg, f"{prefix}{key}"), resolve=True) for key in keys}
    resolved: dict[str, Any] = _map_strings(sections, bundled_path)
    return resolved


def bundled_path(text: str) -> str:
    """The place of a base that ships with the package: ``bundled://NAME/FILE``; other strings as they are."""
    if not text.startswith(BUNDLED_BASES):
        return text
    return str(resources.files("personas_tune") / "bases" / text.removeprefix(BUNDLED_BASES))


def instantiate(cfg: DictConfig, key: str, *args: Any, default: str | None = None, **kwargs: Any) -> Any:
    """Make the torchtune component of a section; ``default`` with ``kwargs`` when the section is missing.

    Raises:
        ConfigError: If its arguments are refused.
    """
    from torchtune import config as torchtune_config

    section = cfg.get(key)
    if section is None:
        component = OmegaConf.create({"_component_": default, **kwargs})
        return torchtune_config.instantiate(component, *args)
    # Only what a recipe must add (the number of steps, say) goes beside what the user wrote.
    extra = {} if default is not None else kwargs
    try:
        return torchtune_config.instantiate(section, *args, **extra)
    except (TypeError, ValueError, RuntimeError, ImportError) as error:
        raise ConfigError(
            f"{section._component_} failed ({_flat(error)})", where=key, remedy="check its values"
        ) from error


def refuse_resume(cfg: DictConfig) -> None:
    """Say that a stopped training can't be resumed yet.

    Raises:
        ConfigError: If ``resume_from_checkpoint`` is set.
    """
    if cfg.resume_from_checkpoint:
        raise ConfigError(
            "resuming a stopped training is not built yet",
            where="resume_from_checkpoint",
            remedy="leave it out: finished adapter sets are kept, the others start anew",
        )


def check_components(cfg: DictConfig, names: Sequence[str], *, optional: bool = False) -> None:
    """Check that each named torchtune component exists and takes the keys that are given.

    Args:
        cfg: The experiment.
        names: Dotted keys of the sections.
        optional: Pass over sections that are missing or null.

    Raises:
        ConfigError: For one mistake.
        SeveralErrors: For several.
    """
    from torchtune.config._errors import InstantiationError
    from torchtune.config._utils import _get_component_from_path

    mistakes: list[PersonasTuneError] = []
    for name in names:
        node = OmegaConf.select(cfg, name)
        if node is None and optional:
            continue
        if node is None or "_component_" not in node:
            mistakes.append(
                ConfigError(
                    "this section with a _component_ is missing",
                    where=name,
                    remedy="see `personas-tune cp quickstart.yaml .`",
                )
            )
            continue
        try:
            component = _get_component_from_path(node["_component_"])
            given = {key: value for key, value in node.items() if key != "_component_"}
            inspect.signature(component).bind_partial(**given)
        except (InstantiationError, ValueError) as error:
            mistakes.append(ConfigError(_flat(error), where=f"{name}._component_", remedy="check the dotted path"))
        except TypeError as error:
            known = ", ".join(inspect.signature(component).parameters)
            mistakes.append(ConfigError(f"{node['_component_']} {error}", where=name, remedy=f"it takes {known}"))
    raise_together(mistakes)


def parse(recipe_main: Callable[[DictConfig], Any]) -> Callable[[], None]:
    """Make a recipe's main function read ``--config NAME [key=value ...]`` from the command line."""

    @functools.wraps(recipe_main)
    def run() -> None:
        def checked_main() -> None:
            _refuse_several_processes()
            parser = argparse.ArgumentParser(
                description=recipe_main.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
            )
            parser.add_argument("--config", required=True, help="a YAML file, or the name of a bundled config")
            parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key; ~key removes it")
            arguments, unknown = parser.parse_known_args()
            flags = [word for word in unknown if word.startswith("-")]
            if flags:
                raise ConfigError(
                    f"unknown flag {' '.join(flags)}", where="command line", remedy="use --config NAME and key=value"
                )
            recipe_main(load_experiment(arguments.config, [*arguments.overrides, *unknown]))

        sys.exit(exit_status_of(checked_main))

    return run


def exit_status_of(command: Callable[[], None]) -> int:
    """Run a command; print what a user can mend on stderr, a line each, and give the exit status."""
    try:
        command()
    except PersonasTuneError as error:
        for line in error.lines:
            print(f"error: {line}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted: nothing half-written was kept", file=sys.stderr)
        return 130
    return 0


def _refuse_several_processes() -> None:
    """Several ranks would each do the whole job; refuse until the work is really divided."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if os.environ.get("RANK", "0") != "0":
            sys.exit(EXIT_USER_ERROR)
        raise ConfigError(
            f"training in {os.environ['WORLD_SIZE']} processes is not built yet",
            where="--nproc_per_node",
            remedy="leave the flag out: one process trains every persona",
        )


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {key: _map_strings(entry, change) for key, entry in value.items()}
    if isinstance(value, list):
        return [_map_strings(entry, change) for entry in value]
    return change(value) if isinstance(value, str) else value


def _apply_override(cfg: DictConfig, override: str) -> DictConfig:
    if override.startswith("~"):
        key = override[1:].split("=", 1)[0]
        parent, _, leaf = key.rpartition(".")
        node = OmegaConf.select(cfg, parent) if parent else cfg
        if not isinstance(node, DictConfig) or leaf not in node:
            raise ConfigError("no such key to remove", where=override, remedy="check the spelling")
        del node[leaf]
        return cfg
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ConfigError("not of the form key=value", where=f"override {override!r}", remedy="write key=value or ~key")
    current = OmegaConf.select(cfg, key)
    if isinstance(current, DictConfig) and "_component_" in current and not value.lstrip().startswith("{"):
        key += "._component_"
    if value == "None":  # as torchtune does
        value = "null"
    try:
        merged = OmegaConf.merge(cfg, OmegaConf.from_dotlist([f"{key}={value}"]))
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(_flat(error), where=f"override {override!r}", remedy="quote the value as YAML") from error
    assert isinstance(merged, DictConfig)
    return merged


def _mistakes(entry: Any, where: str) -> list[PersonasTuneError]:
    """A pydantic error entry as our errors, with the nearest known key for an unknown one."""
    location = [str(part) for part in entry["loc"]]
    key = ".".join(location)
    if entry["type"] == "extra_forbidden":
        return [ConfigError(f"unknown key {key}", where=where, remedy=_nearest_key(location))]
    message = entry["msg"].removeprefix("Value error, ")
    if entry["type"] == "value_error" and not key:
        return [ConfigError(line, where=where) for line in message.splitlines()]
    if entry["type"] == "missing":
        return [ConfigError(f"key {key} is missing", where=where, remedy=f"add {key}: ...")]
    shown = "" if isinstance(entry["input"], dict) else f", got {entry['input']!r}"
    # A union reports each of its members; the location's tail then is a type name, not a key.
    location = [part for part in location if not _is_union_tag(part)]
    return [ConfigError(f"{'.'.join(location)}: {_lower_first(message)}{shown}", where=where)]


def _is_union_tag(part: str) -> bool:
    return part in {"int", "str", "float", "bool"} or part.startswith(("literal[", "list[", "dict["))


def _nearest_key(location: Sequence[str]) -> str:
    *parents, unknown = location
    known = _known_keys(Experiment)
    siblings = [key for key in known if key.rpartition(".")[0] == ".".join(parents)]
    by_leaf = {key.rpartition(".")[2]: key for key in [*known, *siblings]}
    sibling_leaves = [key.rpartition(".")[2] for key in siblings]
    near = difflib.get_close_matches(unknown, sibling_leaves, n=1) or difflib.get_close_matches(unknown, by_leaf, n=1)
    if near:
        return f"did you mean {'.'.join([*parents, near[0]]) if near[0] in sibling_leaves else by_leaf[near[0]]}?"
    return f"known here: {', '.join(sibling_leaves)}" if sibling_leaves else "remove it"


def _known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, info in model.model_fields.items():
        keys.append(f"{prefix}{name}")
        for candidate in (info.annotation, *get_args(info.annotation)):
            if inspect.isclass(candidate) and issubclass(candidate, BaseModel):
                keys += _known_keys(candidate, f"{prefix}{name}.")
    return keys


def _flat(error: BaseException) -> str:
    return " ".join(str(error).split())


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
