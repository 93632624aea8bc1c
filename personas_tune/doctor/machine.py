"""The machine: GPUs, processor, memory, disk."""

import importlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from personas_tune.doctor.findings import Finding, State, found
from personas_tune.errors import PersonasTuneError

GB = 1e9
LOW_DISK_GB = 20  # Phi-3-Mini takes 8, adapters of rank 256 and their checkpoints some more
LEAST_DISK_GB = 1
WITH_BF16 = (8, 0)  # compute capability


@dataclass(frozen=True)
class Device:
    """What a base can run on.

    Args:
        name: As messages call it.
        free: Bytes that are free on it.
        is_gpu: Whether it is one.
    """

    name: str
    free: float
    is_gpu: bool


def find_gpus() -> list[Device]:
    """The CUDA GPUs that torch sees; none where torch doesn't import."""
    torch = _torch()
    if torch is None or not torch.cuda.is_available():
        return []
    return [
        Device(f"GPU {index} {torch.cuda.get_device_name(index)}", float(torch.cuda.mem_get_info(index)[0]), True)
        for index in range(torch.cuda.device_count())
    ]


def main_memory(root: Path = Path("/")) -> Device | None:
    """This machine's memory, or its container's, if the system says how much of it is free.

    Args:
        root: Of the file system.
    """
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        entries = dict(line.split(":", 1) for line in lines if ":" in line)
        free = 1024.0 * int(entries["MemAvailable"].split()[0])
    except (OSError, ValueError, KeyError, IndexError):
        return None
    return Device("main memory", min([free, *_free_in_container(root / "sys/fs/cgroup")]), False)


def _free_in_container(groups: Path) -> Iterator[float]:
    """What the limit of a container leaves, if it has one; cached files are let go when memory is short."""
    for folder, limit, used, cached in (
        (groups, "memory.max", "memory.current", "inactive_file"),
        (groups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            entries = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
            in_use = int((folder / used).read_text(encoding="ascii")) - int(entries[cached])
            yield max(0.0, float(int((folder / limit).read_text(encoding="ascii")) - in_use))
        except (OSError, ValueError, KeyError):  # no container, or `max`: no limit
            continue


def check_machine(wanted: str | None, dtype: str | None, output_dir: str | None) -> list[Finding]:
    """Look at GPUs, processor, memory and disk.

    Args:
        wanted: The device that an experiment asks for; None if nothing in particular.
        dtype: Its dtype, or None.
        output_dir: Where it writes, or None.
    """
    return [*check_gpus(wanted, dtype), *check_processor(os.environ), *check_disk(output_dir)]


def check_gpus(wanted: str | None = None, dtype: str | None = None) -> list[Finding]:
    """Whether there are GPUs; without one, `device=cpu` works.

    Args:
        wanted: What an experiment asks for; None if nothing in particular.
        dtype: What it computes in.
    """
    torch = _torch()
    if torch is None:
        return [Finding("note", "no GPU can be looked for, since torch does not import")]
    if wanted is not None:
        from personas_tune.adapters.devices import find_device

        try:
            if find_device(wanted).type == "cpu":
                return [Finding("ok", f"device {wanted}: no GPU is needed")]
        except PersonasTuneError as error:
            return [Finding("missing", error.what, error.remedy or "")]
    if not torch.cuda.is_available():
        return [Finding("note", "no CUDA GPU", "set device=cpu dtype=fp32 and take a small base")]
    findings = [_look_at(torch, index, dtype) for index in range(torch.cuda.device_count())]
    if len(findings) > 1:
        findings.append(found(torch.distributed.is_nccl_available(), "NCCL, for --nproc_per_node", "use one GPU"))
    return findings


def _look_at(torch: Any, index: int, dtype: str | None) -> Finding:
    free, total = torch.cuda.mem_get_info(index)
    capability = torch.cuda.get_device_capability(index)
    has_bf16 = capability >= WITH_BF16
    what = (
        f"GPU {index} {torch.cuda.get_device_name(index)}: {free / GB:.1f} of {total / GB:.1f} GB free, compute "
        f"capability {'.'.join(map(str, capability))}, {'bf16' if has_bf16 else 'no bf16 of its own'}"
    )
    return found(has_bf16 or dtype != "bf16", what, "set dtype=fp32")


def check_processor(environment: Mapping[str, str]) -> list[Finding]:
    """Cores, threads and memory.

    Args:
        environment: Its ``OMP_NUM_THREADS`` says how many threads a process starts.
    """
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = main_memory()
    size = f", {memory.free / GB:.1f} GB of memory free" if memory is not None else ""
    threads = environment.get("OMP_NUM_THREADS", "")
    findings = [Finding("ok", f"{n_cores} cores{size}, OMP_NUM_THREADS={threads or '(not set)'}")]
    if threads.isdecimal() and int(threads) > n_cores:
        what = f"OMP_NUM_THREADS={threads} is more than there are cores: many times slower"
        findings.append(Finding("note", what, f"export OMP_NUM_THREADS={n_cores}"))
    return findings


def check_disk(output_dir: str | None = None) -> list[Finding]:
    """Whether there is room for adapters, and the folder to write into can be written."""
    place = Path(output_dir).expanduser().absolute() if output_dir is not None else Path.cwd()
    there = next(folder for folder in (place, *place.parents) if folder.exists())
    findings = []
    if output_dir is not None:
        good = there.is_dir() and os.access(there, os.W_OK)
        findings.append(found(good, f"output_dir {output_dir}", "set output_dir to a folder that can be written"))
    free = shutil.disk_usage(there).free / GB
    state: State = "missing" if free < LEAST_DISK_GB else "note" if free < LOW_DISK_GB else "ok"
    mend = "a large base takes more: free some, or set output_dir elsewhere"
    return [*findings, Finding(state, f"{free:.0f} GB of disk free", mend)]


def _torch() -> Any:
    try:
        return importlib.import_module("torch")
    except Exception:  # of whatever kind: it is told where packages are
        return None
