"""Train persona adapters: one frozen base, one LoRA adapter per persona (or one for all users).

Reads   samples/, memory/, data/ and the base checkpoint
Writes  adapters/<set>/<adapter>/ for every entry of ``adapter_sets``

    tune run persona_lora --config quickstart.yaml
    tune run persona_lora --config phi3_persona.yaml optimizer.lr=1e-4
"""

import time
from collections import Counter
from collections.abc import Sequence
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
from personas_tune.errors import raise_together
from personas_tune.schema import MemoriesSeen
from personas_tune.training.fit import AdapterJob, StepReport, TrainingSettings, require_token_loss, train_bank
from personas_tune.training.sets import AdapterPlan, plan_adapter_set
from personas_tune.workspace import Stage, Workspace, missing_inputs, open_stage, prompt_inputs

COMPONENTS = ("optimizer", "lr_scheduler", "loss")
TRAINING_KEYS = (
    "dtype", "epochs", "batch_size", "gradient_accumulation_steps", "rows_per_user", "max_steps_per_epoch",
    "clip_grad_norm", "validation_share", "training", *COMPONENTS,
)  # fmt: skip


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
            share_prefixes=cfg.training.prefix_sharing == "auto"
            and not (cfg.enable_activation_checkpointing or cfg.compile),
            seed=cfg.seed,
        )
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
        settings = {
            **config.settings_of(self.cfg, *TRAINING_KEYS),
            **self._settings_of_base(adapter_set.base),
            "adapter_set": config.plain(adapter_set),
            "share_prefixes": self.settings.share_prefixes,
        }
        inputs = [*prompt_inputs(self.workspace), *checkpoint_inputs(**base)]
        with open_stage(self.workspace.adapter_set(name), settings, inputs, seed=self.cfg.seed) as stage:
            if stage.is_current:
                print(f"persona_lora: adapters/{name} is up to date")
                return
            plans, assignment = plan_adapter_set(
                self.samples,
                per=adapter_set.per,
                rows=adapter_set.rows,
                shuffle_personas=adapter_set.shuffle_personas,
                validation_share=self.cfg.validation_share,
                seed=self.cfg.seed,
            )
            self._train_plans(name, plans, stage)
            stage.write_table(
                "assignment.parquet", pa.table({"user_id": list(assignment), "adapter": list(assignment.values())})
            )

    def _settings_of_base(self, name: str | None) -> dict[str, Any]:
        """What of a base's sections decides the adapters besides its files, which count by their bytes."""
        sections = self.cfg if name is None else self.cfg.bases[name]
        tokenizer = config.plain(sections.tokenizer)
        return {
            "model": config.plain(sections.model),
            "tokenizer": {key: value for key, value in tokenizer.items() if key not in TOKENIZER_FILES},
            "model_type": config.plain(sections.checkpointer).get("model_type"),
        }

    def _train_plans(self, set_name: str, plans: Sequence[AdapterPlan], stage: Stage) -> None:
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
        rows: Counter[str] = Counter()
        seconds: Counter[str] = Counter()
        n_steps = sum(self.settings.steps_per_epoch(len(job.rows)) for job in jobs) * self.settings.epochs
        with tqdm(total=n_steps, desc=f"train {set_name}", unit="step") as progress, self._profiler() as profiler:
            started = time.perf_counter()

            def on_step(report: StepReport) -> None:
                nonlocal started
                now = time.perf_counter()
                rows[report.adapter] += report.n_rows
                seconds[report.adapter] += now - started  # type: ignore[assignment]
                self._log(logger, report, progress.n + 1, report.n_rows / (now - started))
                started = now
                progress.update(1)
                progress.set_postfix_str(f"{report.adapter} loss {report.loss:.3f}")
                profiler.step()

            def on_epoch(job: AdapterJob, epoch: int) -> None:
                nonlocal started
                if job.validation_losses:
                    logger.log(f"validation_loss/{job.name}", job.validation_losses[-1], step=progress.n)
                    progress.write(f"{job.name} epoch {epoch + 1}: validation loss {job.validation_losses[-1]:.4f}")
                started = time.perf_counter()  # validating is no adapter's training time

            train_bank(base.model, base.bank, jobs, loss_fn, self.settings, base.tokenizer.pad_id, on_step, on_epoch)
        logger.close()
        for job in jobs:
            self._save(base, job, stage)
            base.bank.remove(job.name)
        self._report(set_name, rows, seconds)

    def _job(self, base: BaseModel, dataset: RatingDataset, set_name: str, plan: AdapterPlan) -> AdapterJob:
        name = f"{set_name}/{plan.adapter}"
        adapter = base.bank.add_new(name, self.cfg.seed)
        optimizer = config.instantiate(
            self.cfg, "optimizer", list(adapter.masters.values()), default="torch.optim.AdamW", lr=3e-4
        )
        scheduler = None
        if self.cfg.lr_scheduler is not None:
            n_steps = self.settings.steps_per_epoch(len(plan.rows)) * self.settings.epochs
            scheduler = config.instantiate(
                self.cfg, "lr_scheduler", optimizer, num_training_steps=n_steps, last_epoch=-1
            )
        return AdapterJob(
            name=name,
            rows=[dataset.rows[index] for index in plan.rows],
            prefixes=[self.source.prefix_name(dataset.samples[index]) for index in plan.rows],
            optimizer=optimizer,
            lr_scheduler=scheduler,
            validation_rows=[dataset.rows[index] for index in plan.validation_rows],
        )

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

    def _log(self, logger: Any, report: StepReport, step: int, rows_per_second: float) -> None:
        if step % self.cfg.log_every_n_steps:
            return
        metrics: dict[str, float] = {
            f"loss/{report.adapter}": report.loss,
            "lr": report.learning_rate,
            "rows_per_second": rows_per_second,
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

    def _report(self, set_name: str, rows: Counter[str], seconds: Counter[str]) -> None:
        each = ", ".join(f"{adapter.rpartition('/')[2]} {spent:.1f} s" for adapter, spent in seconds.items())
        print(f"persona_lora: adapters/{set_name}: {rows.total() / seconds.total():.1f} rows/s; {each}")


@config.parse
def recipe_main(cfg: DictConfig) -> None:
    """Train the adapters of every entry of ``adapter_sets``."""
    config.refuse_resume(cfg)
    config.check_components(cfg, ["optimizer", "lr_scheduler", "loss", "metric_logger", "profiler"], optional=True)
    recipe = PersonaLoraRecipe(cfg)
    for name in cfg.adapter_sets:
        recipe.train_set(name)


if __name__ == "__main__":
    recipe_main()
