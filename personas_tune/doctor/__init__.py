"""What is missing on this machine or for an experiment, each with what mends it; would it fit, and what runs where."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from personas_tune import config
from personas_tune.doctor.findings import Finding, print_section
from personas_tune.doctor.machine import GB, Device, check_machine, find_gpus, main_memory
from personas_tune.doctor.needs import check_needs
from personas_tune.doctor.packages import check_commands, check_extras, check_packages
from personas_tune.doctor.stages import check_stages
from personas_tune.errors import ConfigError, PersonasTuneError

if TYPE_CHECKING:
    from omegaconf import DictConfig

Section = tuple[str, list[Finding]]


def print_findings(name: str | None, overrides: Sequence[str] = (), gpu_memory: float | None = None) -> None:
    """Look at the machine, and at what an experiment needs; print a line each.

    Args:
        name: A config's name or path, or None.
        overrides: As recipes take them.
        gpu_memory: GB of a GPU to ask about in the place of this machine's; None for those.

    Raises:
        PersonasTuneError: If something that is needed is missing, after all lines are printed.
    """
    if gpu_memory is not None and not gpu_memory > 0:
        raise ConfigError(f"{gpu_memory:g} GB", where="--gpu-memory", remedy="give the GB of a GPU, such as 24")
    if name is None and (overrides or gpu_memory is not None):
        given = overrides[0] if overrides else "--gpu-memory"
        raise ConfigError("says nothing without a config", where=given, remedy="add --config NAME")
    sections = _of_machine() if name is None else _of_experiment(config.load_experiment(name, overrides), gpu_memory)
    n_missing = sum(print_section(title, findings) for title, findings in sections)
    if n_missing:
        n_checks = sum(len(findings) for _, findings in sections)
        raise PersonasTuneError(f"{n_missing} of {n_checks} checks found something missing", where="doctor")


def _of_machine() -> list[Section]:
    return [
        ("packages", check_packages()),
        ("optional packages", check_extras()),
        ("commands", check_commands()),
        ("machine", check_machine(None, None, None)),
    ]


def _of_experiment(cfg: "DictConfig", gpu_memory: float | None) -> list[Section]:
    packages = check_packages()
    settings = {**config.plain(cfg), "output_dir": cfg.output_dir, "device": cfg.device}  # others as references
    wanted = None if gpu_memory is not None else cfg.device
    return [
        ("packages", _summed_up(packages)),
        ("machine", check_machine(wanted, cfg.dtype, cfg.output_dir)),
        ("inputs", check_needs(cfg)),
        *_check_bases(cfg, gpu_memory, imports=packages[-1].state == "ok"),
        ("stages", check_stages(settings)),
    ]


def _summed_up(packages: Sequence[Finding]) -> list[Finding]:
    """Packages in the way of an experiment, or a line that there are none."""
    bad = [finding for finding in packages if finding.state != "ok"]
    told = f"{len(packages)} checks of packages passed (`personas-tune doctor` names them)"
    return bad or [Finding("ok", told)]


def _check_bases(cfg: "DictConfig", gpu_memory: float | None, *, imports: bool) -> list[Section]:
    """A section for each base that is trained or measured."""
    used = [*cfg.adapter_sets.values(), *cfg.agents.values()]
    names = list(dict.fromkeys(entry.base for entry in used if entry.get("adapters") is None))
    if names and not imports:
        return [
            ("bases", [Finding("note", "bases are not looked at, since torch and torchtune don't import together")])
        ]
    return [(f"base {name}" if name else "base", _check_base(cfg, name, gpu_memory)) for name in names]


def _check_base(cfg: "DictConfig", name: str | None, gpu_memory: float | None) -> list[Finding]:
    from personas_tune.doctor.bases import build_network, check_checkpoint, check_tokenizer
    from personas_tune.doctor.imports import check_imported_sets
    from personas_tune.doctor.knobs import knobs_of
    from personas_tune.doctor.memory import check_memory
    from personas_tune.prompts.labels import rating_labels

    try:
        sections = config.base_sections(cfg, name)
        network = build_network(sections, cfg.dtype, recompute=False)
        labels = rating_labels(**cfg.data.rating_scale)
        findings = check_checkpoint(network, sections)
        of_tokenizer, chat = (
            check_tokenizer(network, sections["tokenizer"], labels) if _has_files(sections) else ([], None)
        )
        knobs, source = knobs_of(cfg, name, chat, labels)
        imported = check_imported_sets(cfg, name, sections)
        memory = list(check_memory(cfg, name, knobs, source, _devices(cfg.device, gpu_memory)))
    except PersonasTuneError as error:
        return [Finding("missing", line) for line in error.lines]
    return [*findings, *of_tokenizer, *imported, *memory, *_check_processes(cfg, name)]


def _has_files(sections: dict[str, Any]) -> bool:
    from personas_tune.adapters.base_model import TOKENIZER_FILES

    named = [sections["tokenizer"].get(key) for key in TOKENIZER_FILES]
    return all(Path(str(file)).is_file() for file in named if file is not None)


def _devices(device: str, gpu_memory: float | None) -> list[Device]:
    """What a base would run on; none if it wants a GPU, and there is none to ask about."""
    if gpu_memory is not None:
        return [Device(f"a GPU of {gpu_memory:g} GB", gpu_memory * GB, True)]
    if device.startswith("cuda"):
        return [gpu for gpu in find_gpus() if gpu.name.startswith(f"GPU {device.partition(':')[2] or 0} ")]
    memory = main_memory()
    return [] if memory is None else [memory]


def _check_processes(cfg: "DictConfig", name: str | None) -> list[Finding]:
    """How several GPUs would share the training of a base's largest set."""
    gpus: list[Any] = find_gpus() if cfg.device.startswith("cuda") else []
    if len(gpus) < 2:
        return []
    from personas_tune.doctor.knobs import most_adapters, trained_sets_of
    from personas_tune.training.teams import place_adapters

    n_adapters = most_adapters(cfg, trained_sets_of(cfg, name))
    if not n_adapters:
        return []
    places = place_adapters([1] * n_adapters, len(gpus), cfg.parallel)
    told = "; ".join(f"process {'+'.join(map(str, p.ranks))}: {len(p.adapters)} adapters" for p in places)
    return [Finding("ok", f"tune run --nproc_per_node {len(gpus)}: parallel={cfg.parallel}: {told}")]
