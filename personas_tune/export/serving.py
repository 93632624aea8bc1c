"""How to serve what was exported: vLLM's command line, and the same as JSON for programs.

Argument names, allowed ranks, the forms of ``--lora-modules`` and which models adapt their output layer are those of
vLLM 0.33 (``LoRAConfig``, ``MaxLoRARanks``, ``LoRAParserAction``, each model's ``embedding_modules``).
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from personas_tune.errors import DataError
from personas_tune.workspace import read_json

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Families whose models have no lm_head among vLLM's embedding_modules.
NO_ADAPTED_OUTPUT = ("qwen2", "mistral", "gemma")
RECORD = "export.json"  # beside the adapters of one set, in one form: what serving them takes


@dataclass(frozen=True)
class Written:
    """What was written of one adapter, as far as serving it is concerned.

    Args:
        rank: The largest rank in it; None for a merged checkpoint.
        is_dora: Whether it is a DoRA adapter, which vLLM refuses.
        no_output: Whether it adapts an output layer that vLLM can't adapt in this family.
        errors: What cutting its rank cost: the relative Frobenius error of each module's B A; empty if it wasn't cut.
    """

    rank: int | None
    is_dora: bool = False
    no_output: bool = False
    errors: tuple[float, ...] = ()

    @property
    def in_words(self) -> str:
        """Its form and rank, and what cutting it cost."""
        if self.rank is None:
            return "a merged checkpoint"
        text = f"a PEFT folder of rank {self.rank}"
        return f"{text}, cut: {self.truncation}" if self.errors else text

    @property
    def truncation(self) -> str:
        """What cutting its rank cost, in words; only where it was cut."""
        mean = sum(self.errors) / len(self.errors)
        return f"B A is off by {mean:.2%} on average, by {max(self.errors):.2%} in the worst module"

    @property
    def why_not_served(self) -> str | None:
        """Why vLLM won't take it as an adapter, and what would work; None if it does."""
        if self.rank is None:
            return None
        if self.is_dora:
            return "vLLM takes no DoRA adapters; serve it merged (export.format=merged)"
        if self.no_output:
            return "vLLM adapts no output layer in this family; serve it merged (export.format=merged)"
        if vllm_rank(self.rank) is None:
            return (
                f"rank {self.rank} is above vLLM's largest, {VLLM_RANKS[-1]}; cut it "
                f"(export.max_rank={VLLM_RANKS[-1]}, lossy) or serve it merged (export.format=merged)"
            )
        return None


@dataclass(frozen=True)
class Exported:
    """One exported adapter: its set, its name within the set, its folder, and what was written."""

    set_name: str
    adapter: str
    path: Path
    written: Written

    @property
    def name(self) -> str:
        """The model's name on a server."""
        return served_name(self.set_name, self.adapter)


def served_name(set_name: str, adapter: str) -> str:
    """What an adapter is called on a server."""
    return f"{set_name}-{adapter}"


@dataclass(frozen=True)
class ExportedSet:
    """The adapters of one set in one form, as :data:`RECORD` keeps them for later runs.

    Args:
        base: The key of their base under ``bases``; None for the experiment's own.
        base_name: What cards and adapters call it.
        loadable: What servers load it by.
        adapters: In order.
    """

    base: str | None
    base_name: str
    loadable: str
    adapters: tuple[Exported, ...]


def set_record(base: str | None, base_name: str, loadable: str, written: Mapping[str, Written]) -> dict[str, Any]:
    """``export.json`` of one set: its base, and what was written of each adapter."""
    adapters = {name: asdict(each) for name, each in written.items()}
    return {"base": base, "base_name": base_name, "loadable": loadable, "adapters": adapters}


def read_set(folder: Path) -> ExportedSet:
    """Read back what was exported into ``export/<set>`` or ``export/merged/<set>``.

    Raises:
        MissingInputError: If there is no record.
        DataError: If it is damaged.
    """
    record = read_json(folder / RECORD)
    try:
        adapters = [
            Exported(folder.name, name, folder / name, Written(**{**each, "errors": tuple(each["errors"])}))
            for name, each in record["adapters"].items()
        ]
        return ExportedSet(record["base"], record["base_name"], str(record["loadable"]), tuple(adapters))
    except (LookupError, TypeError, AttributeError) as error:
        raise DataError(
            f"not a record of exported adapters ({type(error).__name__}: {error})",
            where=str(folder / RECORD),
            remedy=f"remove {folder} and export the set again",
        ) from error


