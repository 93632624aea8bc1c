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
import re
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, redirect_stderr
from importlib import resources
from io import StringIO
from pathlib import Path
from typing import Any, get_args, get_origin

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from yaml import YAMLError

from personas_tune.addresses import bare_address
from personas_tune.errors import ConfigError, MissingInputError, PersonasTuneError, raise_together
from personas_tune.processes import Processes, joined
from personas_tune.schema import Experiment

EXIT_USER_ERROR = 2
_RANK_0_SPEAKS_WITHIN = 120  # seconds
BUNDLED_CONFIGS = "personas_tune.configs"
BUNDLED_BASES = "bundled://"
RECORDED_CONFIG = "torchtune_config.yaml"  # what torchtune's metric loggers call it
MAX_NAMED = 12  # known keys in a message


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
    bundled = bundled_config(name)
    if bundled is not None:
        return bundled
    near = difflib.get_close_matches(name, bundled_configs(), n=1)
    hint = f"did you mean {near[0]}?" if near else "`personas-tune ls` lists the bundled ones"
    raise ConfigError("no such file and no bundled config of that name", where=repr(name), remedy=hint)


def bundled_config(name: str) -> Path | None:
    """The file of the bundled config called ``name``, with or without ``.yaml``; None if there is none."""
    for candidate in (name, f"{name}.yaml"):
        if candidate in bundled_configs():
            return Path(str(resources.files(BUNDLED_CONFIGS).joinpath(candidate)))
    return None


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
    cfg = _read_yaml(path)
    for override in overrides:
        cfg = _apply_override(cfg, override)
    return check_experiment(cfg, where=str(path), overrides=overrides)


def load_recorded(output_dir: Path, sections: Mapping[str, Any], overrides: Sequence[str] = ()) -> DictConfig:
    """The experiment that was last trained in a folder, as torchtune's metric loggers recorded it there.

    Args:
        output_dir: The folder, which may have been moved since.
        sections: What a later stage was run with, put into the recorded sections.
        overrides: As for :func:`load_experiment`.

    Raises:
        MissingInputError: If nothing is recorded there.
        ConfigError: For an unreadable record or one mistake.
        SeveralErrors: For several mistakes.
    """
    path = output_dir / RECORDED_CONFIG
    if not path.is_file():
        raise MissingInputError(
            "no trained experiment in this folder",
            where=str(path),
            remedy="run `tune run persona_lora --config ...` first, or give the experiment's config, not its folder",
        )
    cfg = _read_yaml(path)
    for key, value in {**sections, "output_dir": str(output_dir)}.items():
        OmegaConf.update(cfg, key, value, merge=True)
    for override in overrides:
        cfg = _apply_override(cfg, override)
    return check_experiment(cfg, where=str(path), overrides=overrides)


def _read_yaml(path: Path) -> DictConfig:
    try:
        cfg = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"not readable as YAML ({_flat(error)})", where=str(path), remedy="mend the file") from error
    if not isinstance(cfg, DictConfig):
        raise ConfigError(
            "not a mapping of keys to values", where=str(path), remedy="see `personas-tune cp quickstart.yaml .`"
        )
    return cfg


