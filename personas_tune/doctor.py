"""What is missing on this machine, each with the command that mends it."""

import importlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from personas_tune.config import base_sections, load_experiment
from personas_tune.errors import PersonasTuneError

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
    findings = [*check_packages(), check_imports(), check_device(), check_disk(), check_key()]
    if config is not None:
        findings += check_experiment_inputs(config)
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


def check_device() -> Finding:
    """Whether there is a GPU; without one, `device=cpu` works."""
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        return Finding(True, "no CUDA GPU: use device=cpu dtype=fp32 and a small base")
    return Finding(True, f"GPU {torch.cuda.get_device_name()}")


def check_disk() -> Finding:
    """Whether this folder has room for a checkpoint and adapters."""
    free = shutil.disk_usage(".").free / 1e9
    return Finding(
        free > LOW_DISK_GB, f"{free:.0f} GB free here (Phi-3-Mini takes 8)", "free some, or set output_dir elsewhere"
    )


def check_key() -> Finding:
    """Whether an API key is set; only distill.distiller: openai needs one."""
    found = "OPENAI_API_KEY" in os.environ
    return Finding(
        True, "OPENAI_API_KEY is set" if found else "OPENAI_API_KEY is not set (only the openai distiller needs it)"
    )


def check_experiment_inputs(config: str) -> list[Finding]:
    """Whether an experiment's log and base checkpoint are there."""
    from personas_tune.adapters.base_model import checkpoint_inputs

    cfg = load_experiment(config)
    findings = []
    if cfg.data.format != "world":
        path = cfg.data.path
        good = path is not None and Path(path).exists()
        findings.append(Finding(good, f"log {path}", "set data.path (docs/own_data.md says what it may be)"))
    findings.append(_attempt(lambda: checkpoint_inputs(**base_sections(cfg, None)), "base checkpoint and tokenizer"))
    return findings


def _attempt(check: Callable[[], object], what: str) -> Finding:
    try:
        check()
    except PersonasTuneError as error:
        return Finding(False, f"{what}: {error.lines[0]}")
    return Finding(True, what)