def read_all_sets(root: Path) -> list[ExportedSet]:
    """All that lies in ``export/``, of this run and of earlier ones; adapters whose folder is gone are left out."""
    records = [*sorted(root.glob(f"*/{RECORD}")), *sorted(root.glob(f"merged/*/{RECORD}"))]
    found = [read_set(record.parent) for record in records]
    return [replace(each, adapters=tuple(one for one in each.adapters if one.path.is_dir())) for each in found]


def serving_records(
    sets: Sequence[ExportedSet], current: Mapping[str | None, tuple[str, str]]
) -> dict[str, dict[str, Any]]:
    """The serving files by name: one per base.

    Args:
        sets: All that was exported.
        current: Of each base of this run, its name and what servers load it by. Sets that were exported for a base of
            another name are left out.
    """
    bases = {**{each.base: (each.base_name, each.loadable) for each in sets}, **current}
    records = {}
    for base, (name, loadable) in bases.items():
        own = [one for each in sets if (each.base, each.base_name) == (base, name) for one in each.adapters]
        records["serving.json" if base is None else f"serving_{base}.json"] = serving_record(loadable, own)
    return records


def vllm_rank(rank: int) -> int | None:
    """The smallest ``--max-lora-rank`` that takes a rank; None if it is above all."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


def vllm_command(base: str, adapters: Mapping[str, str], largest_rank: int) -> str:
    """The shell line that serves a base with adapters (folders by name) side by side."""
    modules = [_lora_module(name, path) for name, path in adapters.items()]
    options = ["--enable-lora", "--max-lora-rank", str(vllm_rank(largest_rank)), "--max-loras", str(len(modules))]
    return shlex.join(["vllm", "serve", base, *options, "--lora-modules", *modules])


def _lora_module(name: str, path: str) -> str:
    """``name=path``; vLLM takes what has a comma for JSON."""
    return json.dumps({"name": name, "path": path}) if "," in path else f"{name}={path}"


def merged_command(name: str, path: str) -> str:
    """The shell line that serves a merged checkpoint."""
    return shlex.join(["vllm", "serve", path, "--served-model-name", name])


def serving_record(base: str, exported: Sequence[Exported]) -> dict[str, Any]:
    """``serving.json`` of one base: what it has and how to start it.

    ``adapters`` are PEFT folders, which one server holds side by side; each entry of ``merged`` is a model of its own.
    ``max_lora_rank`` and ``command`` are null where no adapter can be served so, ``notes`` say why.
    """
    adapters = [each for each in exported if each.written.rank is not None]
    merged = [each for each in exported if each.written.rank is None]
    served = {each.name: str(each.path) for each in adapters if each.written.why_not_served is None}
    rank = max((each.written.rank or 0 for each in adapters if each.name in served), default=0)
    return {
        "base": base,
        "max_lora_rank": vllm_rank(rank) if served else None,
        "adapters": {each.name: _entry(each) for each in adapters},
        "merged": {
            each.name: {**_entry(each), "command": merged_command(each.name, str(each.path))} for each in merged
        },
        "command": vllm_command(base, served, rank) if served else None,
        "notes": [f"{each.name}: {each.written.why_not_served}" for each in adapters if each.name not in served],
    }


def serving_lines(record: Mapping[str, Any]) -> list[str]:
    """The commands of :func:`serving_record`, and its notes, as lines to print."""
    commands = [record["command"], *(entry["command"] for entry in record["merged"].values())]
    return [*record["notes"], *(f"serve with: {command}" for command in commands if command is not None)]


def _entry(each: Exported) -> dict[str, Any]:
    entry: dict[str, Any] = {"set": each.set_name, "adapter": each.adapter, "path": str(each.path)}
    errors = each.written.errors
    if each.written.rank is not None:
        entry["rank"] = each.written.rank
    if errors:
        entry["truncation_error"] = {"mean": sum(errors) / len(errors), "max": max(errors)}
    return entry
