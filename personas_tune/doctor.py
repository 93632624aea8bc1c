"""What is missing on this machine, each with the command that mends it."""

import importlib
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from packaging.requirements import Requirement

from personas_tune.config import base_sections, load_experiment
from personas_tune.errors import PersonasTuneError
from personas_tune.llm.settings import ServerSettings, access_to

LOW_DISK_GB = 20


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Args:
        good: Whether it is as it should be.
        what: What was found.
        mend: The command or setting that helps, if it isn't.
    """

    good: bool
    what: str
    mend: str = ""

    def __str__(self) -> str:
        mark = "ok     " if self.good else "missing"
        return f"{mark}  {self.what}" + (f"; {self.mend}" if self.mend and not self.good else "")


def print_findings(config: str | None) -> None:
    """Look at the machine, and at what an experiment needs; print a line each.

    Args:
        config: A config's name or path, or None.

    Raises:
        PersonasTuneError: If something that is needed is missing, after all lines are printed.
    """
    cfg = None if config is None else load_experiment(config)
    device = None if cfg is None else cfg.device
    findings = [*check_packages(), check_imports(), check_device(device), check_disk()]
    if cfg is not None:
        findings += [*check_servers(cfg), *check_experiment_inputs(cfg)]
    for finding in findings:
        print(finding)
    n_missing = sum(not finding.good for finding in findings)
    if n_missing:
        raise PersonasTuneError(f"{n_missing} of {len(findings)} checks found something missing", where="doctor")


def check_packages() -> list[Finding]:
    """Whether each required package is installed in a version that works."""
    findings = []
    for line in requires("personas-tune") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        mend = f"pip install '{requirement.name}{requirement.specifier}'"
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            findings.append(Finding(False, f"{requirement.name} is not installed", mend))
            continue
        good = requirement.specifier.contains(found, prereleases=True)
        findings.append(Finding(good, f"{requirement.name} {found} (works: {requirement.specifier or 'any'})", mend))
    return findings


def check_imports() -> Finding:
    """Whether torch, torchao and torchtune fit together."""
    try:
        importlib.import_module("torchtune")
    except Exception as error:  # any error at all is the finding
        reason = str(error).splitlines()[0]
        return Finding(False, f"torchtune does not import ({reason})", "pip install --force-reinstall personas-tune")
    return Finding(True, "torch, torchao and torchtune import together")


def check_device(device: str | None = None) -> Finding:
    """Whether there is a GPU; without one, `device=cpu` works.

    Args:
        device: What an experiment asks for; None if nothing in particular.
    """
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        return Finding(False, f"torch does not import ({error})", "pip install --force-reinstall personas-tune")
    if torch.cuda.is_available():
        return Finding(True, f"GPU {torch.cuda.get_device_name()}")
    good = device is None or not device.startswith("cuda")
    return Finding(good, "no CUDA GPU: use device=cpu dtype=fp32 and a small base", "set device=cpu dtype=fp32")


def check_disk() -> Finding:
    """Whether this folder has room for a checkpoint and adapters."""
    free = shutil.disk_usage(".").free / 1e9
    return Finding(
        free > LOW_DISK_GB, f"{free:.0f} GB free here (Phi-3-Mini takes 8)", "free some, or set output_dir elsewhere"
    )


def check_servers(cfg: DictConfig) -> list[Finding]:
    """Whether an experiment's language model servers have addresses and, where they need one, a key."""
    findings = []
    for section, keys in {
        "distill": ["distill.distiller"],
        "embedding": ["personas.embedder", "retrieval.embedder"],
    }.items():
        asking = [key for key in keys if OmegaConf.select(cfg, key) == "openai"]
        if not asking:
            continue
        what = f"{', '.join(asking)}: {cfg[section].model}"
        try:
            url = access_to(ServerSettings.of(cfg[section])).shown_url
        except PersonasTuneError as error:
            offline = " ".join(f"{key}={'template' if key.endswith('distiller') else 'lsa'}" for key in asking)
            findings.append(Finding(False, f"{what}: {error.what}", f"{error.remedy}; or set {offline}"))
        else:
            findings.append(Finding(True, f"{what} at {url}"))
    return findings


def check_experiment_inputs(cfg: DictConfig) -> list[Finding]:
    """Whether an experiment's own files and the bases that it trains or measures are there."""
    findings = []
    for key in ("data.path", "data.item_metadata", "data.cohort.exclude", "distill.path", "distill.memories_path"):
        path = OmegaConf.select(cfg, key)
        if path is not None:
            findings.append(Finding(Path(path).expanduser().exists(), f"{key} {path}", f"set {key} to what is there"))
        elif key == "data.path" and cfg.data.format != "world":
            findings.append(Finding(False, "data.path is not set", "set data.path (docs/own_data.md says to what)"))
    used = [*cfg.adapter_sets.values(), *cfg.agents.values()]
    for name in dict.fromkeys(entry.base for entry in used):
        findings += _check_base(cfg, name)
    return findings


def _check_base(cfg: DictConfig, name: str | None) -> list[Finding]:
    from personas_tune.adapters.base_model import checkpoint_inputs

    called = f"base {name}" if name else "base"
    try:
        checkpoint_inputs(**base_sections(cfg, name))
    except PersonasTuneError as error:
        return [Finding(False, f"{called}: {line}") for line in error.lines]
    return [Finding(True, f"{called}: checkpoint and tokenizer are there")]
