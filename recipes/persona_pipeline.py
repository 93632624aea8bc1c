"""Run an experiment's stages in their order; a stage that is up to date says so and is passed over.

tune run persona_pipeline --config quickstart.yaml
tune run persona_pipeline --config quickstart.yaml stages=[persona_prepare,persona_distill]
tune run --nproc_per_node 8 persona_pipeline --config phi3_persona.yaml
"""

import runpy
import shlex
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TextIO

from omegaconf import DictConfig

from personas_tune import config
from personas_tune.errors import ConfigError
from personas_tune.processes import Processes, alone
from personas_tune.training.stopping import sigterm_in_a_line
from personas_tune.workspace import MANIFEST

STAGES = ("persona_prepare", "persona_distill", "persona_cluster", "persona_raft", "persona_lora", "persona_eval")
STAGES_IN_PROCESSES = ("persona_lora", "persona_eval")


def run_stage(name: str) -> int:
    """Run a recipe as ``tune run`` does, with this process's own arguments; give its exit status."""
    try:
        runpy.run_module(name, run_name="__main__")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def run_stage_in(processes: Processes, name: str) -> int:
    """Run a recipe in all processes, or in the first one while the others wait."""
    if name in STAGES_IN_PROCESSES or processes.size == 1:
        return run_stage(name)

    def run_alone() -> int:
        with alone():
            return run_stage(name)

    with nullcontext() if processes.is_first else sigterm_in_a_line():
        return processes.from_first(run_alone)


def print_artefacts(cfg: DictConfig) -> None:
    """Print every finished folder of the experiment and what to try next."""
    root = Path(cfg.output_dir)
    print("\nWhat is where:")
    for manifest in sorted(root.rglob(MANIFEST)):
        files = ", ".join(sorted(file.name for file in manifest.parent.iterdir() if file.name != MANIFEST))
        print(f"  {manifest.parent}: {files}")
    if cfg.personas.k == "elbow":
        return
    k = cfg.personas.k + 2
    replaced = ("personas.k=", "output_dir=", "stages=")
    arguments = [word for word in sys.argv[1:] if not word.startswith(replaced)]
    command = shlex.join([*arguments, f"personas.k={k}", f"output_dir={root}_k{k}"])
    print(f"\nNext, try: tune run persona_pipeline {command}")


@config.parse_in_processes
def recipe_main(cfg: DictConfig, processes: Processes) -> None:
    """Run the stages; stop at the first that fails, with its exit status."""
    stages = list(cfg.stages or STAGES)
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown:
        raise ConfigError(f"no stage {unknown[0]!r}", where="stages", remedy=f"use some of {', '.join(STAGES)}")
    if cfg.distill.dry_run and "persona_distill" in stages:
        stages = stages[: stages.index("persona_distill") + 1]  # there will be nothing for the others to go on with
    for number, stage in enumerate(stages, start=1):
        started = time.perf_counter()
        say(processes, f"[{number}/{len(stages)}] {stage}")
        status = run_stage_in(processes, stage)
        if status != 0:
            said = "was interrupted" if status > 128 else "failed; mend what it says"
            say(processes, f"persona_pipeline: {stage} {said}; run the pipeline again to go on", sys.stderr)
            sys.exit(status)
        say(processes, f"[{number}/{len(stages)}] {stage}: {time.perf_counter() - started:.1f} s")
    if not cfg.distill.dry_run and processes.is_first:
        print_artefacts(cfg)


def say(processes: Processes, text: str, stream: TextIO | None = None) -> None:
    """Print a line once, whatever the number of processes."""
    if processes.is_first:
        print(text, file=stream, flush=True)


if __name__ == "__main__":
    recipe_main()
