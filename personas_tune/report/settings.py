"""What every stage was made with, and by which versions."""

from collections.abc import Iterator, Mapping
from typing import Any

from personas_tune.report.figure import Figure, write_table
from personas_tune.report.markup import join, tag
from personas_tune.report.run import Run

_ABSENT = "\N{EN DASH}"


def settings_figure(run: Run) -> Figure:
    """Settings of each stage, folded, and versions."""
    folded = [
        tag(
            "details",
            tag("summary", tag("code", f"{stage}/")),
            write_table(["key", "value"], _rows(manifest), n_text=2),
        )
        for stage, manifest in run.manifests.items()
    ]
    versions = versions_of(run)
    table = write_table(["package", "version"], sorted(versions.items()), n_text=2)
    folded.append(tag("details", tag("summary", "versions"), table))
    says = "As the stages recorded them. Keys and passwords are never recorded."
    return Figure("settings", "Settings and versions", says, join(folded), size="wide")


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as dotted keys and texts, in the manifest's order."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", written(value)


def differing(mine: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Settings that aren't equal, as dotted keys and both texts; what only one has stands in one line, however deep."""
    for key in {**mine, **theirs}:
        pair = (mine.get(key, _ABSENT), theirs.get(key, _ABSENT))
        if all(isinstance(value, Mapping) for value in pair):
            yield from differing(*pair, f"{prefix}{key}.")
        elif pair[0] != pair[1]:
            yield f"{prefix}{key}", _in_a_line(pair[0]), _in_a_line(pair[1])


def _in_a_line(value: Any) -> str:
    return ", ".join(f"{key}: {text}" for key, text in flat(value)) if isinstance(value, Mapping) else written(value)


def written(value: Any) -> str:
    """A setting as YAML has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return ", ".join(map(written, value)) or "[]"
    return "{}" if value == {} else str(value)


def versions_of(run: Run) -> dict[str, str]:
    """Versions of the last stage that recorded any: the evaluation, where there is one."""
    recorded = [manifest["versions"] for manifest in run.manifests.values() if manifest.get("versions")]
    return dict(run.manifests.get("eval", {}).get("versions") or (recorded[-1] if recorded else {}))


def _rows(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    seed = manifest.get("seed")
    return [*([] if seed is None else [("seed", str(seed))]), *flat(manifest.get("settings") or {})]
