"""Train persona adapters: one frozen base, one LoRA adapter per persona (or one for all users).

Reads   samples/, memory/, data/ and the base checkpoint
Writes  adapters/<set>/<adapter>/ and adapters/<set>/losses.parquet for every entry of ``adapter_sets``

    tune run persona_lora --config quickstart.yaml
    tune run persona_lora --config phi3_persona.yaml optimizer.lr=1e-4
    tune run persona_lora --config phi3_persona.yaml resume_from_checkpoint=true
    tune run --nproc_per_node 8 persona_lora --config phi3_persona.yaml
"""

import os
from collections import ChainMap
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torchtune import training

from personas_tune import config
from personas_tune.adapters.base_model import (
    TOKENIZER_FILES,
    BaseModel,
    checkpoint_inputs,
    is_to_be_sharded,
    load_base,
    missing_base_files,
)
from personas_tune.adapters.base_weights import weight_files, weight_reader
from personas_tune.adapters.files import NATIVE_FILE, load_native, lora_shape, record_base, save_in_set
from personas_tune.adapters.importing import check_imports, import_set, peft_folders, peft_inputs
from personas_tune.adapters.selection import write_assignment
from personas_tune.adapters.sharding import is_sharded
from personas_tune.datasets import RatingDataset, RatingSource
from personas_tune.errors import Interrupted, PersonasTuneError, raise_together
from personas_tune.processes import Processes, take_own_device
from personas_tune.schema import MemoriesSeen
from personas_tune.training.checkpoints import Checkpoint, Checkpoints, Origin, checkpoint_folder
from personas_tune.training.fit import (
    AdapterJob,
    StepReport,
    TrainingSettings,
    put_to_wait,
    require_token_loss,
    settle_sharing,
    train_steps,
)
from personas_tune.training.meetings import Meetings, course_of, steps_taken
from personas_tune.training.parts import parts_of, restore_parts
from personas_tune.training.schedule import Progress, checkpoint_turns
from personas_tune.training.sets import ALL_USERS, AdapterPlan, assign_users_to_adapters, plan_adapter_set
from personas_tune.training.step_log import StepLog, losses_table, profiled
from personas_tune.training.stopping import sigterm_in_a_line, stop_requests
from personas_tune.training.teams import Place, Team, form_team, place_adapters, shared_adapters
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
        processes: Those that share the work.
    """

    def __init__(self, cfg: DictConfig, processes: Processes) -> None:
        self.cfg = cfg
        self.processes = processes
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
        self._sharded = self.processes.from_first(self._find_sharded)
        self._bases: dict[str | None, BaseModel] = {}
        self._datasets: dict[tuple[str | None, str], RatingDataset] = {}
        self.processes.from_first(self._check_imports)

    @property
    def _base_names(self) -> list[str | None]:
        return list(dict.fromkeys(adapter_set.base for adapter_set in self.cfg.adapter_sets.values()))

    def _find_sharded(self) -> dict[str | None, bool]:
        """Of which bases each process is to hold a part."""
        models = {name: config.base_sections(self.cfg, name)["model"] for name in self._base_names}
        shared = (self.cfg.parallel, self.processes.size)
        return {
            name: is_to_be_sharded(*shared, model, self.cfg.device, self.cfg.dtype) for name, model in models.items()
        }

    def _require_inputs(self) -> None:
        """Name all that is missing at once: stages to run, checkpoints to get."""
        missing = missing_inputs(prompt_inputs(self.workspace))
        for base in self._base_names:
            missing += missing_base_files(**config.base_sections(self.cfg, base))
        raise_together(missing)

    def _check_imports(self) -> None:
        """Tell all that can't be imported before anything is trained or written."""
        problems: list[PersonasTuneError] = []
        for name, adapter_set in self.cfg.adapter_sets.items():
            if adapter_set.peft is not None:
                adapters, where = self._assignment_of(name).values(), f"adapter_sets.{name}.peft"
                sections = config.base_sections(self.cfg, adapter_set.base)
                problems += check_imports(adapter_set.peft, adapters, adapter_set.per, **sections, where=where)
        raise_together(problems)

    def make_set(self, name: str) -> None:
        """Train or import one adapter set, or say that it is up to date."""
        if self.cfg.adapter_sets[name].peft is None:
            self.train_set(name)
        else:
            self.import_set(name)

    def train_set(self, name: str) -> None:
        """Train one adapter set, or say that it is up to date."""
        adapter_set = self.cfg.adapter_sets[name]
        settings = self._settings_of(name)
        plans, assignment = plan_adapter_set(
            self.samples,
            per=adapter_set.per,
            rows=adapter_set.rows,
            shuffle_personas=adapter_set.shuffle_personas,
            validation_share=self.cfg.validation_share,
            seed=self.cfg.seed,
            rows_from=adapter_set.rows_from,
            share=adapter_set.share,
            where=f"adapter_sets.{name}",
        )
        begun = {path / NATIVE_FILE for plan in plans if (path := self._start_of(name, plan.adapter)) is not None}
        base_files = checkpoint_inputs(**config.base_sections(self.cfg, adapter_set.base))
        inputs = [*prompt_inputs(self.workspace), *base_files, *sorted(begun)]
        sharded = self._sharded[adapter_set.base]
        parallel = "fsdp" if sharded else self.cfg.parallel
        places = place_adapters([len(plan.rows) for plan in plans], self.processes.size, parallel)
        shared = shared_adapters(places, [plan.adapter for plan in plans], in_step=sharded)
        checkpoints = self._checkpoints(name, settings, inputs, shared)
        with self._open(name, settings, inputs) as stage:
            if stage.is_current:
                self._say(f"adapters/{name} is up to date")
                if self.processes.is_first:
                    checkpoints.remove_leftovers()
                return
            start = self._find_checkpoint(name, checkpoints)
            self._train_plans(name, plans, places, stage, checkpoints, start)
            if self.processes.is_first:
                write_assignment(stage, assignment)
        if self.processes.is_first:
            checkpoints.remove()

    def _train_plans(
        self,
        set_name: str,
        plans: Sequence[AdapterPlan],
        places: Sequence[Place],
        stage: Stage,
        checkpoints: Checkpoints,
        start: Checkpoint | None,
    ) -> None:
        adapter_set = self.cfg.adapter_sets[set_name]
        base, save = self._base(adapter_set.base), self._saving(adapter_set.base, stage)
        dataset = self._dataset(adapter_set.base, adapter_set.memories)
        team, place = form_team(places, self.processes, in_step=is_sharded(base.model))
        jobs = [self._job(base, dataset, set_name, plans[index], team) for index in place.adapters]
        loss_fn = config.instantiate(self.cfg, "loss", default="torch.nn.CrossEntropyLoss")
        require_token_loss(loss_fn)
        pad_id = base.tokenizer.pad_id
        settings = settle_sharing(base.model, base.bank, jobs, loss_fn, self.settings, pad_id, self.processes)
        if start is not None:
            restore_parts(base.bank, jobs, team, self.processes.rank, start)
            hint = " (resume_from_checkpoint=false starts anew)" if self.cfg.resume_from_checkpoint is None else ""
            self._say(f"adapters/{set_name} goes on after step {start.step} from {start.path}{hint}")
        steps = train_steps(base.model, base.bank, jobs, loss_fn, settings, pad_id, team)
        course = course_of(plans, places, jobs, settings, self.processes)

        def save_checkpoint() -> None:
            parts = parts_of(base.bank, jobs, team, self.processes.rank)
            checkpoints.save(steps_taken(jobs, team, self.processes), parts, self.processes)

        signal_number = self._follow(set_name, steps, team, course, save_checkpoint)
        if signal_number is not None:
            n_steps = sum(progress.n_steps for of_team in course for progress in of_team)
            n_done = steps_taken(jobs, team, self.processes)
            raise Interrupted(signal_number, self._what_is_kept(set_name, n_done, n_steps))
        for job in jobs:
            if team.leads:
                save(job.adapter, base.bank[job.name].state_dict(), **job.record)
            base.bank.remove(job.name)
        for names in self.processes.gather(stage.written):
            stage.include(names)
        histories = ChainMap(*self.processes.gather_in_first({job.adapter: job.history for job in jobs if team.leads}))
        if self.processes.is_first:
            stage.write_table("losses.parquet", losses_table({plan.adapter: histories[plan.adapter] for plan in plans}))

    def _follow(
        self,
        set_name: str,
        steps: Iterator[StepReport],
        team: Team,
        course: Sequence[Sequence[Progress]],
        save: Callable[[], None],
    ) -> int | None:
        """Take the steps, show and log them, save checkpoints; gives the signal that stopped it between two steps."""
        due = checkpoint_turns(course, self.settings.schedule, self.cfg.training.checkpoint_every_n_steps)
        device = torch.device(self.cfg.device)
        with (
            stop_requests() as stop,
            StepLog(
                set_name,
                course,
                self._logger() if self.processes.is_first else None,
                every=self.cfg.log_every_n_steps,
                memory_of=device if self.cfg.log_peak_memory_stats and device.type != "cpu" else None,
            ) as log,
            self._profiler() as profiler,
        ):
            meetings = Meetings(self.processes, team, stop, log.add, save)
            signal_number = meetings.follow(profiled(steps, profiler), due)
        if signal_number is None:
            self._say(f"adapters/{set_name}: {log.summary()}")
        return signal_number

    def import_set(self, name: str) -> None:
        """Import one adapter set from PEFT folders, or say that it is up to date."""
        adapter_set, assignment = self.cfg.adapter_sets[name], self._assignment_of(name)
        folders = peft_folders(adapter_set.peft, assignment.values(), adapter_set.per)
        files = checkpoint_inputs(**config.base_sections(self.cfg, adapter_set.base))
        settings = {
            **self._settings_of_base(adapter_set.base),
            "adapter_set": {**config.plain(adapter_set), "peft": True},  # its path doesn't count, its files do
        }
        inputs = [self.workspace.train_samples, *files, *peft_inputs(folders)]
        with self._open(name, settings, inputs) as stage:
            if stage.is_current:
                self._say(f"adapters/{name} is up to date")
                return
            base, save = self._base(adapter_set.base), self._saving(adapter_set.base, stage)
            if not self.processes.is_first:
                return
            read = weight_reader(weight_files(files))
            for other in import_set(base, name, folders, save, seed=self.cfg.seed, base_weight=read):
                self._say(f"adapters/{name}: trained on {other}, used on {base.checkpoint_dir}")
            write_assignment(stage, assignment)
        self._say(f"adapters/{name}: imported {', '.join(map(str, folders.values()))}")

    def _open(self, name: str, settings: dict[str, Any], inputs: Sequence[Path]) -> AbstractContextManager[Stage]:
        opened = partial(open_stage, self.workspace.adapter_set(name), settings, inputs, seed=self.cfg.seed)
        return self.processes.held_by_first(opened)

    def _settings_of(self, name: str) -> dict[str, Any]:
        """What decides the adapters of a set, besides files and seed."""
        adapter_set = self.cfg.adapter_sets[name]
        section = config.plain(self.cfg.training)
        return {
            **config.settings_of(self.cfg, *TRAINING_KEYS),
            **self._settings_of_base(adapter_set.base),
            "training": {key: value for key, value in section.items() if key not in WITHOUT_EFFECT},
            "adapter_set": {key: value for key, value in config.plain(adapter_set).items() if key != "peft"},
        }

    def _settings_of_base(self, name: str | None) -> dict[str, Any]:
        """What of a base's sections decides the adapters besides its files, which count by their bytes."""
        sections = self.cfg if name is None else self.cfg.bases[name]
        tokenizer = config.plain(sections.tokenizer)
        return {
            "model": config.plain(sections.model),
            "tokenizer": {key: value for key, value in tokenizer.items() if key not in TOKENIZER_FILES},
            "model_type": config.plain(sections.checkpointer).get("model_type"),
        }

    def _start_of(self, name: str, adapter: str) -> Path | None:
        """The folder of the adapter that one of a set begins with; None for a fresh one."""
        start = self.cfg.adapter_sets[name].start_from
        if start is None:
            return None
        is_shared = self.cfg.adapter_sets[start].per == "all"
        return self.workspace.adapter_set(start) / (ALL_USERS if is_shared else adapter)

    def _assignment_of(self, name: str) -> dict[str, str]:
        """Each user's adapter in an imported set."""
        per = self.cfg.adapter_sets[name].per
        return assign_users_to_adapters(self.samples, per=per, shuffle_personas=False, seed=self.cfg.seed)

    def _checkpoints(
        self, name: str, settings: dict[str, Any], inputs: Sequence[Path], shared: dict[str, str]
    ) -> Checkpoints:
        settings = {**settings, "seed": self.cfg.seed}
        hashes = self.processes.from_first(lambda: sha256_of_inputs(inputs))
        device = self.cfg.device.partition(":")[0]
        origin = Origin(name, settings, hashes, device, stage_key(settings, hashes), shared)
        folder = checkpoint_folder(self.workspace.adapter_set(name))
        return Checkpoints(folder, origin, self.cfg.training.keep_last_n_checkpoints)

    def _find_checkpoint(self, name: str, checkpoints: Checkpoints) -> Checkpoint | None:
        """What to go on from. Only the first set that isn't finished was stopped: later ones start anew."""
        found, note = self.processes.from_first(lambda: checkpoints.find(self._resume))
        self._resume = None if self._resume else self._resume
        if note:
            self._say(f"adapters/{name}: {note}")
        if found is not None:
            checkpoints.go_on_from(found)
        return found

    def _what_is_kept(self, set_name: str, done: int, n_steps: int) -> str:
        what = f"adapters/{set_name} stopped after step {done} of {n_steps}"
        if not self.cfg.training.keep_last_n_checkpoints:
            return f"{what}, without a checkpoint"
        if self.cfg.resume_from_checkpoint is False:
            return f"{what}, its checkpoint is kept; leave out resume_from_checkpoint=false"
        return f"{what}, its checkpoint is kept"

    def _base(self, name: str | None) -> BaseModel:
        if name not in self._bases:
            self._bases.clear()  # one base in memory at a time
            sections = config.base_sections(self.cfg, name)
            self._bases[name] = load_base(
                **sections,
                device=self.cfg.device,
                dtype=self.cfg.dtype,
                enable_activation_checkpointing=self.cfg.enable_activation_checkpointing,
                compile=self.cfg.compile,
                sharded=self._sharded[name],
            )
        return self._bases[name]

    def _dataset(self, base_name: str | None, memories: MemoriesSeen) -> RatingDataset:
        key = (base_name, memories)
        if key not in self._datasets:
            dataset = RatingDataset(self._base(base_name).tokenizer, self.source, self.samples, memories)
            self._datasets[key] = dataset
            if dataset.n_shortened:
                self._say(f"{dataset.n_shortened} of {len(dataset)} prompts were shortened to fit the context")
        return self._datasets[key]

    def _job(self, base: BaseModel, dataset: RatingDataset, set_name: str, plan: AdapterPlan, team: Team) -> AdapterJob:
        name = f"{set_name}/{plan.adapter}"
        adapter = base.bank.add_new(name, self.cfg.seed, stream=team.index)
        if (start := self._start_of(set_name, plan.adapter)) is not None:
            base.bank.start_from(name, load_native(start), where=str(start))
        team.spread(adapter.masters.values())  # GPUs of different kinds may draw different weights
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

    def _saving(self, base_name: str | None, stage: Stage) -> Callable[..., None]:
        """What writes one adapter of a set; every process calls this."""
        base, files = self._base(base_name), checkpoint_inputs(**config.base_sections(self.cfg, base_name))
        record = self.processes.from_first(lambda: record_base(base.model_type, base.checkpoint_dir, files))
        return partial(save_in_set, stage, shape=lora_shape(base.model), base=record)

    def _logger(self) -> Any:
        logger = config.instantiate(
            self.cfg,
            "metric_logger",
            default="torchtune.training.metric_logging.DiskLogger",
            log_dir=str(self.workspace.root / "logs"),
        )
        logger.log_config(config.without_secrets(self.cfg))
        return logger

    def _profiler(self) -> Any:
        if self.cfg.profiler is None:
            return training.DummyProfiler()
        profiler, _ = config.instantiate(self.cfg, "profiler")
        return profiler

    def _say(self, text: str) -> None:
        if self.processes.is_first:
            print(f"persona_lora: {text}")


@config.parse_in_processes
def recipe_main(cfg: DictConfig, processes: Processes) -> None:
    """Train the adapters of every entry of ``adapter_sets``."""
    config.check_components(cfg, ["optimizer", "lr_scheduler", "loss", "metric_logger", "profiler"], optional=True)
    take_own_device(cfg.device)
    if cfg.cudnn_deterministic_mode is not None:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses
        torch.set_deterministic_debug_mode(cfg.cudnn_deterministic_mode)
    with sigterm_in_a_line():
        recipe = PersonaLoraRecipe(cfg, processes)
        for name in cfg.adapter_sets:
            recipe.make_set(name)


if __name__ == "__main__":
    recipe_main()
