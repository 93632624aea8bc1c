"""What an experiment's files say about one adapter: its persona, its training, what was measured with it."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from personas_tune.adapters.files import load_about
from personas_tune.errors import DataError
from personas_tune.workspace import MANIFEST, Workspace, prompt_inputs, read_json, sha256_of_file

MAX_WORDS = 10
IMPORTED = {"trained": "elsewhere, and imported from a PEFT folder"}


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
        is_quantised: Whether it was trained on its base in 4 bits (NF4).
        max_seq_len: Most tokens of a row; None if there was no bound.
        dataset: What kind of log it rates for, such as ``movielens``; None if another log was prepared since.
        data_sha256: Over the sha256 of all files that its prompts were made of; None if it is imported.
        persona: Who it stands for; None for adapters of all users, or of users dealt out at random.
        measured: What agents that use it reached; empty if it hasn't been evaluated since it was trained.
    """

    training: Mapping[str, str]
    is_imported: bool = False
    is_quantised: bool = False
    max_seq_len: int | None = None
    dataset: str | None = None
    data_sha256: str | None = None
    persona: Persona | None = None
    measured: tuple[Measured, ...] = ()


def files_of_training(folder: Path) -> dict[str, str]:
    """sha256 by path of all files that an adapter set was made of, its base's among them.

    Args:
        folder: ``adapters/<set>``.

    Raises:
        MissingInputError: If the set hasn't been trained.
        DataError: If its manifest is damaged.
    """
    manifest = read_json(folder / MANIFEST)
    with _naming(folder / MANIFEST):
        return dict(manifest["inputs"])


def read_facts(workspace: Workspace, set_name: str, adapter: str) -> Facts:
    """Collect the facts of one adapter, all from what stages noted: the config may have changed since.

    Raises:
        MissingInputError: If the set hasn't been trained.
        DataError: If one of the files is damaged.
    """
    folder = workspace.adapter_set(set_name)
    manifest, inputs = read_json(folder / MANIFEST), files_of_training(folder)
    with _naming(folder / MANIFEST):
        settings = manifest["settings"]
        adapter_set = settings["adapter_set"]
        is_imported = bool(adapter_set.get("peft"))
        of_persona = adapter_set["per"] == "persona" and not adapter_set.get("shuffle_personas")
        max_seq_len = (settings.get("tokenizer") or {}).get("max_seq_len")
        quantised = is_quantised(settings["model"])
        common = _common(manifest)
    lora = _lora(load_about(folder / adapter), is_imported)
    course = IMPORTED if is_imported else _training(folder, adapter)
    samples = _samples_manifest(workspace, inputs)
    return Facts(
        training={**course, **lora, **common},
        is_imported=is_imported,
        is_quantised=quantised,
        max_seq_len=max_seq_len if isinstance(max_seq_len, int) else None,
        dataset=_log_format(workspace, samples),
        data_sha256=None if is_imported else _hash_of_prompts(workspace, inputs),
        persona=_persona(workspace, adapter, samples) if of_persona else None,
        measured=tuple(_measured(workspace, set_name, adapter if of_persona else None)),
    )


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Tell that a file lacks what it should hold."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, ZeroDivisionError) as error:
        raise DataError(
            f"it doesn't say what it should ({type(error).__name__}: {error})",
            where=str(file),
            remedy="run the stage that wrote it again",
        ) from error


def is_quantised(model: Mapping[str, Any]) -> bool:
    """Whether a model section trains on an NF4 base (QLoRA)."""
    builder = str(model.get("_component_", "")).rpartition(".")[2]
    return bool(model.get("quantize_base")) or builder.startswith("qlora_")


def _training(folder: Path, adapter: str) -> dict[str, str]:
    manifest, trained = read_json(folder / MANIFEST), read_json(folder / adapter / "training.json")
    with _naming(folder / adapter / "training.json"):
        done = f"{trained['rows']} rows, {trained['steps']} steps"
    with _naming(folder / MANIFEST):
        settings, optimizer = manifest["settings"], manifest["settings"].get("optimizer") or {}
        adapter_set, scheduler = settings["adapter_set"], settings.get("lr_scheduler") or {}
        facts: dict[str, Any] = {
            "trained on": done,
            "users dealt out at random": "yes, as a control" if adapter_set.get("shuffle_personas") else None,
            "memories in the prompts": adapter_set["memories"],
            "epochs": settings["epochs"],
            "rows per step": settings["batch_size"] * settings["gradient_accumulation_steps"],
            "optimizer": " ".join([_component(optimizer), *_arguments(optimizer, "lr", "weight_decay")]),
            "learning rate schedule": _component(scheduler) if scheduler else None,
            "dtype of the base": settings["dtype"],
            "seed": manifest["seed"],
        }
    return {label: str(value) for label, value in facts.items() if value is not None}


