"""How to serve what was exported: vLLM's command line, and the same as JSON for programs.

Argument names, allowed ranks and the forms of ``--lora-modules`` are those of vLLM 0.33 (``LoRAConfig``,
``MaxLoRARanks``, ``LoRAParserAction``).
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class Exported:
    """One exported adapter.

    Args:
        set_name: Its adapter set.
        adapter: Its name within the set.
        path: Its folder.
        rank: The largest rank in it; None for a merged checkpoint.
        is_dora: Whether it is a DoRA adapter, which vLLM refuses.
        errors: What cutting its rank cost: the relative Frobenius error of each module's B A; empty if it wasn't cut.
    """

    set_name: str
    adapter: str
    path: Path
    rank: int | None
    is_dora: bool = False
    errors: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        """The model's name on a server."""
        return f"{self.set_name}-{self.adapter}"

    @property
    def in_words(self) -> str:
        """What was written: its form and rank, and what cutting it cost."""
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
            return f"{self.name}: vLLM takes no DoRA adapters; serve it merged (export.format=merged)"
        if vllm_rank(self.rank) is None:
            return (
                f"{self.name}: rank {self.rank} is above vLLM's largest, {VLLM_RANKS[-1]}; cut it "
                f"(export.max_rank={VLLM_RANKS[-1]}, lossy) or serve it merged (export.format=merged)"
            )
        return None


def vllm_rank(rank: int) -> int | None:
    """The smallest ``--max-lora-rank`` that takes a rank; None if it is above all."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


def vllm_command(base: str, exported: Sequence[Exported]) -> str | None:
    """The shell line that serves a base with its adapters side by side; None if vLLM takes none of them."""
    served = _served(exported)
    if not served:
        return None
    modules = [_lora_module(each.name, str(each.path)) for each in served]
    options = ["--enable-lora", "--max-lora-rank", str(_max_rank(served)), "--max-loras", str(len(served))]
    return shlex.join(["vllm", "serve", base, *options, "--lora-modules", *modules])


def _served(exported: Sequence[Exported]) -> list[Exported]:
    return [each for each in exported if each.rank is not None and each.why_not_served is None]


def _max_rank(served: Sequence[Exported]) -> int | None:
    return vllm_rank(max(each.rank or 0 for each in served)) if served else None


def _lora_module(name: str, path: str) -> str:
    """``name=path``; vLLM takes what has a comma for JSON."""
    return json.dumps({"name": name, "path": path}) if "," in path else f"{name}={path}"


def merged_command(each: Exported) -> str:
    """The shell line that serves a merged checkpoint."""
    return shlex.join(["vllm", "serve", str(each.path), "--served-model-name", each.name])


def serving_record(base: str, exported: Sequence[Exported]) -> dict[str, Any]:
    """``serving.json`` of one base: what it has and how to start it.

    ``adapters`` are PEFT folders, which one server holds side by side; each entry of ``merged`` is a model of its own.
    ``max_lora_rank`` and ``command`` are null where no adapter can be served so, ``notes`` say why.
    """
    merged = [each for each in exported if each.rank is None]
    return {
        "base": base,
        "max_lora_rank": _max_rank(_served(exported)),
        "adapters": {each.name: _entry(each) for each in exported if each.rank is not None},
        "merged": {each.name: {**_entry(each), "command": merged_command(each)} for each in merged},
        "command": vllm_command(base, exported),
        "notes": [why for each in exported if (why := each.why_not_served)],
    }


def serving_lines(record: Mapping[str, Any]) -> list[str]:
    """The commands of :func:`serving_record`, and its notes, as lines to print."""
    commands = [record["command"], *(entry["command"] for entry in record["merged"].values())]
    return [*record["notes"], *(f"serve with: {command}" for command in commands if command is not None)]


def _entry(each: Exported) -> dict[str, Any]:
    entry: dict[str, Any] = {"set": each.set_name, "adapter": each.adapter, "path": str(each.path)}
    if each.rank is not None:
        entry["rank"] = each.rank
    if each.errors:
        entry["truncation_error"] = {"mean": sum(each.errors) / len(each.errors), "max": max(each.errors)}
    return entry
