"""Train persona adapters: one frozen base, one LoRA adapter per persona (or one for all users).

Reads   samples/, memory/, data/ and the base checkpoint
Writes  adapters/<set>/<adapter>/ for every entry of ``adapter_sets``

    tune run persona_lora --config quickstart.yaml
    tune run persona_lora --config phi3_persona.yaml optimizer.lr=1e-4
    tune run persona_lora --config phi3_persona.yaml resume_from_checkpoint=true
"""

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from omegaconf import DictConfig
from torchtune import training
from tqdm import tqdm

from personas_tune import config
from personas_tune.adapters.base_model import (
    TOKENIZER_FILES,
    BaseModel,
    checkpoint_inputs,
    load_base,
    missing_base_files,
)
from personas_tune.adapters.files import lora_shape, save_adapter
from personas_tune.datasets import RatingDataset, RatingSource
from personas_tune.errors import Interrupted, raise_together
from personas_tune.schema import MemoriesSeen
from personas_tune.training.checkpoints import Checkpoint, Checkpoints, Origin, Part, checkpoint_folder
from personas_tune.training.fit import (
    AdapterJob,
    StepReport,
    TrainingSettings,
    check_first_group,
    put_to_wait,
    require_token_loss,
    train_steps,
)
from personas_tune.training.sets import AdapterPlan, plan_adapter_set
from personas_tune.training.state import job_state, process_state, restore_job, restore_process
from personas_tune.training.stopping import sigterm_in_a_line, stop_requests
from personas_tune.workspace import (
    Stage,
    Workspace,
    missing_inputs,
    open_stage,
    prompt_inputs,
    sha256_of_inputs,
    stage_key,
)

COMPONENTS = ("optimizer", "lr_scheduler", "loss")
TRAINING_KEYS = (
    "dtype", "epochs", "batch_size", "gradient_accumulation_steps", "rows_per_user", "max_steps_per_epoch",
    "clip_grad_norm", "validation_share", *COMPONENTS,
)  # fmt: skip
# What of the section `training` changes no adapter.
WITHOUT_EFFECT = ("schedule", "offload_waiting", "checkpoint_every_n_steps", "keep_last_n_checkpoints")


