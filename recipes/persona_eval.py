"""Measure every agent and the baselines on the same test rows.

Reads   samples/, adapters/, memory/, data/ and the base checkpoints
Writes  eval/predictions_<agent>.parquet, eval/calibration_<agent>.json, eval/metrics.json, eval/table.md,
        report/index.html

    tune run persona_eval --config quickstart.yaml
    tune run persona_eval --config phi3_persona.yaml evaluation.temperature=0
    tune run --nproc_per_node 8 persona_eval --config phi3_persona.yaml
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from omegaconf import DictConfig
from tqdm import tqdm

from personas_tune import config
from personas_tune.adapters.base_model import (
    BaseModel,
    checkpoint_inputs,
    is_to_be_sharded,
    load_base,
    missing_base_files,
)
from personas_tune.adapters.selection import load_adapter_set
from personas_tune.adapters.sharding import in_lockstep
from personas_tune.datasets import RatingDataset, RatingSource
from personas_tune.errors import raise_together
from personas_tune.evaluation.baselines import fit_baselines
from personas_tune.evaluation.calibration import fit_calibration, require_calibration_rows
from personas_tune.evaluation.hybrids import fit_hybrid, numbers_of_prompts
from personas_tune.evaluation.intervals import Resampling
from personas_tune.evaluation.measure import (
    Measurement,
    optimal_predictions,
    readout_probabilities,
    readout_values,
)
from personas_tune.evaluation.own_versus_other import choose_rows, measure_own_versus_other
from personas_tune.evaluation.predict import (
    Sampling,
    predict_distributions,
    predict_texts,
    prediction_table,
    share_of_rows,
)
from personas_tune.evaluation.readouts import Probabilities, expected_ratings, most_likely_ratings
from personas_tune.evaluation.table import write_table
from personas_tune.processes import Processes, take_own_device
from personas_tune.report.write import build_report
from personas_tune.training.sets import latest_share
from personas_tune.workspace import (
    COLUMNS,
    MANIFEST,
    Stage,
    Workspace,
    missing_inputs,
    open_stage,
    prompt_inputs,
    read_json,
    read_table,
)

SETTINGS = ("agents", "evaluation", "dtype", "model", "tokenizer", "bases", "adapter_sets")


class PersonaEvalRecipe:
    """Predicts with every agent, fits the baselines and writes the table.

    Args:
        cfg: The experiment.
        processes: Those that share the rows.
    """

    def __init__(self, cfg: DictConfig, processes: Processes) -> None:
        self.cfg = cfg
        self.processes = processes
        self.workspace = Workspace.at(cfg.output_dir)
        self.inputs = self._find_inputs()
        self.source = RatingSource(self.workspace.root)
        self.samples = self.source.samples("test")
        self._values = [float(label) for label in self.source.labels]
        self._train = self.source.samples("train")
        _, self._latest = latest_share(self._train, range(len(self._train)), cfg.evaluation.calibration_share)
        self.resampling = Resampling(cfg.evaluation.n_resamples, cfg.evaluation.confidence, cfg.seed)
        learning = [name for name in cfg.agents if self._learns_from_train(name)]
        if learning:
            require_calibration_rows(*self._latest_answers())
        self._too_well_known = {name for name in learning if self._trained_on_latest(cfg.agents[name].adapters)}
        # Agents that differ in their readout only share one pass over the test rows, and one over the train rows.
        self._distributions: dict[tuple[str | None, str | None, str], Any] = {}
        self._train_distributions: dict[tuple[str | None, str | None, str], Probabilities] = {}
        self._of_train: dict[str, Probabilities] = {}  # of the agents that are calibrated or used by a regression
        self._raw: dict[str, Probabilities] = {}
        self._own_versus_other: dict[str, dict[str, Any]] = {}

    def predict(self, stage: Stage) -> dict[str, pa.Table]:
        """Every agent's predictions, also written to their files; one base in memory at a time.

        Every process predicts its share of the rows; the first gets and writes them all.
        """
        if self.processes.is_first:
            self._warn_of_known_rows()
        tables = {}
        for base_name in dict.fromkeys(self._base_of(agent) for agent in self.cfg.agents.values()):
            tables.update(self._predict_agents_on(base_name, stage))
        return {name: tables[name] for name in self.cfg.agents if name in tables}

    def measure_baselines(self) -> Measurement:
        """The baselines and, for a world, the floor; reads every table that measuring needs."""
        users = read_table(self.workspace.users, COLUMNS["users"])
        interactions = read_table(self.workspace.interactions, COLUMNS["interactions"])
        measurement = Measurement(self.samples, users, self._values, self.resampling)
        baselines = fit_baselines(
            interactions.filter(pc.field("split") == "train"),
            read_table(self.workspace.outside, ("user_id", "item_id", "rating")),
            read_table(self.workspace.test_samples, COLUMNS["samples"]),
            read_table(self.workspace.items, COLUMNS["items"]),
            users,
            read_table(self.workspace.train_samples, COLUMNS["samples"]),
            labels=self._values,
            historical_average=self._made_with()["historical_average"],
            seed=self.cfg.seed,
        )
        for name, baseline in baselines.items():
            measurement.add_baseline(name, baseline)
        if self.workspace.oracle.is_file():
            oracle = read_table(self.workspace.oracle, ("user_id", "item_id", "optimal"))
            measurement.add_floor(optimal_predictions(self.samples, oracle))
        return measurement

    def measure_agents(self, measurement: Measurement, predictions: Mapping[str, pa.Table]) -> dict[str, Any]:
        """``metrics.json``: agents, baselines, floor, paired differences, settings."""
        for name, table in predictions.items():
            agent = self.cfg.agents[name]
            described = {
                "base": self._base_of(agent) or "default",
                "adapters": agent.adapters,
                "memories": self._memories_of(agent),
                "readout": agent.readout,
                "calibrated": agent.calibrate,
                "published": None if agent.published is None else dict(agent.published),
                "calibrated_on_trained_rows": name in self._too_well_known,
                "calibrated_on_final_profiles": self._learns_from_final_profiles(name),
            }
            p = readout_probabilities(table, agent.readout)
            measurement.add_agent(name, readout_values(table, agent.readout), described, p)
        if self.cfg.evaluation.hybrids:
            self._add_hybrids(measurement)
        metrics = measurement.metrics(**self._made_with(), seed=self.cfg.seed)
        return {**metrics, "own_versus_other": self._own_versus_other}

    def _add_hybrids(self, measurement: Measurement) -> None:
        """Regressions on the numbers of the prompts and an agent's distributions, and on the numbers alone."""
        train = read_table(self.workspace.interactions, COLUMNS["interactions"]).filter(pc.field("split") == "train")
        numbers_train, numbers = numbers_of_prompts(
            read_table(self.workspace.train_samples, COLUMNS["samples"]).take(self._latest),
            read_table(self.workspace.test_samples, COLUMNS["samples"]),
            train,
            read_table(self.workspace.items, COLUMNS["items"]),
            read_table(self.workspace.users, COLUMNS["users"]),
            self._made_with()["historical_average"],
        )
        answers = self._latest_answers()
        without = fit_hybrid(numbers_train, None, *answers, numbers, None, self._values)
        for name in self.cfg.evaluation.hybrids:
            of_agent = self._of_train[name], self._raw[name]
            hybrid = fit_hybrid(numbers_train, of_agent[0], *answers, numbers, of_agent[1], self._values)
            measurement.add_hybrid(name, hybrid, without)

    def _made_with(self) -> dict[str, Any]:
        """The leak-relevant settings that the data was really made with, whatever this run's config says."""
        prepared = read_json(self.workspace.root / "data" / MANIFEST)["settings"]["data"]
        return {key: prepared[key] for key in ("historical_average", "traits")}

    def _find_inputs(self) -> list[Any]:
        """Every file that the evaluation depends on; names all that is missing at once."""
        files = [*prompt_inputs(self.workspace), self.workspace.test_samples]
        files += [self.workspace.interactions, self.workspace.outside]
        if self.workspace.oracle.is_file():
            files.append(self.workspace.oracle)
        for name in sorted({agent.adapters for agent in self.cfg.agents.values() if agent.adapters is not None}):
            files.append(self.workspace.adapter_set(name) / MANIFEST)
        names = dict.fromkeys(self._base_of(agent) for agent in self.cfg.agents.values())
        bases = [config.base_sections(self.cfg, name) for name in names]
        missing = [error for base in bases for error in missing_base_files(**base)]
        raise_together([*missing_inputs(files), *missing])
        return [*files, *(file for base in bases for file in checkpoint_inputs(**base))]

    def _predict_agents_on(self, base_name: str | None, stage: Stage) -> dict[str, pa.Table]:
        """The agents of one base, which is let go of on return, before the next one is loaded."""
        sections = config.base_sections(self.cfg, base_name)
        where = {"device": self.cfg.device, "dtype": self.cfg.dtype}
        sharded = self.processes.from_first(
            lambda: is_to_be_sharded(self.cfg.parallel, self.processes.size, sections["model"], **where)
        )
        base = load_base(**sections, **where, sharded=sharded)
        agents = {name: agent for name, agent in self.cfg.agents.items() if self._base_of(agent) == base_name}
        for agent in {agent.adapters: agent for agent in agents.values()}.values():
            self._load_adapters(agent, base)  # what is damaged or doesn't fit is told before hours of predicting
        tables = {}
        datasets: dict[str, RatingDataset] = {}
        for name, agent in agents.items():
            memories = self._memories_of(agent)
            if memories not in datasets:
                datasets[memories] = RatingDataset(base.tokenizer, self.source, self.samples, memories)
            p, texts = self._predict_agent(name, agent, base, datasets[memories])
            if self._learns_from_train(name):
                self._of_train[name] = self._predict_train(agent, base)
            if self.processes.is_first:
                self._raw[name], told = p, self._calibrated(name, p, stage)
                tables[name] = prediction_table(self.samples, told, self.source.labels, texts)
                stage.write_table(f"predictions_{name}.parquet", tables[name])
            if name in self.cfg.evaluation.own_versus_other:
                self._try_all_adapters(name, agent, base, datasets[memories], p)
        return tables

    def _predict_agent(
        self, name: str, agent: DictConfig, base: BaseModel, dataset: RatingDataset
    ) -> tuple[Probabilities, list[str] | None]:
        """Distributions and, if it generates, texts; in the first process those of all rows."""
        if dataset.n_shortened and self.processes.is_first:
            n_shortened = f"{dataset.n_shortened} of {len(dataset)}"
            print(f"persona_eval: {name}: {n_shortened} prompts were shortened to fit the context")
        assignment = self._load_adapters(agent, base)
        rows = share_of_rows(self.samples, assignment, self.processes.rank, self.processes.size)
        key = self._key_of(agent)
        limit = self.cfg.evaluation.max_tokens_per_forward
        hidden = not self.processes.is_first
        with tqdm(total=len(rows), desc=f"eval {name}", unit="row", disable=hidden) as progress:
            if key not in self._distributions:
                self._distributions[key] = self._distributions_of(rows, dataset, assignment, base, progress.update)
            texts = None
            if agent.readout == "generate":
                progress.reset()
                with in_lockstep(base.model):
                    mine = predict_texts(base, dataset, rows, assignment, self._sampling(), limit, progress.update)
                texts = self._from_all(rows, mine)
            progress.update(len(rows) - progress.n)
        return self._distributions[key], texts

    def _try_all_adapters(
        self, name: str, agent: DictConfig, base: BaseModel, dataset: RatingDataset, own: Probabilities
    ) -> None:
        """Predict rows with the adapters of other personas, too; ``own`` is known. The first process measures."""
        options, assignment = self.cfg.evaluation, self._load_adapters(agent, base)
        assert assignment is not None  # the schema allows agents with an adapter per persona only
        owners = [assignment[sample.user_id] for sample in self.samples]
        chosen = choose_rows(owners, options.own_versus_other_rows, self.cfg.seed)
        ratings_of = most_likely_ratings if agent.readout == "argmax" else expected_ratings
        predicted = {}
        adapters = sorted(set(assignment.values()), key=lambda adapter: (len(adapter), adapter))
        for adapter in tqdm(adapters, desc=f"eval {name}, own and other", disable=not self.processes.is_first):
            others = [row for row in chosen if owners[row] != adapter]
            p = np.array(own)
            of_others = self._predict_rows_with(adapter, others, dataset, base)
            if self.processes.is_first:
                p[others] = of_others
                predicted[adapter.rpartition("/")[2]] = ratings_of(p[chosen], self._values)
        if self.processes.is_first:
            self._own_versus_other[name] = measure_own_versus_other(
                [self.samples[row].user_id for row in chosen],
                [owners[row].rpartition("/")[2] for row in chosen],
                np.array([self.samples[row].rating for row in chosen]),
                predicted,
                self.resampling,
            )

    def _predict_rows_with(
        self, adapter: str, rows: Sequence[int], dataset: RatingDataset, base: BaseModel
    ) -> Probabilities:
        """Distributions of one adapter, whoever the users are; in the first process those of all rows, in order."""
        assignment = {self.samples[row].user_id: adapter for row in rows}
        shared = (self.processes.rank, self.processes.size)
        mine = [rows[place] for place in share_of_rows([self.samples[row] for row in rows], assignment, *shared)]
        return self._distributions_of(mine, dataset, assignment, base)

    def _distributions_of(
        self,
        mine: Sequence[int],
        dataset: RatingDataset,
        assignment: Mapping[str, str] | None,
        base: BaseModel,
        on_rows: Callable[[int], None] = lambda n_rows: None,
    ) -> Probabilities:
        """Distributions for this process's share of some rows; in the first process those of all shares, in order."""
        limit, labels = self.cfg.evaluation.max_tokens_per_forward, self.source.labels
        with in_lockstep(base.model):
            p = predict_distributions(base, dataset, mine, assignment, labels, limit, on_rows)
        return np.reshape(self._from_all(mine, p.tolist()), (-1, len(labels)))

    def _predict_train(self, agent: DictConfig, base: BaseModel) -> Probabilities:
        """Distributions of the train rows from which an agent is calibrated or a regression is fitted."""
        key = self._key_of(agent)
        if key not in self._train_distributions:
            samples = [self._train[index] for index in self._latest]
            dataset = RatingDataset(base.tokenizer, self.source, samples, self._memories_of(agent))
            assignment = self._load_adapters(agent, base)
            mine = share_of_rows(samples, assignment, self.processes.rank, self.processes.size)
            self._train_distributions[key] = self._distributions_of(mine, dataset, assignment, base)
        return self._train_distributions[key]

    def _learns_from_train(self, name: str) -> bool:
        return bool(self.cfg.agents[name].calibrate or name in self.cfg.evaluation.hybrids)

    def _learns_from_final_profiles(self, name: str) -> bool:
        """Whether the profiles in the train prompts were written with the rating that is asked for."""
        shows_profile = self._memories_of(self.cfg.agents[name]) != "long"
        made_with = read_json(self.workspace.prompt_settings)
        return self._learns_from_train(name) and shows_profile and made_with.get("profile") == "final"

    def _trained_on_latest(self, adapters: str | None) -> bool:
        """Whether a set, or one that it began with, was trained on train rows that agents are calibrated on."""
        while adapters is not None and (manifest := self.workspace.adapter_set(adapters) / MANIFEST).is_file():
            settings = read_json(manifest)["settings"]
            if settings["adapter_set"].get("peft"):  # imported: on which rows it was trained, nothing here knows
                return False
            if (settings.get("validation_share") or 0) < self.cfg.evaluation.calibration_share:
                return True
            adapters = settings["adapter_set"].get("start_from")
        return False

    def _warn_of_known_rows(self) -> None:
        for name in sorted(self._too_well_known):
            print(
                f"persona_eval: warning: agent {name} is calibrated, or used by a hybrid, on rows that adapter set "
                f"{self.cfg.agents[name].adapters} was trained on; set "
                f"validation_share={self.cfg.evaluation.calibration_share:g} and train again"
            )

    def _calibrated(self, name: str, p: Probabilities, stage: Stage) -> Probabilities:
        """An agent's distributions as they shall be measured; in the first process, which keeps how they came about."""
        if not self.cfg.agents[name].calibrate:
            return p
        calibration = fit_calibration(self._of_train[name], *self._latest_answers(), self._values)
        stage.write_json(self.workspace.calibration(name).name, calibration.record)
        return calibration.apply(p)

    def _latest_answers(self) -> tuple[Any, list[str]]:
        """Ratings and users of the train rows that agents are calibrated on."""
        samples = [self._train[index] for index in self._latest]
        return np.array([sample.rating for sample in samples]), [sample.user_id for sample in samples]

    def _from_all(self, rows: Sequence[int], values: Sequence[Any]) -> list[Any]:
        """In the first process, every process's values of its rows, in the order of the samples; else none."""
        together: dict[int, Any] = {}
        for of_process in self.processes.gather_in_first(dict(zip(rows, values, strict=True))):
            together.update(of_process)
        return [together[index] for index in sorted(together)]

    def _load_adapters(self, agent: DictConfig, base: BaseModel) -> dict[str, str] | None:
        if agent.adapters is None:
            return None
        for name in base.bank.names:
            base.bank.remove(name)
        folder = self.workspace.adapter_set(agent.adapters)
        return load_adapter_set(base.bank, folder, agent.adapters, {sample.user_id for sample in self.samples})

    def _key_of(self, agent: DictConfig) -> tuple[str | None, str | None, str]:
        """What an agent's distributions depend on."""
        return self._base_of(agent), agent.adapters, self._memories_of(agent)

    def _sampling(self) -> Sampling:
        options = self.cfg.evaluation
        return Sampling(options.max_new_tokens, options.temperature, options.top_k, self.cfg.seed)

    def _base_of(self, agent: DictConfig) -> str | None:
        if agent.base is not None or agent.adapters is None:
            return None if agent.base is None else str(agent.base)
        trained_on = self.cfg.adapter_sets[agent.adapters].base
        return None if trained_on is None else str(trained_on)

    def _memories_of(self, agent: DictConfig) -> Any:
        if agent.memories is not None:
            return agent.memories
        return "both" if agent.adapters is None else self.cfg.adapter_sets[agent.adapters].memories


@config.parse_in_processes
def recipe_main(cfg: DictConfig, processes: Processes) -> None:
    """Predict, measure, write the table and print it."""
    take_own_device(cfg.device)
    workspace = Workspace.at(cfg.output_dir)
    recipe = PersonaEvalRecipe(cfg, processes)
    settings = config.settings_of(cfg, *SETTINGS)
    opened = partial(open_stage, workspace.root / "eval", settings, recipe.inputs, seed=cfg.seed)
    with processes.held_by_first(opened) as stage:
        if not stage.is_current:
            # The baselines take seconds: a bad table is told before hours of predicting.
            measurement = recipe.measure_baselines() if processes.is_first else None
            predictions = recipe.predict(stage)
            if measurement is not None:
                metrics = recipe.measure_agents(measurement, predictions)
                stage.write_json("metrics.json", metrics)
                stage.write_text("table.md", write_table(metrics))
    if processes.is_first:
        if stage.is_current:
            print("persona_eval: eval/ is up to date")
        print(workspace.table.read_text(encoding="utf-8"))
        print(f"table: {workspace.table}\nmetrics: {workspace.metrics}\nreport: {build_report(workspace.root)}")


if __name__ == "__main__":
    recipe_main()
