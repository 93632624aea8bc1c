"""What an experiment's files say about one adapter: its persona, its training, what was measured with it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from personas_tune.errors import DataError
from personas_tune.workspace import MANIFEST, Workspace, read_json, sha256_of_file

MAX_WORDS = 10


@dataclass(frozen=True)
class Persona:
    """Who an adapter stands for: how many users, and the words that set their profiles apart."""

    n_users: int
    words: tuple[str, ...]


@dataclass(frozen=True)
class Measured:
    """Figures of one agent, on the test rows of all its users or of this adapter's persona (``persona``) only."""

    agent: str
    readout: str
    persona: str | None
    n: int
    rmse: float | None
    mae: float | None
    urr: float


@dataclass(frozen=True)
class Facts:
    """All that a model card says about an adapter beside its form.

    Args:
        training: What it was trained with, by label, in order.
        is_imported: Whether it came from a PEFT folder, and was trained elsewhere.
        data_sha256: Of the samples that it was trained on; None if it is imported.
        persona: Who it stands for; None for adapters of all users, or of users dealt out at random.
        measured: What agents that use it reached; empty if it hasn't been evaluated since it was trained.
    """

    training: Mapping[str, str]
    is_imported: bool
    data_sha256: str | None
    persona: Persona | None
    measured: tuple[Measured, ...]


def read_facts(workspace: Workspace, set_name: str, adapter: str) -> Facts:
    """Collect the facts of one adapter.

    Raises:
        MissingInputError: If the set hasn't been trained.
        DataError: If one of the files is damaged.
    """
    folder = workspace.adapter_set(set_name)
    manifest = read_json(folder / MANIFEST)
    try:
        adapter_set, data_sha256 = manifest["settings"]["adapter_set"], _hash_of_samples(manifest["inputs"])
        is_imported = bool(adapter_set.get("peft"))
        of_persona = adapter_set["per"] == "persona" and not adapter_set.get("shuffle_personas")
        return Facts(
            training=(
                _of_import(manifest)
                if is_imported
                else _training(manifest, read_json(folder / adapter / "training.json"))
            ),
            is_imported=is_imported,
            data_sha256=None if is_imported else data_sha256,
            persona=_persona(workspace, adapter, data_sha256) if of_persona else None,
            measured=tuple(_measured(workspace, set_name, adapter if of_persona else None)),
        )
    except (LookupError, TypeError, AttributeError, ValueError, ZeroDivisionError) as error:
        raise DataError(
            f"they don't say what they should ({type(error).__name__}: {error})",
            where=f"manifests, personas/clustering.json or eval/metrics.json that tell of adapters/{set_name}",
            remedy="run the stage that wrote them again",
        ) from error


def _training(manifest: Mapping[str, Any], trained: Mapping[str, Any]) -> dict[str, str]:
    settings, optimizer = manifest["settings"], manifest["settings"].get("optimizer") or {}
    adapter_set, scheduler = settings["adapter_set"], settings.get("lr_scheduler") or {}
    facts: dict[str, Any] = {
        "trained on": f"{trained['rows']} rows, {trained['steps']} steps",
        "users dealt out at random": "yes, as a control" if adapter_set.get("shuffle_personas") else None,
        "memories in the prompts": adapter_set["memories"],
        "epochs": settings["epochs"],
        "rows per step": settings["batch_size"] * settings["gradient_accumulation_steps"],
        "optimizer": " ".join([_component(optimizer), *_arguments(optimizer, "lr", "weight_decay")]),
        "learning rate schedule": _component(scheduler) if scheduler else None,
        "dtype of the base": settings["dtype"],
        "seed": manifest["seed"],
        **_common(manifest),
    }
    return {label: str(value) for label, value in facts.items() if value is not None}


def _of_import(manifest: Mapping[str, Any]) -> dict[str, str]:
    return {"trained": "elsewhere, and imported from a PEFT folder", **_common(manifest)}


def _common(manifest: Mapping[str, Any]) -> dict[str, str]:
    model, per = manifest["settings"]["model"], manifest["settings"]["adapter_set"]["per"]
    return {
        "adapters of this set": "one for all users" if per == "all" else "one per persona",
        "adapted modules": _targets(model),
        "LoRA rank, alpha, dropout": ", ".join(str(model.get(f"lora_{key}")) for key in ("rank", "alpha", "dropout")),
        "personas-tune": str(manifest["versions"].get("personas_tune")),
    }


def _component(section: Mapping[str, Any]) -> str:
    return str(section.get("_component_", "torch.optim.AdamW")).rpartition(".")[2]


def _arguments(section: Mapping[str, Any], *keys: str) -> list[str]:
    return [f"{key}={section[key]}" for key in keys if key in section]


def _targets(model: Mapping[str, Any]) -> str:
    names = list(model.get("lora_attn_modules") or [])
    names += ["MLP"] if model.get("apply_lora_to_mlp") else []
    return ", ".join([*names, "output"] if model.get("apply_lora_to_output") else names)


def _hash_of_samples(inputs: Mapping[str, str]) -> str | None:
    return next((sha for path, sha in inputs.items() if Path(path).parts[-2:] == ("samples", "train.parquet")), None)


def _persona(workspace: Workspace, adapter: str, data_sha256: str | None) -> Persona | None:
    """The persona of an adapter, unless users have been grouped anew since its samples were made."""
    samples = workspace.train_samples
    files = (workspace.clustering, workspace.personas, samples, samples.parent / MANIFEST)
    if not all(file.is_file() for file in files) or sha256_of_file(samples) != data_sha256:
        return None
    if sha256_of_file(workspace.personas) not in read_json(samples.parent / MANIFEST)["inputs"].values():
        return None
    record = read_json(workspace.clustering)
    words = [str(entry["word"]) for entry in record["words"].get(adapter, [])]
    return Persona(int(record["sizes"][int(adapter)]), tuple(words[:MAX_WORDS]))


def _measured(workspace: Workspace, set_name: str, persona: str | None) -> Iterator[Measured]:
    """Figures of the agents of a set, unless the set was trained again since."""
    manifest = workspace.metrics.parent / MANIFEST
    if not workspace.metrics.is_file() or not manifest.is_file():
        return
    seen = read_json(manifest)["inputs"].values()
    if sha256_of_file(workspace.adapter_set(set_name) / MANIFEST) not in seen:
        return
    for row in read_json(workspace.metrics)["agents"]:
        if row["adapters"] != set_name:
            continue
        yield _figures(row, row, None)
        if persona is not None and persona in row["per_persona"]:
            yield _figures(row, row["per_persona"][persona], persona)


def _figures(agent: Mapping[str, Any], row: Mapping[str, Any], persona: str | None) -> Measured:
    urr = 1 - row["n_parsed"] / row["n"]
    return Measured(agent["name"], agent["readout"], persona, row["n"], row["rmse"], row["mae"], urr)