class PersonaLoraRecipe:
    """Trains the adapter sets of an experiment, each only when its settings or inputs have changed.

    Args:
        cfg: The experiment.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        self.workspace = Workspace.at(cfg.output_dir)
        self._require_inputs()
        self.source = RatingSource(self.workspace.root)
        self.samples = self.source.samples("train")
        self.settings = TrainingSettings(
            epochs=cfg.epochs,
            batch_size=cfg.batch_size,
            gradient_accumulation_steps=cfg.gradient_accumulation_steps,
            rows_per_user=cfg.rows_per_user,
            max_steps_per_epoch=cfg.max_steps_per_epoch,
            clip_grad_norm=cfg.clip_grad_norm,
            prefix_sharing=cfg.training.prefix_sharing,
            schedule=cfg.training.schedule,
            offload_waiting=cfg.training.offload_waiting,
            seed=cfg.seed,
        )
        self._resume: bool | str | None = cfg.resume_from_checkpoint
        self._bases: dict[str | None, BaseModel] = {}
        self._datasets: dict[tuple[str | None, str], RatingDataset] = {}

    def _require_inputs(self) -> None:
        """Name all that is missing at once: stages to run, checkpoints to get."""
        missing = missing_inputs(prompt_inputs(self.workspace))
        for base in dict.fromkeys(adapter_set.base for adapter_set in self.cfg.adapter_sets.values()):
            missing += missing_base_files(**config.base_sections(self.cfg, base))
        raise_together(missing)

    def train_set(self, name: str) -> None:
        """Train one adapter set, or say that it is up to date."""
        adapter_set = self.cfg.adapter_sets[name]
        base = config.base_sections(self.cfg, adapter_set.base)
        settings = self._settings_of(name)
        inputs = [*prompt_inputs(self.workspace), *checkpoint_inputs(**base)]
        checkpoints = self._checkpoints(name, settings, inputs)
        with open_stage(self.workspace.adapter_set(name), settings, inputs, seed=self.cfg.seed) as stage:
            if stage.is_current:
                print(f"persona_lora: adapters/{name} is up to date")
                checkpoints.remove_leftovers()
                return
            start = self._find_checkpoint(name, checkpoints)
            plans, assignment = plan_adapter_set(
                self.samples,
                per=adapter_set.per,
                rows=adapter_set.rows,
                shuffle_personas=adapter_set.shuffle_personas,
                validation_share=self.cfg.validation_share,
                seed=self.cfg.seed,
            )
            self._train_plans(name, plans, stage, checkpoints, start)
            stage.write_table(
                "assignment.parquet", pa.table({"user_id": list(assignment), "adapter": list(assignment.values())})
            )
        checkpoints.remove()

    def _settings_of(self, name: str) -> dict[str, Any]:
        """What decides the adapters of a set, besides files and seed."""
        adapter_set = self.cfg.adapter_sets[name]
        section = config.plain(self.cfg.training)
        return {
            **config.settings_of(self.cfg, *TRAINING_KEYS),
            **self._settings_of_base(adapter_set.base),
            "training": {key: value for key, value in section.items() if key not in WITHOUT_EFFECT},
            "adapter_set": config.plain(adapter_set),
        }

    def _checkpoints(self, name: str, settings: dict[str, Any], inputs: Sequence[Path]) -> Checkpoints:
        settings, hashes = {**settings, "seed": self.cfg.seed}, sha256_of_inputs(inputs)
        device = self.cfg.device.partition(":")[0]
        origin = Origin(name, settings, hashes, device, key=stage_key(settings, hashes))
        folder = checkpoint_folder(self.workspace.adapter_set(name))
        return Checkpoints(folder, origin, self.cfg.training.keep_last_n_checkpoints)

    def _find_checkpoint(self, name: str, checkpoints: Checkpoints) -> Checkpoint | None:
        """What to go on from. Only the first set that isn't finished was stopped: later ones start anew."""
        found, note = checkpoints.find(self._resume)
        self._resume = None if self._resume else self._resume
        if note:
            print(f"persona_lora: adapters/{name}: {note}")
        return found

    def _settings_of_base(self, name: str | None) -> dict[str, Any]:
        """What of a base's sections decides the adapters besides its files, which count by their bytes."""
        sections = self.cfg if name is None else self.cfg.bases[name]
        tokenizer = config.plain(sections.tokenizer)
        return {
            "model": config.plain(sections.model),
            "tokenizer": {key: value for key, value in tokenizer.items() if key not in TOKENIZER_FILES},
            "model_type": config.plain(sections.checkpointer).get("model_type"),
        }

    def _train_plans(
        self,
        set_name: str,
        plans: Sequence[AdapterPlan],
        stage: Stage,
        checkpoints: Checkpoints,
        start: Checkpoint | None,
    ) -> None:
        adapter_set = self.cfg.adapter_sets[set_name]
        base = self._base(adapter_set.base)
        dataset = self._dataset(adapter_set.base, adapter_set.memories)
        jobs = [self._job(base, dataset, set_name, plan) for plan in plans]
        loss_fn = config.instantiate(self.cfg, "loss", default="torch.nn.CrossEntropyLoss")
        require_token_loss(loss_fn)
        logger = config.instantiate(
            self.cfg,
            "metric_logger",
            default="torchtune.training.metric_logging.DiskLogger",
            log_dir=str(self.workspace.root / "logs"),
        )
        logger.log_config(config.without_secrets(self.cfg))
        settings = self._settle_sharing(base, jobs, loss_fn)
        if start is not None:
            self._restore(base, jobs, start)
            hint = " (resume_from_checkpoint=false starts anew)" if self.cfg.resume_from_checkpoint is None else ""
            print(f"persona_lora: adapters/{set_name} goes on after step {start.step} from {start.path}{hint}")
        steps = train_steps(base.model, base.bank, jobs, loss_fn, settings, base.tokenizer.pad_id)
        self._follow(set_name, steps, jobs, logger, lambda done: self._save_checkpoint(base, jobs, checkpoints, done))
        logger.close()
        for job in jobs:
            self._save(base, job, stage)
            base.bank.remove(job.name)

    def _follow(
        self,
        set_name: str,
        steps: Iterator[StepReport],
        jobs: Sequence[AdapterJob],
        logger: Any,
        save_checkpoint: Callable[[int], None],
    ) -> None:
        """Take the steps, show and log them, save checkpoints; stop between two steps when told to."""
        rows: Counter[str] = Counter()
        seconds: Counter[str] = Counter()
        n_steps = sum(self.settings.n_steps(len(job.rows)) for job in jobs)
        before = sum(job.steps_done for job in jobs)
        with (
            stop_requests() as stop,
            tqdm(total=n_steps, initial=before, desc=f"train {set_name}", unit="step") as progress,
            self._profiler() as profiler,
        ):
            for done, report in enumerate(steps, start=before + 1):
                rows[report.adapter] += report.n_rows
                seconds[report.adapter] += report.seconds  # type: ignore[assignment]
                self._log(logger, report, done)
                self._show(progress, report)
                profiler.step()
                if stop.signal_number is not None or (done < n_steps and self._checkpoint_is_due(jobs, done)):
                    save_checkpoint(done)
                if stop.signal_number is not None:
                    raise Interrupted(stop.signal_number, self._what_is_kept(set_name, done, n_steps))
        self._report(set_name, rows, seconds)

    def _job(self, base: BaseModel, dataset: RatingDataset, set_name: str, plan: AdapterPlan) -> AdapterJob:
        name = f"{set_name}/{plan.adapter}"
        adapter = base.bank.add_new(name, self.cfg.seed)
        optimizer = config.instantiate(
            self.cfg, "optimizer", list(adapter.masters.values()), default="torch.optim.AdamW", lr=3e-4
        )
        scheduler = None
        if self.cfg.lr_scheduler is not None:
            n_steps = self.settings.n_steps(len(plan.rows))
            scheduler = config.instantiate(
                self.cfg, "lr_scheduler", optimizer, num_training_steps=n_steps, last_epoch=-1
            )
        job = AdapterJob(
            name=name,
            rows=[dataset.rows[index] for index in plan.rows],
            prefixes=[self.source.prefix_name(dataset.samples[index]) for index in plan.rows],
            optimizer=optimizer,
            lr_scheduler=scheduler,
            validation_rows=[dataset.rows[index] for index in plan.validation_rows],
        )
        if self.settings.offload_waiting:
            put_to_wait(base.bank, job)
        return job

    def _settle_sharing(self, base: BaseModel, jobs: Sequence[AdapterJob], loss_fn: Any) -> TrainingSettings:
        """The settings, without shared prefixes if these turn out to give other gradients here."""
        if self.settings.prefix_sharing == "off":
            return self.settings
        check = check_first_group(base.model, base.bank, jobs, loss_fn, self.settings, base.tokenizer.pad_id)
        if check.problem is None:
            return self.settings
        warnings.warn(f"{check.problem}; training goes on without sharing, at several times the cost", stacklevel=1)
        return replace(self.settings, prefix_sharing="off")

    def _restore(self, base: BaseModel, jobs: Sequence[AdapterJob], start: Checkpoint) -> None:
        for job in jobs:
            restore_job(base.bank, job, start.read(_part_name(job)))
        restore_process(start.read("process_0"))

    def _save_checkpoint(
        self, base: BaseModel, jobs: Sequence[AdapterJob], checkpoints: Checkpoints, done: int
    ) -> None:
        if not self.cfg.training.keep_last_n_checkpoints:
            return
        adapters = [Part(_part_name(job), partial(job_state, base.bank, job), job.steps_done) for job in jobs]
        checkpoints.save(done, [*adapters, Part("process_0", process_state)])

    def _checkpoint_is_due(self, jobs: Sequence[AdapterJob], done: int) -> bool:
        every = self.cfg.training.checkpoint_every_n_steps
        if every is None:
            return all(job.ends_epoch(self.settings) for job in jobs)
        return bool(done % every == 0)

    def _what_is_kept(self, set_name: str, done: int, n_steps: int) -> str:
        where = f"adapters/{set_name} stopped after step {done} of {n_steps}"
        if not self.cfg.training.keep_last_n_checkpoints:
            return f"{where}, without a checkpoint"
        if self.cfg.resume_from_checkpoint is False:
            return f"{where}, its checkpoint is kept; leave out resume_from_checkpoint=false"
        return f"{where}, its checkpoint is kept"

    def _base(self, name: str | None) -> BaseModel:
        if name not in self._bases:
            self._bases.clear()  # one base in memory at a time
            self._bases[name] = load_base(
                **config.base_sections(self.cfg, name),
                device=self.cfg.device,
                dtype=self.cfg.dtype,
                enable_activation_checkpointing=self.cfg.enable_activation_checkpointing,
                compile=self.cfg.compile,
            )
        return self._bases[name]

    def _dataset(self, base_name: str | None, memories: MemoriesSeen) -> RatingDataset:
        key = (base_name, memories)
        if key not in self._datasets:
            dataset = RatingDataset(self._base(base_name).tokenizer, self.source, self.samples, memories)
            self._datasets[key] = dataset
            if dataset.n_shortened:
                print(
                    f"persona_lora: {dataset.n_shortened} of {len(dataset)} prompts were shortened to fit the context"
                )
        return self._datasets[key]

    def _profiler(self) -> Any:
        if self.cfg.profiler is None:
            return training.DummyProfiler()
        profiler, _ = config.instantiate(self.cfg, "profiler")
        return profiler

    def _log(self, logger: Any, report: StepReport, step: int) -> None:
        if report.validation_loss is not None:
            logger.log(f"validation_loss/{report.adapter}", report.validation_loss, step=step)
        if step % self.cfg.log_every_n_steps:
            return
        metrics: dict[str, float] = {
            f"loss/{report.adapter}": report.loss,
            "lr": report.learning_rate,
            "rows_per_second": report.n_rows / report.seconds,
        }
        if report.grad_norm is not None:
            metrics["grad_norm"] = report.grad_norm
        if self.cfg.log_peak_memory_stats and self.cfg.device != "cpu":
            metrics.update(training.get_memory_stats(device=torch.device(self.cfg.device)))
        logger.log_dict(metrics, step=step)

    def _save(self, base: BaseModel, job: AdapterJob, stage: Stage) -> None:
        folder = job.name.rpartition("/")[2]
        for file in save_adapter(
            stage.path(f"{folder}/adapter.safetensors").parent,
            base.bank[job.name].state_dict(),
            lora_shape(base.model),
            model_type=base.model_type,
            base_model=str(base.checkpoint_dir),
        ):
            stage.path(f"{folder}/{file}")
        stage.write_json(
            f"{folder}/training.json",
            {
                "rows": len(job.rows),
                "steps": job.steps_done,
                "validation_losses": job.validation_losses,
            },
        )

    @staticmethod
    def _show(progress: Any, report: StepReport) -> None:
        progress.update(1)
        progress.set_postfix_str(f"{report.adapter} loss {report.loss:.3f}")
        if report.validation_loss is not None:
            progress.write(f"{report.adapter} epoch {report.epoch + 1}: validation loss {report.validation_loss:.4f}")

    def _report(self, set_name: str, rows: Counter[str], seconds: Counter[str]) -> None:
        if not seconds:  # resumed after the last step
            return
        each = ", ".join(f"{adapter.rpartition('/')[2]} {spent:.1f} s" for adapter, spent in seconds.items())
        print(f"persona_lora: adapters/{set_name}: {rows.total() / seconds.total():.1f} rows/s; {each}")


def _part_name(job: AdapterJob) -> str:
    return f"adapter_{job.name.rpartition('/')[2]}"


@config.parse
def recipe_main(cfg: DictConfig) -> None:
    """Train the adapters of every entry of ``adapter_sets``."""
    config.check_components(cfg, ["optimizer", "lr_scheduler", "loss", "metric_logger", "profiler"], optional=True)
    if cfg.cudnn_deterministic_mode is not None:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses
        torch.set_deterministic_debug_mode(cfg.cudnn_deterministic_mode)
    with sigterm_in_a_line():
        recipe = PersonaLoraRecipe(cfg)
        for name in cfg.adapter_sets:
            recipe.train_set(name)


if __name__ == "__main__":
    recipe_main()
