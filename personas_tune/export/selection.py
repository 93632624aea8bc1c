"""Which adapters are exported, in which form, and which of an experiment's files decide it."""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

from personas_tune.adapters.files import NATIVE_FILE
from personas_tune.errors import ConfigError, raise_together
from personas_tune.workspace import MANIFEST, Workspace, missing_inputs, read_table


def known_adapters(workspace: Workspace, sets: Iterable[str]) -> dict[str, list[str]]:
    """The adapters of each set, sorted.

    Raises:
        ConfigError: If no set is named.
        MissingInputError: If one hasn't been trained.
    """
    files = {name: workspace.adapter_set(name) / "assignment.parquet" for name in sets}
    if not files:
        raise ConfigError("no adapter set to export", where="export.sets", remedy="name some of adapter_sets")
    raise_together(missing_inputs(list(files.values())))
    return {
        name: sorted(set(read_table(file, ("user_id", "adapter"))["adapter"].to_pylist()))
        for name, file in files.items()
    }


def choose_adapters(known: Mapping[str, Sequence[str]], wanted: Sequence[str] | None) -> dict[str, list[str]]:
    """The adapters to export, by set; a set that has none of those asked for is left out.

    Args:
        known: Those that there are, by set.
        wanted: Names of adapters; None for all.

    Raises:
        ConfigError: If one is asked for that no set has, or none at all.
    """
    if wanted is None:
        return {name: list(adapters) for name, adapters in known.items()}
    if not wanted:
        raise ConfigError("no adapter to export", where="export.adapters", remedy="name some, or leave it null")
    names = sorted(set().union(*known.values()))
    unknown = next((name for name in wanted if name not in names), None)
    if unknown is not None:
        near = get_close_matches(unknown, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
        raise ConfigError(f"no adapter {unknown!r}", where="export.adapters", remedy=hint)
    chosen = {name: [adapter for adapter in adapters if adapter in wanted] for name, adapters in known.items()}
    return {name: adapters for name, adapters in chosen.items() if adapters}


def choose_kind(asked: str, is_dora: bool, max_rank: int | None) -> str:
    """``peft`` or ``merged``, of ``export.format``: ``auto`` merges DoRA, which vLLM doesn't serve.

    Raises:
        ConfigError: If a rank is to be cut that a merged checkpoint doesn't have.
    """
    kind = ("merged" if is_dora else "peft") if asked == "auto" else asked
    if kind == "merged" and max_rank is not None:
        raise ConfigError(
            "a merged checkpoint has no rank to cut", where="export.max_rank", remedy="leave it out, or set format=peft"
        )
    return kind


def files_of_set(workspace: Workspace, name: str, adapters: Sequence[str]) -> list[Path]:
    """What an experiment has on a set: its adapters, and what cards tell of them, where that is there."""
    folder = workspace.adapter_set(name)
    own = [folder / adapter / file for adapter in adapters for file in (NATIVE_FILE, "training.json")]
    stages = [file.parent / MANIFEST for file in (workspace.interactions, workspace.train_samples, workspace.metrics)]
    told = [workspace.metrics, workspace.clustering, workspace.personas, workspace.train_samples, *stages]
    return [folder / MANIFEST, *own, *(file for file in told if file.is_file())]