def _lora(about: Mapping[str, Any], is_imported: bool) -> dict[str, str]:
    """What the adapter's own file says; an imported one was trained with a dropout of which nothing is known here."""
    keys = ("rank", "alpha") if is_imported else ("rank", "alpha", "dropout")
    return {f"LoRA {key}": f"{about[key]:g}" for key in keys if isinstance(about.get(key), int | float)}


def _common(manifest: Mapping[str, Any]) -> dict[str, str]:
    model, per = manifest["settings"]["model"], manifest["settings"]["adapter_set"]["per"]
    return {
        "adapters of this set": "one for all users" if per == "all" else "one per persona",
        "adapted modules": _targets(model),
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


def _hash_of_prompts(workspace: Workspace, inputs: Mapping[str, str]) -> str:
    """One sha256 over those of the files that train prompts are made of, in hex, sorted, a line each."""
    names = {path.parts[-2:] for path in prompt_inputs(workspace)}
    hashes = sorted(sha for path, sha in inputs.items() if Path(path).parts[-2:] in names)
    return hashlib.sha256("".join(f"{sha}\n" for sha in hashes).encode()).hexdigest()


def _samples_manifest(workspace: Workspace, inputs: Mapping[str, str]) -> dict[str, Any] | None:
    """That of the samples, unless they were made anew since the adapters were trained."""
    samples = workspace.train_samples
    manifest = samples.parent / MANIFEST
    if not samples.is_file() or not manifest.is_file() or sha256_of_file(samples) not in inputs.values():
        return None
    made = read_json(manifest)
    with _naming(manifest):
        return {**made, "inputs": dict(made["inputs"])}


def _log_format(workspace: Workspace, samples: Mapping[str, Any] | None) -> str | None:
    """The kind of log that the samples were made of, unless another one was prepared since."""
    manifest = workspace.interactions.parent / MANIFEST
    if samples is None or not manifest.is_file():
        return None
    prepared = read_json(manifest)
    with _naming(manifest):
        is_same = prepared["outputs"][workspace.interactions.name] in samples["inputs"].values()
        return str(prepared["settings"]["data"]["format"]) if is_same else None


def _persona(workspace: Workspace, adapter: str, samples: Mapping[str, Any] | None) -> Persona | None:
    """The persona of an adapter, unless users have been grouped anew since its samples were made."""
    if samples is None or not workspace.clustering.is_file() or not workspace.personas.is_file():
        return None
    if sha256_of_file(workspace.personas) not in samples["inputs"].values():
        return None
    record = read_json(workspace.clustering)
    with _naming(workspace.clustering):
        words = [str(entry["word"]) for entry in record["words"].get(adapter, [])]
        return Persona(int(record["sizes"][int(adapter)]), tuple(words[:MAX_WORDS]))


def _measured(workspace: Workspace, set_name: str, persona: str | None) -> Iterator[Measured]:
    """Figures of the agents of a set, unless the set was trained again since."""
    manifest = workspace.metrics.parent / MANIFEST
    if not workspace.metrics.is_file() or not manifest.is_file():
        return
    evaluated = read_json(manifest)
    with _naming(manifest):
        seen = evaluated["inputs"].values()
    if sha256_of_file(workspace.adapter_set(set_name) / MANIFEST) not in seen:
        return
    metrics = read_json(workspace.metrics)
    with _naming(workspace.metrics):
        for row in metrics["agents"]:
            if row["adapters"] != set_name:
                continue
            yield _figures(row, row, None)
            if persona is not None and persona in row["per_persona"]:
                yield _figures(row, row["per_persona"][persona], persona)


def _figures(agent: Mapping[str, Any], row: Mapping[str, Any], persona: str | None) -> Measured:
    urr = 1 - row["n_parsed"] / row["n"]
    return Measured(agent["name"], agent["readout"], persona, row["n"], row["rmse"], row["mae"], urr)
