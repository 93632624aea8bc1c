"""What an experiment needs beside packages and bases: files, servers, keys."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from personas_tune.doctor.findings import Finding, found
from personas_tune.errors import PersonasTuneError

FILES = ("data.path", "data.item_metadata", "data.cohort.exclude", "distill.path", "distill.memories_path")
ASKING = {"distill.distiller": "distill", "personas.embedder": "embedding", "retrieval.embedder": "embedding"}


def check_needs(settings: Mapping[str, Any]) -> list[Finding]:
    """Whether an experiment's own files are there, and its servers can be asked.

    Args:
        settings: Its config, references resolved when they are looked at.
    """
    return [*check_files(settings), *check_servers(settings)]


def check_files(settings: Mapping[str, Any]) -> list[Finding]:
    """Whether the files that a config names are there."""
    findings = []
    for key in FILES:
        path = value_at(settings, key)
        if path is not None:
            findings.append(found(_exists(str(path)), f"{key} {path}", f"set {key} to what is there"))
        elif key == "data.path" and value_at(settings, "data.format") != "world":
            mend = "set data.path (docs/own_data.md says to what)"
            findings.append(Finding("missing", "data.path is not set", mend))
    for name, adapter_set in settings["adapter_sets"].items():
        if adapter_set["peft"] is not None:
            key = f"adapter_sets.{name}.peft"
            findings.append(
                found(_exists(adapter_set["peft"]), f"{key} {adapter_set['peft']}", f"set {key} to a folder")
            )
    return findings


def check_servers(settings: Mapping[str, Any]) -> list[Finding]:
    """Whether language model servers have addresses and, where they need one, a key; nothing is sent."""
    from personas_tune.llm.settings import ServerSettings, access_to

    findings = []
    asked = keys_asking(settings)
    for section in dict.fromkeys(asked.values()):
        asking = [key for key in asked if asked[key] == section]
        what = f"{', '.join(asking)}: {settings[section]['model']}"
        try:
            url = access_to(ServerSettings.of(settings[section])).shown_url
        except PersonasTuneError as error:
            offline = " ".join(f"{key}={'template' if key.endswith('distiller') else 'lsa'}" for key in asking)
            findings.append(Finding("missing", f"{what}: {error.what}", f"{error.remedy}; or set {offline}"))
        else:
            findings.append(Finding("ok", f"{what} at {url}"))
    return findings


def keys_asking(settings: Mapping[str, Any]) -> dict[str, str]:
    """The keys with which an experiment asks servers, each with the section that says which one."""
    return {key: section for key, section in ASKING.items() if value_at(settings, key) == "openai"}


def value_at(settings: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key."""
    value: Any = settings
    for part in key.split("."):
        value = value[part]
    return value


def _exists(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # a name that is none, a home that there is not
        return False
