"""Checkpoints of a training: folders that are whole, or don't count.

A checkpoint is a folder ``step_<n>`` of parts: one for each adapter, one for each process. A part is
a safetensors file with its tensors and a JSON file with the rest. The parts are written to
``step_<n>.tmp`` and synced to the disk, the folder is renamed, and ``complete.json`` is put into it
last: what the training is made from, and the sha256 of every file and of that file itself.

Several processes share the work, on one file system: each writes its own parts, and the first of them
does what there is one of.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from personas_tune.errors import CheckpointError, MissingInputError
from personas_tune.processes import Processes
from personas_tune.training.state import flatten_state, unflatten_state
from personas_tune.workspace import sync_to_disk

MARKER = "complete.json"
_STEP = "step_"
_TEMPORARY = ".tmp"
_ABSENT = object()
_MAX_NAMED = 3  # differences in a message
_START_ANEW = "resume_from_checkpoint=false starts anew"


@dataclass(frozen=True)
class Origin:
    """What a training is made from; two with one origin are the same to the bit.

    Args:
        adapter_set: Its name: adapters are seeded by it.
        settings: What decides the adapters, the seed included, as plain JSON values without secrets.
        inputs: sha256 of the files read, by path.
        device: ``cpu`` or ``cuda``: each has random streams of its own.
        shared: By adapter, which processes share its rows (``2``, or ``2 in step`` where they share the base, too), if
            it is more than one: each has random streams of its own, too.
        key: The stage's, from the same settings and inputs (see :func:`~personas_tune.workspace.stage_key`).
    """

    adapter_set: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    device: str
    key: str
    shared: Mapping[str, str] = field(default_factory=dict)

    def differences_to(self, other: "Origin") -> list[str]:
        """In what this one differs from ``other``, in words; empty if they are the same."""
        there, here = dict(_leaves(other._named_values())), dict(_leaves(self._named_values()))
        found = [
            f"{name} was {there.get(name, 'not set')}, is {here.get(name, 'not set')}"
            for name in sorted(there.keys() | here.keys())
            if there.get(name, _ABSENT) != here.get(name, _ABSENT)
        ]
        known = set(other.inputs.values())
        found += [f"{Path(path).name} has changed" for path, sha in self.inputs.items() if sha not in known]
        return found or ([] if self.key == other.key else ["other files were read, or by another version"])

    def _named_values(self) -> dict[str, Any]:
        shared = {f"processes of adapter {name}": n for name, n in self.shared.items()}
        return {**self.settings, "the set": self.adapter_set, "the device": self.device, **shared}


@dataclass(frozen=True)
class Part:
    """One adapter's share of a checkpoint, or one process's.

    Args:
        name: Of its files.
        state: Gives what is to be kept (see :func:`flatten_state`).
        version: Equal ones have equal states, such as an adapter's number of steps; None if it is always new.
    """

    name: str
    state: Callable[[], Any]
    version: int | None = None


@dataclass(frozen=True)
class Written:
    """A part on the disk: its version, and the sha256 of its files."""

    version: int | None
    files: Mapping[str, str]


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint; get one from :func:`read_checkpoint`."""

    path: Path
    step: int
    origin: Origin
    versions: Mapping[str, str]
    parts: Mapping[str, Written]

    def check_files(self) -> None:
        """Compare every file with its sha256.

        Raises:
            CheckpointError: If one is damaged.
        """
        for part in self.parts.values():
            for name, sha in part.files.items():
                if not (self.path / name).is_file() or _sha256(self.path / name) != sha:
                    raise _damaged(self.path, f"{name} is not what was written")

    def read(self, part: str) -> Any:
        """The state of a part.

        Raises:
            CheckpointError: If it isn't there or can't be read.
        """
        try:
            plain = json.loads((self.path / f"{part}.json").read_text(encoding="utf-8"))
            return unflatten_state(plain, load_file(self.path / f"{part}.safetensors"))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise _damaged(self.path, f"{part}: {' '.join(str(error).split())}") from error