def check_experiment(cfg: DictConfig, where: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Check a config against the schema and fill in the defaults.

    Args:
        cfg: With the overrides in it.
        where: The file, for messages.
        overrides: As for :func:`load_experiment`: a mistake in what they set is told of them.

    Raises:
        ConfigError: For one mistake.
        SeveralErrors: For several.
    """
    try:
        resolved = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise _bad_reference(error, where) from error
    try:
        experiment = Experiment.model_validate(resolved)
    except ValidationError as error:
        raise_together(_mistakes(error.errors(), where, plain(cfg), overrides))
        raise
    checked = OmegaConf.create(_with_references(experiment.model_dump(), plain(cfg)))
    assert isinstance(checked, DictConfig)
    return checked


def settings_of(cfg: DictConfig, *keys: str) -> dict[str, Any]:
    """The named sections as plain values, references unresolved, for a stage's manifest."""
    plain = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(plain, dict)
    return {key: plain[key] for key in keys}


def plain(section: Any) -> Any:
    """A section as plain Python values, references unresolved."""
    return OmegaConf.to_container(section, resolve=False)


def without_secrets(cfg: DictConfig) -> DictConfig:
    """A copy for loggers: what comes from the environment stays unread, addresses lose names, passwords and queries."""
    copied = OmegaConf.create(_map_strings(plain(cfg), _shown))
    assert isinstance(copied, DictConfig)
    return copied


def _shown(text: str) -> str:
    if "oc.env" in text:
        return "(from the environment)"
    return bare_address(text) if "://" in text else text


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

    section, extra = cfg.get(key), kwargs
    if section is None:
        section, extra = OmegaConf.create({"_component_": default, **kwargs}), {}
    elif default is not None:  # only what a recipe must add (the number of steps, say) goes beside what the user wrote
        extra = {}
    try:
        return torchtune_config.instantiate(section, *args, **extra)
    except Exception as error:  # whatever a component raises, its values are the user's
        _drop_half_made(error)
        raise ConfigError(
            f"{section._component_} failed ({_flat(error) or type(error).__name__})",
            where=key,
            remedy="check its values",
        ) from error


def _drop_half_made(error: Exception) -> None:
    """Let go of the component that failed: torchtune's loggers raise again, and print it, when they go."""
    hook = sys.unraisablehook
    sys.unraisablehook = lambda unraisable: None
    try:
        traceback.clear_frames(error.__traceback__)
    finally:
        sys.unraisablehook = hook


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
        path = str(node["_component_"])
        try:
            signature = inspect.signature(_get_component_from_path(path))
        except (InstantiationError, ValueError, TypeError) as error:
            mistakes.append(ConfigError(_flat(error), where=f"{name}._component_", remedy="check the dotted path"))
            continue
        try:
            signature.bind_partial(**{key: value for key, value in node.items() if key != "_component_"})
        except TypeError as error:
            known = ", ".join(signature.parameters)
            mistakes.append(ConfigError(f"{path} {error}", where=name, remedy=f"it takes {known}"))
    raise_together(mistakes)


def parse(recipe_main: Callable[[DictConfig], Any]) -> Callable[[], None]:
    """Make a recipe's main function read ``--config NAME [key=value ...]`` from the command line."""

    @functools.wraps(recipe_main)
    def run() -> None:
        def checked_main() -> None:
            _refuse_several_processes()
            recipe_main(_experiment_of_command_line(recipe_main.__doc__))

        sys.exit(exit_status_of(checked_main))

    return run


def parse_in_processes(recipe_main: Callable[[DictConfig, Processes], Any]) -> Callable[[], None]:
    """As :func:`parse`, for a recipe that may run in several processes."""

    @functools.wraps(recipe_main)
    def run() -> None:
        def checked_main() -> None:
            with joined() as processes:
                with nullcontext() if processes.is_first else redirect_stderr(StringIO()):  # argparse's own messages
                    cfg = _experiment_of_command_line(recipe_main.__doc__)
                recipe_main(cfg, processes)

        sys.exit(exit_status_of(checked_main))

    return run


def _experiment_of_command_line(description: str | None) -> DictConfig:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a YAML file, or the name of a bundled config")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key; ~key removes it")
    arguments, unknown = parser.parse_known_args()
    flags = [word for word in unknown if word.startswith("-")]
    if flags:
        raise ConfigError(
            f"unknown flag {' '.join(flags)}", where="command line", remedy="use --config NAME and key=value"
        )
    return load_experiment(arguments.config, [*arguments.overrides, *unknown])


