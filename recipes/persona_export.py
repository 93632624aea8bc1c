"""Write trained adapters in the forms that others load: PEFT folders to serve, or merged checkpoints; with model cards.

Reads   adapters/, the base's config (to merge, all of it), and if they are there eval/metrics.json,
        personas/clustering.json
Writes  export/<set>/<adapter>/ (PEFT), export/merged/<set>/<adapter>/ (merged), export/serving.json

    tune run persona_export --config quickstart.yaml
    tune run persona_export --config quickstart.yaml export.sets=[persona] export.format=merged export.dtype=bf16
"""

from collections.abc import Sequence
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path

from omegaconf import DictConfig

from personas_tune import config
from personas_tune.adapters.base_model import checkpoint_inputs
from personas_tune.adapters.files import NATIVE_FILE
from personas_tune.adapters.layouts import read_layout
from personas_tune.config import base_sections
from personas_tune.errors import ConfigError, raise_together
from personas_tune.export.base_weights import weight_files
from personas_tune.export.facts import read_facts
from personas_tune.export.forms import is_dora
from personas_tune.export.hub import push_folder, require_token
from personas_tune.export.merging import copied_files
from personas_tune.export.origin import find_origin, require_same_base
from personas_tune.export.serving import Exported, serving_lines, serving_record
from personas_tune.export.writing import CARD, Form, write_adapter
from personas_tune.workspace import MANIFEST, Stage, Workspace, missing_inputs, open_stage, read_json, read_table

RECORD = "export.json"  # of one set, for the next run: what a server has to know of each adapter
RECORDED = ("rank", "is_dora", "errors")


