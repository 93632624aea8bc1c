"""Run an experiment's stages in their order; a stage that is up to date says so and is passed over.

tune run persona_pipeline --config quickstart.yaml
tune run persona_pipeline --config quickstart.yaml stages=[persona_prepare,persona_distill]
"""

import runpy
import shlex
import sys
import time
from pathlib import Path

from omegaconf import DictConfig

from personas_tune import config
from personas_tune.errors import ConfigError
from personas_tune.workspace import MANIFEST

STAGES = ("persona_prepare", "persona_distill", "persona_cluster", "persona_raft", "persona_lora", "persona_eval")


def run_stage(name: str) -> int:
    """Run a recipe as ``tune run`` does, with this process's own arguments; give its exit status."""
    try:
        runpy.run_module(name, run_name="__main__")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


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


@config.parse
def recipe_main(cfg: DictConfig) -> None:
    """Run the stages; stop at the first that fails, with its exit status."""
    stages = list(cfg.stages or STAGES)
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown:
        raise ConfigError(f"no stage {unknown[0]!r}", where="stages", remedy=f"use some of {', '.join(STAGES)}")
    if cfg.distill.dry_run and "persona_distill" in stages:
        stages = stages[: stages.index("persona_distill") + 1]  # there will be nothing for the others to go on with
    for number, stage in enumerate(stages, start=1):
        started = time.perf_counter()
        print(f"[{number}/{len(stages)}] {stage}", flush=True)
        status = run_stage(stage)
        if status != 0:
            said = "was interrupted" if status > 128 else "failed; mend what it says"
            print(f"persona_pipeline: {stage} {said}; run the pipeline again to go on", file=sys.stderr)
            sys.exit(status)
        print(f"[{number}/{len(stages)}] {stage}: {time.perf_counter() - started:.1f} s", flush=True)
    if not cfg.distill.dry_run:
        print_artefacts(cfg)


if __name__ == "__main__":
    recipe_main()