def exit_status_of(command: Callable[[], None]) -> int:
    """Run a command; print what a user can mend on stderr, a line each, and give the exit status."""
    try:
        command()
    except PersonasTuneError as error:
        for line in error.lines:
            print(f"error: {line}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("interrupted: nothing half-written was kept", file=sys.stderr)
        return 130
    return 0


def _refuse_several_processes() -> None:
    """Each of several processes would do the whole job."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if os.environ.get("RANK", "0") != "0":
            if "TORCHELASTIC_RUN_ID" in os.environ:
                # torchrun ends every rank once one has failed: let rank 0 be the first, or its line is lost.
                time.sleep(_RANK_0_SPEAKS_WITHIN)
            sys.exit(EXIT_USER_ERROR)
        raise ConfigError(
            f"this recipe runs in one process, not in {os.environ['WORLD_SIZE']}",
            where="--nproc_per_node",
            remedy="leave the flag out; persona_lora, persona_eval and persona_pipeline take it",
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
    if value == "None":  # as torchtune does
        value = "null"
    is_component = isinstance(current, DictConfig) and "_component_" in current
    if is_component and value != "null" and not value.lstrip().startswith("{"):
        key += "._component_"
    if key.endswith("max_filename"):  # so does this: the zeros that lead 00002 belong to file names
        value = f"!!str {value}"
    if isinstance(current, ListConfig):  # replaced by whatever is given, not merged with it
        OmegaConf.update(cfg, key, None)
    try:
        merged = OmegaConf.merge(cfg, OmegaConf.from_dotlist([f"{key}={value}"]))
    except (OmegaConfBaseException, YAMLError, TypeError) as error:
        raise ConfigError(_flat(error), where=f"override {override!r}", remedy="quote the value as YAML") from error
    assert isinstance(merged, DictConfig)
    return merged


def _with_references(checked: Any, written: Any) -> Any:
    """Checked values, in which whatever was written as a ``${...}`` reference stands as it was written."""
    if isinstance(checked, dict) and isinstance(written, dict):
        return {key: _with_references(value, written.get(key)) for key, value in checked.items()}
    if isinstance(checked, list) and isinstance(written, list):
        return [_with_references(*pair) for pair in zip(checked, written, strict=True)]
    return written if isinstance(written, str) and "${" in written else checked


def _bad_reference(error: OmegaConfBaseException, where: str) -> ConfigError:
    what, _, key = str(error).partition("full_key: ")
    key = key.split("\n", 1)[0].strip()
    what, remedy = _lower_first(" ".join(what.split())), "mend the ${...} reference"
    unset = re.search(r"Environment variable '(.+)' not found", what)
    if unset:
        what, remedy = f"environment variable {unset[1]} is not set", f"export {unset[1]}=..."
    elif isinstance(error, MissingMandatoryValue):
        what, remedy = "its value ??? must be given", f"set {key}=..."
    return ConfigError(f"{key}: {what}", where=where, remedy=remedy)


def _mistakes(
    entries: Sequence[Any], where: str, written: Any, overrides: Sequence[str] = ()
) -> list[PersonasTuneError]:
    """pydantic's error entries as our errors, one a key: a union reports every one of its members."""
    by_key: dict[str, list[Any]] = {}
    for entry in entries:
        key = ".".join(str(part) for part in entry["loc"] if not _is_union_tag(str(part)))
        by_key.setdefault(key, []).append(entry)
    return [
        mistake
        for key, group in by_key.items()
        for mistake in _mistakes_at(key, group, lambda at: _override_of(at, overrides) or where, written)
    ]


def _override_of(key: str, overrides: Sequence[str]) -> str | None:
    """The override that a mistake at a key comes from, the last one that sets or removes it or something below it."""
    key = key.removesuffix(".[key]")
    told = (f"override {override!r}" for override in reversed(overrides) if key and _is_set_by(override, key))
    return next(told, None)


def _is_set_by(override: str, key: str) -> bool:
    """Whether an override is of a key or of what lies below, or of what lies above with a value that has the key."""
    set_key, _, value = override.removeprefix("~").partition("=")
    if f"{set_key}.".startswith(f"{key}.") or key == f"{set_key}._component_":
        return True
    if override.startswith("~") or not key.startswith(f"{set_key}."):
        return False
    return OmegaConf.select(OmegaConf.from_dotlist([f"_={value}"]), f"_.{key.removeprefix(f'{set_key}.')}") is not None


def _as_written(location: Sequence[Any], written: Any, given: Any) -> Any:
    """A wrong value, or the reference that it came from: what stands in the environment is not shown."""
    for part in location:
        try:
            written = written[part]
        except (KeyError, IndexError, TypeError):  # the tag of a union, or a default
            continue
    return written if isinstance(written, str) and "${" in written else given


def _mistakes_at(
    key: str, entries: Sequence[Any], where_set: Callable[[str], str], written: Any
) -> list[PersonasTuneError]:
    kind, message, where = entries[0]["type"], entries[0]["msg"].removeprefix("Value error, "), where_set(key)
    if kind == "extra_forbidden":
        return [ConfigError(f"unknown key {key}", where=where, remedy=_nearest_key(entries[0]["loc"]))]
    if kind == "missing":
        return [ConfigError(f"key {key} is missing", where=where, remedy=f"add {key}: ...")]
    if kind == "value_error":
        lines = [f"{key}: {line}" if key else line for line in message.splitlines()]
        return [ConfigError(line, where=where_set(line.partition(":")[0])) for line in lines]
    if key.endswith(".[key]") or kind == "invalid_key":
        remedy = f"use {_should_be(entries[0])}" if kind == "literal_error" else "put it in quotes if it is a name"
        return [ConfigError(f"unknown key {key.removesuffix('.[key]')}", where=where, remedy=remedy)]
    given = _as_written(entries[0]["loc"], written, entries[0]["input"])
    remedy = f"it should be {' or '.join(dict.fromkeys(map(_should_be, entries)))}"
    if kind == "dict_type" and isinstance(given, str) and "." in given:
        remedy = f"write {key}._component_={given}"
    return [ConfigError(f"{key} is {'null' if given is None else repr(given)[:80]}", where=where, remedy=remedy)]


def _should_be(entry: Any) -> str:
    if entry["type"] in ("dict_type", "model_type"):
        return "a mapping of keys to values"
    if entry["type"] == "string_too_short":
        return "text"
    return str(re.sub(r", (unable|got) .*", "", entry["msg"].removeprefix("Input should be ")))


def _is_union_tag(part: str) -> bool:
    return part in {"int", "str", "float", "bool"} or part.startswith(("literal[", "list[", "dict["))


def _nearest_key(location: Sequence[Any]) -> str:
    *parents, unknown = map(str, location)
    siblings = list(_section_at(parents).model_fields)
    near = difflib.get_close_matches(unknown, siblings, n=1)
    if near:
        return f"did you mean {'.'.join([*parents, near[0]])}?"
    elsewhere: dict[str, str] = {}
    for key in _known_keys(Experiment):
        elsewhere.setdefault(key.rpartition(".")[2], key)
    near = difflib.get_close_matches(unknown, elsewhere, n=1)
    if near:
        return f"did you mean {elsewhere[near[0]]}?"
    return f"known here: {', '.join(siblings[:MAX_NAMED])}{', ...' if len(siblings) > MAX_NAMED else ''}"


def _section_at(parents: Sequence[str]) -> type[BaseModel]:
    section: type[BaseModel] = Experiment
    parts = iter(parents)
    for part in parts:
        annotation = section.model_fields[part].annotation
        if get_origin(annotation) is dict:
            next(parts)  # a name of the user's, such as that of an adapter set
        section = _sections_in(annotation)[0]
    return section


def _known_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, info in section.model_fields.items():
        keys.append(f"{prefix}{name}")
        named = "NAME." if get_origin(info.annotation) is dict else ""
        for below in _sections_in(info.annotation):
            keys += _known_keys(below, f"{prefix}{name}.{named}")
    return keys


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    candidates = (annotation, *get_args(annotation))
    return [each for each in candidates if inspect.isclass(each) and issubclass(each, BaseModel)]


def _flat(error: BaseException) -> str:
    return " ".join(str(error).split())


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
