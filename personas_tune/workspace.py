"""The files that pass between stages: where they lie, what columns they have, how they are written.

Every stage owns one folder below ``output_dir``. Its files are first written to a temporary folder
beside it and moved into place together when the stage has succeeded, ``manifest.json`` last, so that
a folder with a manifest is complete and a failed run leaves nothing behind.
"""

import fcntl
import functools
import hashlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from errno import ENOLCK, ENOSPC, ENOSYS, ENOTDIR, EOPNOTSUPP
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from personas_tune import __version__
from personas_tune.errors import ConfigError, DataError, MissingInputError, PersonasTuneError, raise_together

if TYPE_CHECKING:
    import pyarrow as pa

MANIFEST = "manifest.json"
_LOCK = ".lock"  # in the folder in which a stage is written

# Columns that never change name or meaning; a file may have more.
COLUMNS: dict[str, tuple[str, ...]] = {
    "interactions": ("user_id", "item_id", "rating", "timestamp", "position", "split"),
    "items": ("item_id", "title", "year", "genres", "summary", "cast", "mean_rating", "n_ratings"),
    "users": (
        "user_id", "n_train", "n_test", "mean_rating", "activity", "activity_tier",
        "conformity", "conformity_tier", "diversity", "diversity_tier",
    ),
    "profiles": ("user_id", "upto_position", "profile", "distiller", "n_words"),
    "memories": ("user_id", "item_id", "position", "rating", "memory"),
    "personas": ("user_id", "persona", "distance"),
    "samples": ("user_id", "item_id", "position", "rating", "persona", "memory_positions"),
    "predictions": ("user_id", "item_id", "position", "rating", "persona", "p", "expected", "argmax", "text", "parsed"),
}  # fmt: skip

# Which recipe writes which stage folder.
STAGE_RECIPES = {
    "data": "persona_prepare",
    "memory": "persona_distill",
    "personas": "persona_cluster",
    "samples": "persona_raft",
    "adapters": "persona_lora",
    "eval": "persona_eval",
    "report": "persona_eval",
    "export": "persona_export",
    "base": "persona_base",
}

_RECORDED_PACKAGES = (
    "torch", "torchtune", "torchao", "numpy", "scikit-learn", "scipy", "pyarrow", "faiss-cpu", "openai",
)  # fmt: skip


def absolute_path(path: str | Path) -> Path:
    """A path as a user writes it, from the root on; raises as :func:`home_path` does."""
    return home_path(path).absolute()


def home_path(path: str | Path) -> Path:
    """A path as a user writes it, with the home folder for ``~``.

    Raises:
        ConfigError: If it names the home of a user that there is not.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError("no such user's home", where=str(path), remedy="write the whole path") from error


@dataclass(frozen=True)
class Workspace:
    """Names every file of one experiment below its ``output_dir``."""

    root: Path

    @classmethod
    def at(cls, output_dir: str | Path) -> "Workspace":
        """The workspace at ``output_dir``, which need not exist yet."""
        return cls(absolute_path(output_dir))

    @property
    def interactions(self) -> Path:
        """The cohort's interactions."""
        return self.root / "data" / "interactions.parquet"

    @property
    def outside(self) -> Path:
        """Ratings of the users outside the cohort."""
        return self.root / "data" / "outside.parquet"

    @property
    def items(self) -> Path:
        """The cohort's items."""
        return self.root / "data" / "items.parquet"

    @property
    def users(self) -> Path:
        """The cohort's users."""
        return self.root / "data" / "users.parquet"

    @property
    def oracle(self) -> Path:
        """Bayes-optimal predictions of a synthetic world; absent for real logs."""
        return self.root / "data" / "oracle.parquet"

    @property
    def profiles(self) -> Path:
        """Profiles as they grew."""
        return self.root / "memory" / "profiles.parquet"

    @property
    def memories(self) -> Path:
        """A memory per train interaction."""
        return self.root / "memory" / "memories.parquet"

    def journal(self, elsewhere: str | None) -> Path:
        """Every paid answer: in the file that ``distill.journal`` names, or in the experiment's own for None."""
        if elsewhere is not None:
            return absolute_path(elsewhere)
        return self.root / "memory" / "journal.sqlite"

    @property
    def left_out(self) -> Path:
        """Users without texts and why; only there when ``distill.max_incomplete`` let some go."""
        return self.root / "memory" / "left_out.json"

    @property
    def personas(self) -> Path:
        """Each user's persona."""
        return self.root / "personas" / "personas.parquet"

    @property
    def clustering(self) -> Path:
        """How the personas were found."""
        return self.root / "personas" / "clustering.json"

    @property
    def train_samples(self) -> Path:
        """Ratings to train on."""
        return self.root / "samples" / "train.parquet"

    @property
    def test_samples(self) -> Path:
        """Ratings to predict."""
        return self.root / "samples" / "test.parquet"

    @property
    def prompt_settings(self) -> Path:
        """How samples become prompts."""
        return self.root / "samples" / "prompt.json"

    @property
    def metrics(self) -> Path:
        """All that was measured."""
        return self.root / "eval" / "metrics.json"

    @property
    def table(self) -> Path:
        """The table."""
        return self.root / "eval" / "table.md"

    @property
    def report(self) -> Path:
        """Folder of the pages that show it all."""
        return self.root / "report"

    def adapter_set(self, name: str) -> Path:
        """Folder of one adapter set, with a folder per adapter inside."""
        return self.root / "adapters" / name

    def predictions(self, agent: str) -> Path:
        """What one agent predicts for every test sample."""
        return self.root / "eval" / f"predictions_{agent}.parquet"

    def calibration(self, agent: str) -> Path:
        """How one agent's distributions are calibrated; only of agents with ``calibrate``."""
        return self.root / "eval" / f"calibration_{agent}.json"


