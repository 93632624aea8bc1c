"""What the distilling benchmarks share: an experiment's data, the recipe in a process, its journal and its tables."""

import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # for the server on loopback

NO_KEY = {name: text for name, text in os.environ.items() if not name.startswith("OPENAI_")}


class Row(NamedTuple):
    """An attempt in the journal."""

    request: str
    attempt: int
    status: str
    response: str | None
    input_tokens: int
    cached_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Job:
    """An experiment whose users are distilled.

    Args:
        root: Its ``output_dir``.
        config: Its YAML.
    """

    root: Path
    config: Path

    @property
    def memory(self) -> Path:
        return self.root / "memory"

    def command(self, base_url: str, **distill: Any) -> list[str]:
        """The recipe on a server; keyword arguments are keys of ``distill``."""
        settings = {"distiller": "openai", "base_url": base_url, **distill}
        words = [f"distill.{name}={json.dumps(value)}" for name, value in settings.items()]
        return [
            sys.executable, "-m", "persona_distill", "--config", str(self.config), f"output_dir={self.root}", *words
        ]  # fmt: skip

    def start(self, base_url: str, **distill: Any) -> "subprocess.Popen[bytes]":
        with self.log.open("wb") as log:
            return subprocess.Popen(self.command(base_url, **distill), stdout=log, stderr=log, env=NO_KEY)

    def finish(self, base_url: str, **distill: Any) -> None:
        """Run the recipe to its end."""
        if self.start(base_url, **distill).wait() != 0:
            raise SystemExit(f"{self.root}: the recipe failed:\n{self.told()}")

    @property
    def log(self) -> Path:
        return self.root.with_suffix(".log")

    def told(self) -> str:
        """What the last run printed."""
        return self.log.read_text(encoding="utf-8")

    def fresh(self, name: str) -> "Job":
        """The same experiment with nothing distilled yet, in a folder of its own."""
        root = self.root.with_name(name)
        shutil.copytree(self.root / "data", root / "data")
        return Job(root, self.config)

    def forget_tables(self) -> None:
        """Delete what was distilled, but for the journal."""
        for path in self.memory.iterdir():
            if not path.name.startswith("journal"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def tables(self) -> dict[str, str]:
        """A hash of each finished file but for journal and manifest."""
        return {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(self.memory.iterdir())
            if path.is_file() and not path.name.startswith(("journal", "manifest"))
        }

    def journal_rows(self) -> set[Row]:
        """All attempts, read from a copy: mending what a kill left is the recipe's affair."""
        with tempfile.TemporaryDirectory() as folder:
            for path in self.memory.glob("journal.sqlite*"):
                if not path.name.endswith(("lock", "shm")):
                    shutil.copy(path, folder)
            if not any(Path(folder).iterdir()):
                return set()
            with closing(sqlite3.connect(f"{folder}/journal.sqlite")) as connection:
                if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                    return set()
                assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
                return {Row(*row) for row in connection.execute(f"SELECT {', '.join(Row._fields)} FROM attempts")}


def prepare_job(folder: Path, data: Mapping[str, Any], **distill: Any) -> Job:
    """An experiment in ``folder`` whose data is prepared; keyword arguments go into its ``distill`` section."""
    folder.mkdir(parents=True, exist_ok=True)
    job = Job(folder / "run", folder / "experiment.yaml")
    experiment = {"output_dir": str(job.root), "data": dict(data), "distill": distill}
    job.config.write_text(yaml.safe_dump(experiment), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "persona_prepare", "--config", str(job.config)], check=True)
    return job
