"""What runs where: each recipe, what it needs, and how far an experiment is."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from personas_tune.doctor.findings import Finding
from personas_tune.doctor.needs import keys_asking
from personas_tune.errors import PersonasTuneError
from personas_tune.workspace import MANIFEST, Workspace, absolute_path, sha256_of_file

HASHED_BYTES = 64_000_000  # larger inputs are not read again to see whether they changed


@dataclass(frozen=True)
class Recipe:
    """What a recipe needs.

    Args:
        reads: Folders of other stages that must be there.
        writes: Its own folder; None if it has none.
        on_device: Whether it runs a base, on the config's ``device``; the others run on any CPU, without torch.
        asks: The keys of a config with which it may ask a server.
        several: Whether it runs in several processes.
    """

    reads: tuple[str, ...]
    writes: str | None
    on_device: bool = False
    asks: tuple[str, ...] = ()
    several: bool = False


RECIPES = {
    "persona_prepare": Recipe((), "data"),
    "persona_distill": Recipe(("data",), "memory", asks=("distill.distiller",)),
    "persona_cluster": Recipe(("memory",), "personas", asks=("personas.embedder",)),
    "persona_raft": Recipe(("data", "memory", "personas"), "samples", asks=("retrieval.embedder",)),
    "persona_lora": Recipe(("data", "memory", "samples"), "adapters", on_device=True, several=True),
    "persona_eval": Recipe(("data", "memory", "samples", "adapters"), "eval", on_device=True, several=True),
    "persona_export": Recipe(("adapters",), "export"),
    "persona_base": Recipe(("data", "memory", "samples"), "base", on_device=True),
    "persona_pipeline": Recipe((), None, on_device=True, several=True),
}
_WRITERS = {recipe.writes: name for name, recipe in RECIPES.items()}


def check_stages(settings: Mapping[str, Any]) -> list[Finding]:
    """How far an experiment is: which stages are finished, which could run now, which wait for what.

    Args:
        settings: Its config as plain values.
    """
    workspace = Workspace.at(settings["output_dir"])
    findings = []
    for name, recipe in RECIPES.items():
        if _is_used(name, settings):
            findings.append(_standing(workspace, name, recipe, settings))
    return findings


def needs_of(recipe: Recipe, settings: Mapping[str, Any]) -> str:
    """What a recipe runs on, and which server it asks."""
    asked = [section for key, section in keys_asking(settings).items() if key in recipe.asks]
    place = f"device {settings['device']}" if recipe.on_device else "CPU"
    return ", ".join([place, *(f"asks {settings[section]['model']}" for section in asked)])


def _standing(workspace: Workspace, name: str, recipe: Recipe, settings: Mapping[str, Any]) -> Finding:
    assert recipe.writes is not None
    folders = _folders(workspace, recipe.writes, settings)
    if folders and all(_is_finished(folder) for folder in folders):
        changes = [change for folder in folders for change in _changes(folder, settings)]
        if not changes:
            return Finding("ok", f"{name}: finished ({recipe.writes}/)")
        return Finding("note", f"{name}: finished, and runs again, since {changes[0]} has changed")
    waits = [part for part in recipe.reads if not _is_there(workspace, part, settings)]
    if waits:
        writer = next(_WRITERS[part] for part in waits)
        return Finding("note", f"{name}: waits for {', '.join(f'{part}/' for part in waits)}", f"run {writer} first")
    done = sum(_is_finished(folder) for folder in folders)
    begun = f", {done} of {len(folders)} sets finished" if recipe.writes == "adapters" and done else ""
    return Finding("note", f"{name}: can run now ({needs_of(recipe, settings)}){begun}")


def _folders(workspace: Workspace, part: str, settings: Mapping[str, Any]) -> list[Path]:
    """The folders with a manifest each that a stage writes."""
    if part == "adapters":
        return [workspace.adapter_set(name) for name in settings["adapter_sets"]]
    if part == "export":
        return [workspace.root / folder for folder in _export_folders(settings)]
    if part == "base" and settings["base_training"]["checkpoint_dir"] is not None:
        return [absolute_path(settings["base_training"]["checkpoint_dir"])]
    return [workspace.root / part]


def _export_folders(settings: Mapping[str, Any]) -> list[str]:
    """Where an export writes the sets that it is asked for; one without any of the asked adapters is left out."""
    export, folders = settings["export"], []
    for name in settings["adapter_sets"] if export["sets"] is None else export["sets"]:
        adapter_set = settings["adapter_sets"][name]
        sections = settings if adapter_set["base"] is None else settings["bases"][adapter_set["base"]]
        is_merged = export["format"] == "merged" or (export["format"] == "auto" and sections["model"].get("use_dora"))
        wanted = export["adapters"]
        if wanted is None or any((adapter == "all") == (adapter_set["per"] == "all") for adapter in wanted):
            folders.append(f"export/merged/{name}" if is_merged else f"export/{name}")
    return folders


def _is_there(workspace: Workspace, part: str, settings: Mapping[str, Any]) -> bool:
    return all(_is_finished(folder) for folder in _folders(workspace, part, settings))


def _is_finished(folder: Path) -> bool:
    outputs = _manifest(folder).get("outputs")
    return isinstance(outputs, dict) and all((folder / str(name)).is_file() for name in outputs)


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # absent or damaged: to be made again
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _changes(folder: Path, settings: Mapping[str, Any]) -> list[str]:
    """What a finished stage was made with and is otherwise now: settings of the config, and input files."""
    manifest = _manifest(folder)
    made_with, inputs = manifest.get("settings"), manifest.get("inputs")
    if isinstance(made_with, dict) and isinstance(made_with.get("adapter_set"), dict):
        made_with = {**made_with, "adapter_set": {"peft": False, **made_with["adapter_set"]}}
    changed = _differences(made_with, _now(made_with, folder, settings)) if isinstance(made_with, dict) else []
    if manifest.get("seed") not in (None, settings["seed"]):
        changed.append("seed")
    return [*changed, *(_changed_files(inputs) if isinstance(inputs, dict) else [])]


def _now(made_with: Mapping[str, Any], folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The config's values of what a manifest records, an adapter set's base in the place of the default one."""
    now = dict(settings)
    if "adapter_set" in made_with:
        adapter_set = settings["adapter_sets"][folder.name]
        adapter_set = {**adapter_set, "peft": adapter_set["peft"] is not None}  # its path doesn't count, its files do
        now = {**now, **(settings["bases"].get(adapter_set["base"]) or {}), "adapter_set": adapter_set}
    return now


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Keys that both have, and with different values."""
    different = []
    for key in before.keys() & now.keys():
        if isinstance(before[key], dict) and isinstance(now[key], dict):
            different += _differences(before[key], now[key], f"{prefix}{key}.")
        elif before[key] != now[key]:
            different.append(f"{prefix}{key}")
    return sorted(different)


def _changed_files(inputs: Mapping[str, Any]) -> Sequence[str]:
    changed = []
    for name, recorded in inputs.items():
        file = Path(str(name))
        try:
            if file.is_file() and file.stat().st_size <= HASHED_BYTES and sha256_of_file(file) != recorded:
                changed.append(str(file))
        except (OSError, PersonasTuneError, ValueError):
            continue
    return changed


def _is_used(name: str, settings: Mapping[str, Any]) -> bool:
    """Whether a config is for a recipe: one that trains and measures nothing is to make a base of its own."""
    trains, measures = bool(settings["adapter_sets"]), bool(settings["agents"])
    used = {"persona_lora": trains, "persona_export": trains, "persona_eval": measures}
    return {**used, "persona_base": not trains and not measures, "persona_pipeline": False}.get(name, True)