class PersonaExportRecipe:
    """Exports adapter sets, each only when its settings or inputs have changed.

    Args:
        cfg: The experiment.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        self.export = cfg.export
        self.workspace = Workspace.at(cfg.output_dir)
        self.root = self.workspace.root / "export"
        self.token = None if cfg.export.push_to is None else require_token()
        self.adapters = self._choose_adapters()
        self.bases = {name: cfg.adapter_sets[name].base for name in self.adapters}
        if len(set(self.bases.values())) > 1 and self.export.base_name is not None:
            raise ConfigError("one name for several bases", where="export.base_name", remedy="set export.sets too")
        self.sections = {base: base_sections(cfg, base) for base in dict.fromkeys(self.bases.values())}
        self.origins = {
            base: find_origin(each["model"], each["checkpointer"], self.export.base_name)
            for base, each in self.sections.items()
        }

    def _choose_adapters(self) -> dict[str, list[str]]:
        """The adapters to export, by set; a set that has none of those asked for is left out."""
        sets = list(self.cfg.adapter_sets) if self.export.sets is None else list(dict.fromkeys(self.export.sets))
        if not sets:
            raise ConfigError("no adapter set to export", where="export.sets", remedy="name some of adapter_sets")
        assignments = [self.workspace.adapter_set(name) / "assignment.parquet" for name in sets]
        raise_together(missing_inputs(assignments))
        known = {
            name: sorted(set(read_table(file, ("user_id", "adapter"))["adapter"].to_pylist()))
            for name, file in zip(sets, assignments, strict=True)
        }
        wanted = self.export.adapters
        if wanted is None:
            return known
        names = sorted(set().union(*known.values()))
        unknown = [name for name in wanted if name not in names] or ([] if wanted else [""])
        if unknown:
            near = get_close_matches(unknown[0], names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
            raise ConfigError(f"no adapter {unknown[0]!r}", where="export.adapters", remedy=hint)
        chosen = {name: [adapter for adapter in found if adapter in wanted] for name, found in known.items()}
        return {name: found for name, found in chosen.items() if found}

    def export_set(self, name: str) -> list[Exported]:
        """Export one set, or say that it is up to date."""
        origin, adapters, has_magnitudes = self.origins[self.bases[name]], self.adapters[name], self._is_dora(name)
        form = self._form(name, has_magnitudes)
        needs_weights = form.kind == "merged" or has_magnitudes or not (origin.folder / "config.json").is_file()
        weights = weight_files(checkpoint_inputs(**self.sections[self.bases[name]])) if needs_weights else []
        rest = copied_files(origin.folder).values() if form.kind == "merged" else [origin.folder / "config.json"]
        base = {key: value for key, value in asdict(origin).items() if key not in ("folder", "loadable")}
        settings = {"form": asdict(form), "base": base, "adapters": adapters, "model_type": self._model_type(name)}
        inputs = [*self._files_of_set(name), *weights, *rest]
        folder = (self.root / "merged" if form.kind == "merged" else self.root) / name
        with open_stage(folder, settings, inputs, seed=self.cfg.seed) as stage:
            if stage.is_current:
                print(f"export: {name} is up to date in {folder}")
            else:
                self._write_set(name, form, weights, stage)
        record = read_json(folder / RECORD)
        return [Exported(name, adapter, folder / adapter, **record[adapter]) for adapter in adapters]

    def _is_dora(self, name: str) -> bool:
        return is_dora(self.workspace.adapter_set(name) / self.adapters[name][0])

    def _model_type(self, name: str) -> str:
        return str(self.sections[self.bases[name]]["checkpointer"].get("model_type"))

    def _form(self, name: str, has_magnitudes: bool) -> Form:
        kind = self.export.format
        if kind == "auto":
            kind = "merged" if has_magnitudes else "peft"
            if has_magnitudes:
                print(f"export: {name} is merged, since vLLM takes no DoRA adapters (export.format=peft writes them)")
        rank = self.export.max_rank if kind == "peft" else None
        return Form(kind, self.export.dtype, rank, self.export.license, self.cfg.data.format)

    def _files_of_set(self, name: str) -> list[Path]:
        """What the experiment has on a set: its adapters, and what cards tell of them, where that is there."""
        folder, workspace = self.workspace.adapter_set(name), self.workspace
        own = [folder / adapter / file for adapter in self.adapters[name] for file in (NATIVE_FILE, "training.json")]
        told = [workspace.metrics, workspace.metrics.parent / MANIFEST, workspace.clustering, workspace.personas]
        told += [workspace.train_samples, workspace.train_samples.parent / MANIFEST]
        return [folder / MANIFEST, *own, *(file for file in told if file.is_file())]

    def _write_set(self, name: str, form: Form, weights: Sequence[Path], stage: Stage) -> None:
        origin, trained = self.origins[self.bases[name]], self.workspace.adapter_set(name)
        trained_with = read_json(trained / MANIFEST)["inputs"]
        require_same_base([origin.folder / "config.json", *weights], trained_with, where=str(trained))
        layout = read_layout(self._model_type(name), origin.folder)
        record = {}
        for adapter in self.adapters[name]:
            names, exported = write_adapter(
                stage.path(f"{adapter}/{CARD}").parent,
                trained / adapter,
                form,
                origin,
                layout,
                read_facts(self.workspace, name, adapter),
                weights,
            )
            for file in names:
                stage.path(f"{adapter}/{file}")
            record[adapter] = {key: getattr(exported, key) for key in RECORDED}
            print(f"export: {exported.name} as {exported.in_words}, {form.dtype_in_words}")
        stage.write_json(RECORD, record)
        print(f"export: {name} written to {stage.folder}")

    def write_serving(self, exported: Sequence[Exported]) -> None:
        """Say how to serve what was exported, and write it to ``serving.json``: a file per base."""
        records = {}
        for base, origin in self.origins.items():
            own = [each for each in exported if self.bases[each.set_name] == base]
            records["serving.json" if base is None else f"serving_{base}.json"] = serving_record(origin.loadable, own)
        with open_stage(self.root, {"serving": records}) as stage:
            for name, record in records.items():
                if not stage.is_current:
                    stage.write_json(name, record)
                for line in serving_lines(record):
                    print(f"export: {line}")
        print(f"export: how to serve them is in {', '.join(str(self.root / name) for name in records)}")

    def push(self, exported: Sequence[Exported]) -> None:
        """Upload each exported folder to a repository of its own."""
        for each in exported:
            repository = f"{self.export.push_to}-{each.name}"
            message = f"{each.name}, exported by personas-tune"
            url = push_folder(
                each.path, repository, token=self.token or "", private=self.export.private, message=message
            )
            print(f"export: {each.name} pushed to {url}")


@config.parse
def recipe_main(cfg: DictConfig) -> None:
    """Write trained adapters in the forms that others load, with model cards and the command that serves them."""
    recipe = PersonaExportRecipe(cfg)
    exported = [each for name in recipe.adapters for each in recipe.export_set(name)]
    recipe.write_serving(exported)
    if recipe.token is not None:
        recipe.push(exported)


if __name__ == "__main__":
    recipe_main()