@dataclass
class Checkpoints:
    """The checkpoints of one adapter set while it is trained.

    Args:
        folder: Holds them; see :func:`checkpoint_folder`.
        origin: What this training is made from.
        keep_last: How many are kept; with 0 none is written.
    """

    folder: Path
    origin: Origin
    keep_last: int
    _kept: list[Checkpoint] = field(default_factory=list)

    def write(self, staging: Path, part: Part) -> Written:
        """Write a part and sync it to the disk; one that the last checkpoint holds already is only linked.

        Raises:
            CheckpointError: If its state holds what can't be kept, or the disk is full.
        """
        linked = self._link(staging, part)
        if linked is not None:
            return linked
        tensors: dict[str, Tensor] = {}
        try:
            plain = flatten_state(part.state(), part.name, tensors)
        except TypeError as error:
            raise CheckpointError(
                f"this can't be kept in a checkpoint ({error})",
                where=str(self.folder),
                remedy="use another optimizer or lr_scheduler, or training.keep_last_n_checkpoints=0 for no checkpoint",
            ) from error
        names = [f"{part.name}.safetensors", f"{part.name}.json"]
        try:
            save_file(tensors, staging / names[0])
            (staging / names[1]).write_text(json.dumps(plain), encoding="utf-8")
            for name in names:
                sync_to_disk(staging / name)
        except (SafetensorError, OSError) as error:  # the former is how it reports a full disk
            raise CheckpointError(
                f"a checkpoint can't be written ({' '.join(str(error).split())})",
                where=str(self.folder),
                remedy="mend that and run again: it goes on from the last one",
            ) from error
        return Written(part.version, {name: _sha256(staging / name) for name in names})

    def save(self, step: int, parts: Sequence[Part], processes: Processes | None = None) -> None:
        """Write a whole checkpoint, unless none is to be kept; every process calls it.

        Args:
            step: How many steps have been taken; a name for the checkpoint.
            parts: Those of this process.
            processes: All of them; None if this is the only one.
        """
        if not self.keep_last:
            return
        processes = processes or Processes()
        with processes.held_by_first(lambda: self._staging(step)) as staging:
            written = processes.gather({part.name: self.write(staging, part) for part in parts})
            together = {name: part for of_process in written for name, part in of_process.items()}
            checkpoint = processes.from_first(lambda: self._complete(step, staging, together))
        self._kept = [*self._kept, checkpoint][-self.keep_last :]

    def go_on_from(self, checkpoint: Checkpoint) -> None:
        """Know of the checkpoint that was found, so that the next one can link what doesn't change."""
        self._kept = [checkpoint]

    @contextmanager
    def _staging(self, step: int) -> Iterator[Path]:
        """The temporary folder of a checkpoint, empty; what is left of it at the end is removed."""
        staging = self.folder / f"{_STEP}{step}{_TEMPORARY}"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _complete(self, step: int, staging: Path, parts: Mapping[str, Written]) -> Checkpoint:
        """Put the temporary folder into its place, mark it complete, and drop what need not be kept."""
        path = self.folder / f"{_STEP}{step}"
        sync_to_disk(staging)
        _drop(path)  # one of a run that was stopped before it was complete
        os.rename(staging, path)
        sync_to_disk(self.folder)
        sync_to_disk(self.folder.parent)
        checkpoint = Checkpoint(path, step, self.origin, running_versions(), parts)
        _write_marker(checkpoint)
        kept = {each.path for each in [*self._kept, checkpoint][-self.keep_last :]}
        for other in _entries(self.folder):
            if other not in kept:
                _drop(other)
        return checkpoint

    def find(self, wanted: bool | str | None) -> tuple[Checkpoint | None, str]:
        """The checkpoint that a run goes on from, its files compared with their sha256.

        Args:
            wanted: ``true`` or ``last``: the last complete one. A path: that one. None: the last complete one
                if it is of this training. ``false``: none.

        Returns:
            The checkpoint, or None to start anew, and what to tell the user about one that is passed over.

        Raises:
            MissingInputError: If the one that is wanted isn't there.
            CheckpointError: If it is damaged, or of another training.
        """
        if wanted is False:
            return None, self._passed_over()
        if isinstance(wanted, str) and wanted != "last":
            found = read_checkpoint(Path(wanted).expanduser())
        else:
            last = self._last()
            if last is None and wanted is None:
                return None, ""
            if last is None:
                remedy = "leave resume_from_checkpoint out to start anew"
                raise MissingInputError("no complete checkpoint", where=str(self.folder), remedy=remedy)
            found = last
        differences = self.origin.differences_to(found.origin)
        if differences and wanted is None:
            return None, f"the checkpoint of step {found.step} is of another training ({_named(differences)})"
        if differences:
            raise CheckpointError(
                f"the checkpoint is of another training ({_named(differences)})",
                where=str(found.path),
                remedy=f"go back to its settings, or {_START_ANEW}",
            )
        found.check_files()
        running = running_versions()
        others = [f"{name} {was}" for name, was in found.versions.items() if was != running.get(name)]
        return found, f"it was written with {', '.join(others)}: last digits may differ" if others else ""

    def remove(self) -> None:
        """Remove them all: the adapters are finished."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def remove_leftovers(self) -> None:
        """Remove them if they are of this training: it is finished, and was killed before it could."""
        try:
            last = self._last()
        except (CheckpointError, MissingInputError):  # damaged, or removed meanwhile
            return
        if last is not None and not self.origin.differences_to(last.origin):
            self.remove()

    def _last(self) -> Checkpoint | None:
        """The last complete checkpoint of this training; the last of another if there is none."""
        last_of_another = None
        for path in sorted(_complete(self.folder), key=_step_of, reverse=True):
            checkpoint = read_checkpoint(path)
            if not self.origin.differences_to(checkpoint.origin):
                return checkpoint
            last_of_another = last_of_another or checkpoint
        return last_of_another

    def _passed_over(self) -> str:
        complete = _complete(self.folder)
        if not complete:
            return ""
        last = max(complete, key=_step_of)
        return (
            f"{last} is passed over, and removed when the next is written; resume_from_checkpoint=true goes on from it"
        )

    def _link(self, staging: Path, part: Part) -> Written | None:
        """Link the files of an unchanged part; None if it has to be written."""
        last = self._kept[-1] if self._kept else None
        known = last.parts.get(part.name) if last is not None else None
        if last is None or known is None or part.version is None or known.version != part.version:
            return None
        try:
            for name in known.files:
                os.link(last.path / name, staging / name)
        except OSError:  # a file system without hard links, or another one
            for name in known.files:
                (staging / name).unlink(missing_ok=True)  # never write into a file that another checkpoint holds
            return None
        return known


def checkpoint_folder(adapter_set: Path) -> Path:
    """Where the checkpoints of ``adapters/<set>`` lie: beside it, since that folder appears when it is finished."""
    return adapter_set.with_name(f".{adapter_set.name}.checkpoints")


def read_checkpoint(path: Path) -> Checkpoint:
    """Read what a checkpoint says of itself.

    Raises:
        MissingInputError: If there is none, or it isn't complete.
        CheckpointError: If that can't be read.
    """
    if not (path / MARKER).is_file():
        what = f"the checkpoint is not complete (it has no {MARKER})" if path.is_dir() else "no checkpoint there"
        raise MissingInputError(what, where=str(path), remedy="resume_from_checkpoint=last finds the last complete one")
    try:
        marker = json.loads((path / MARKER).read_text(encoding="utf-8"))
        content = marker["content"]
        whole = marker["sha256"] == _sha256_of(content)
        parts = {name: Written(**part) for name, part in content["parts"].items()}
        read = Checkpoint(path, content["step"], Origin(**content["origin"]), content["versions"], parts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, f"{MARKER} can't be read") from error
    if not whole:
        raise _damaged(path, f"{MARKER} is not what was written")
    return read


def running_versions() -> dict[str, str]:
    """Versions of what computes; with others the last digits may differ."""
    return {package: version(package) for package in ("torch", "torchtune", "torchao")}


def _write_marker(checkpoint: Checkpoint) -> None:
    content = {
        "step": checkpoint.step,
        "origin": asdict(checkpoint.origin),
        "versions": checkpoint.versions,
        "parts": {name: asdict(part) for name, part in checkpoint.parts.items()},
    }
    temporary = checkpoint.path / f"{MARKER}{_TEMPORARY}"
    temporary.write_text(json.dumps({"sha256": _sha256_of(content), "content": content}, indent=1), encoding="utf-8")
    sync_to_disk(temporary)
    os.replace(temporary, checkpoint.path / MARKER)
    sync_to_disk(checkpoint.path)


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{_STEP}*"))


def _complete(folder: Path) -> list[Path]:
    return [path for path in _entries(folder) if (path / MARKER).is_file()]


def _step_of(path: Path) -> int:
    number = path.name.removeprefix(_STEP)
    return int(number) if number.isdecimal() else -1


def _drop(path: Path) -> None:
    """Remove a checkpoint, its marker first: half of one must not look complete."""
    (path / MARKER).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def _damaged(path: Path, what: str) -> CheckpointError:
    others = [other for other in _complete(path.parent) if other != path]
    before = f"resume_from_checkpoint={max(others, key=_step_of)} goes on from the one before, " if others else ""
    return CheckpointError(f"the checkpoint is damaged ({what})", where=str(path), remedy=f"{before}{_START_ANEW}")


def _named(differences: list[str]) -> str:
    more = len(differences) - _MAX_NAMED
    return ", ".join(differences[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _leaves(entry, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sha256_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