def prompt_inputs(workspace: Workspace) -> list[Path]:
    """The files that train prompts are made of."""
    return [
        workspace.items, workspace.users, workspace.profiles, workspace.memories,
        workspace.prompt_settings, workspace.train_samples,
    ]  # fmt: skip


def _recipe_that_writes(path: Path) -> str | None:
    return next((STAGE_RECIPES[folder.name] for folder in path.parents if folder.name in STAGE_RECIPES), None)


def _remedy(path: Path) -> str:
    recipe = _recipe_that_writes(path)
    return f"run `tune run {recipe} --config ...` first" if recipe else "check the path"


def read_table(path: Path, columns: Sequence[str] = ()) -> "pa.Table":
    """Read a stage's Parquet file and check that it is whole.

    Args:
        path: The file.
        columns: Columns that must be there.

    Raises:
        MissingInputError: If the file isn't there; names the recipe that writes it.
        DataError: If it is damaged or lacks a column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    remedy = _remedy(path)
    if not path.is_file():
        raise MissingInputError("file not found", where=str(path), remedy=remedy)
    try:
        table = pq.read_table(path)
        table.validate(full=True)  # a flipped bit may leave text that is no UTF-8
        missing = [name for name in columns if name not in table.column_names]
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        first_line = str(error).splitlines()[0]
        raise DataError(f"not a readable Parquet file ({first_line})", where=str(path), remedy=remedy) from error
    if missing:
        raise DataError(f"column {', '.join(missing)} is missing", where=str(path), remedy=remedy)
    return table


def read_json(path: Path) -> Any:
    """Read a stage's JSON file.

    Raises:
        MissingInputError: If it isn't there.
        DataError: If it isn't JSON.
    """
    remedy = _remedy(path)
    if not path.is_file():
        raise MissingInputError("file not found", where=str(path), remedy=remedy)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"not JSON ({error})", where=str(path), remedy=remedy) from error


def to_json(value: Any) -> str:
    """Canonical JSON text: sorted keys, two-space indent, a final newline."""
    return json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def sha256_of_file(path: Path) -> str:
    """Hex sha256 of a file's bytes; read once per process while size and time of change stay."""
    status = path.stat()
    return _sha256_of_version(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _sha256_of_version(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_of_inputs(inputs: Sequence[Path]) -> dict[str, str]:
    """Hashes of input files by name; a folder counts with every file below it.

    Raises:
        MissingInputError: If an input isn't there.
        SeveralErrors: If inputs of several recipes aren't.
    """
    raise_together(missing_inputs(inputs))
    hashes: dict[str, str] = {}
    for path in inputs:
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        hashes.update({str(file): sha256_of_file(file) for file in files})
    return hashes


def missing_inputs(inputs: Sequence[Path]) -> list[PersonasTuneError]:
    """What isn't there, a line for each recipe that has to run first: the first of its files."""
    first_missing: dict[str | Path, Path] = {}
    for path in inputs:
        if not path.exists():
            first_missing.setdefault(_recipe_that_writes(path) or path, path)
    return [
        MissingInputError("file not found", where=str(path), remedy=_remedy(path)) for path in first_missing.values()
    ]


def sync_to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _versions() -> dict[str, str]:
    versions = {"personas_tune": __version__, "python": platform.python_version()}
    for package in _RECORDED_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


@dataclass
class Stage:
    """A stage's folder while it is being written; get one from :func:`open_stage`."""

    folder: Path
    is_current: bool
    _staging: Path
    _written: dict[str, Path] = field(default_factory=dict)

    def path(self, name: str) -> Path:
        """Where to write the file ``name`` of this stage (a temporary place until the stage succeeds)."""
        target = self._staging / name
        target.parent.mkdir(parents=True, exist_ok=True)
        self._written[name] = target
        return target

    @property
    def written(self) -> list[str]:
        """Names of the files that this process has written."""
        return sorted(self._written)

    def include(self, names: Iterable[str]) -> None:
        """Take up files that other processes have written through copies of this stage."""
        for name in names:
            self.path(name)

    def write_table(self, name: str, table: "pa.Table", *, row_group_size: int | None = None) -> None:
        """Write a table as Parquet; equal tables give equal bytes.

        Args:
            name: The file.
            table: Its rows.
            row_group_size: Rows that are read together; pyarrow's choice if None. Small ones let a reader find one
                user's rows among millions.
        """
        import pyarrow.parquet as pq

        pq.write_table(table, self.path(name), compression="zstd", row_group_size=row_group_size)

    def write_json(self, name: str, value: Any) -> None:
        """Write canonical JSON."""
        self.path(name).write_text(to_json(value), encoding="utf-8")

    def write_text(self, name: str, text: str) -> None:
        """Write UTF-8 text."""
        self.path(name).write_text(text, encoding="utf-8")


def stage_key(settings: Mapping[str, Any], input_hashes: Mapping[str, str]) -> str:
    """Hash of all that decides a stage's outputs: its settings and the bytes of its inputs.

    Input paths don't count, so a moved experiment stays up to date.
    """
    material = {"version": __version__, "settings": settings, "inputs": sorted(input_hashes.values())}
    return hashlib.sha256(json.dumps(material, sort_keys=True).encode()).hexdigest()


def is_current(folder: Path, key: str) -> bool:
    """Whether ``folder`` holds a finished stage that was made with ``key`` and is unharmed."""
    outputs = _outputs_of(folder, key)
    if outputs is None:
        return False
    return all((folder / name).is_file() and sha256_of_file(folder / name) == h for name, h in outputs.items())


@contextmanager
def open_stage(
    folder: Path, settings: Mapping[str, Any], inputs: Sequence[Path] = (), *, seed: int | None = None
) -> Iterator[Stage]:
    """Open a stage's folder for writing; all of its files appear together, or none does.

    Args:
        folder: The stage's folder, such as ``output_dir/data`` or ``output_dir/adapters/persona``.
        settings: What decides the outputs, as plain JSON values without secrets.
        inputs: Files or folders read; their hashes go into the manifest and the up-to-date check.
        seed: Recorded in the manifest.

    Yields:
        A :class:`Stage`. When its ``is_current`` is true, nothing need be done, and nothing is written.

    Raises:
        MissingInputError: If an input isn't there.
        ConfigError: If the folder can't be written, the disk is full, or another run is writing it.
    """
    input_hashes = sha256_of_inputs(inputs)
    key = stage_key({**settings, "seed": seed}, input_hashes)
    staging = folder.parent / f".{folder.name}.tmp"
    stage = Stage(folder, is_current(folder, key), staging)
    if stage.is_current:
        yield stage
        return
    made = [parent for parent in staging.parents if not parent.exists()]
    try:
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(ENOTDIR, "it is a file", str(folder))
        lock = _claim(staging)
    except BlockingIOError as error:
        raise ConfigError(
            f"process {_writer(staging)} is writing it",
            where=str(folder),
            remedy="wait for it, or set another output_dir",
        ) from error
    except OSError as error:
        _clear_away(staging, made)
        raise ConfigError(
            f"can't write there ({error.strerror})", where=str(folder), remedy="set output_dir to a writable folder"
        ) from error
    try:
        with full_disk_in_a_line(folder):
            yield stage
            _finish(stage, key, settings, input_hashes, seed)
    finally:
        _clear_away(staging, made)
        lock.close()


@contextmanager
def full_disk_in_a_line(folder: Path) -> Iterator[None]:
    """Tell that the disk is full as any other mistake.

    Raises:
        ConfigError: If it is.
    """
    try:
        yield
    except OSError as error:
        if error.errno != ENOSPC:
            raise
        raise ConfigError(
            "no space left on the disk", where=str(folder), remedy="free some, or set output_dir elsewhere"
        ) from error


def _finish(
    stage: Stage, key: str, settings: Mapping[str, Any], input_hashes: Mapping[str, str], seed: int | None
) -> None:
    manifest = {
        "key": key,
        "seed": seed,
        "settings": settings,
        "inputs": input_hashes,
        "outputs": {name: sha256_of_file(path) for name, path in sorted(stage._written.items())},
        "versions": _versions(),
        "platform": sys.platform,
    }
    _move_into_place(stage, to_json(manifest))


def _claim(staging: Path) -> IO[bytes]:
    """Make a staging folder that no other run has, empty of what a killed run left; its lock is held until closed.

    Raises:
        BlockingIOError: If another run has it.
        OSError: If it can't be made.
    """
    while True:
        staging.mkdir(parents=True, exist_ok=True)
        try:
            lock = (staging / _LOCK).open("ab")
        except FileNotFoundError:  # another run has just ended, and removed the folder
            continue
        try:
            _lock(lock)
        except OSError:
            lock.close()
            raise
        if _is_there(lock, staging / _LOCK):
            break
        lock.close()
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n".encode())
    lock.flush()
    for left in staging.iterdir():
        if left.is_dir():
            shutil.rmtree(left)
        elif left.name != _LOCK:
            left.unlink()
    return lock


def _writer(staging: Path) -> str:
    with suppress(OSError, UnicodeDecodeError):
        return (staging / _LOCK).read_text(encoding="utf-8").strip() or "of another run"
    return "of another run"


def _lock(file: IO[bytes]) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (ENOSYS, ENOLCK, EOPNOTSUPP):  # some shared file systems have no locks
            raise


def _is_there(opened: IO[bytes], path: Path) -> bool:
    return path.exists() and os.path.samestat(os.fstat(opened.fileno()), path.stat())


def _clear_away(staging: Path, made: Sequence[Path]) -> None:
    """Remove the staging folder, and of the folders made for it (deepest first) those that nothing was put into."""
    shutil.rmtree(staging, ignore_errors=True)
    _remove_empty(made)


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # not empty
            folder.rmdir()


def _outputs_of(folder: Path, key: str | None = None) -> dict[str, str] | None:
    """Hashes by name of what a finished run of a stage (the one with ``key``) wrote; None if there was none."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        outputs = dict(manifest["outputs"])
        return outputs if key in (None, manifest["key"]) else None
    except (OSError, ValueError, KeyError, TypeError):  # absent or damaged
        return None


def _move_into_place(stage: Stage, manifest: str) -> None:
    stage.folder.mkdir(parents=True, exist_ok=True)
    for target in (stage.folder / name for name in [*stage._written, MANIFEST]):
        if target.is_dir():
            raise ConfigError("a folder is where a file is to be", where=str(target), remedy="move it away")
    for name in sorted((_outputs_of(stage.folder) or {}).keys() - stage._written.keys()):
        stale = stage.folder / name  # a file that this stage no longer writes
        stale.unlink(missing_ok=True)
        _remove_empty(stage.folder / parent for parent in list(Path(name).parents)[:-1])
    (stage.folder / MANIFEST).unlink(missing_ok=True)
    for name, path in stage._written.items():
        sync_to_disk(path)
        (stage.folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, stage.folder / name)
    manifest_file = stage._staging / MANIFEST
    manifest_file.write_text(manifest, encoding="utf-8")
    sync_to_disk(manifest_file)
    os.replace(manifest_file, stage.folder / MANIFEST)
    sync_to_disk(stage.folder)
