"""Write trained adapters in the forms that others load: PEFT folders to serve, or merged checkpoints; with model cards.

Reads   adapters/, the base's config (to merge, all of it), and if they are there eval/metrics.json,
        personas/clustering.json, the manifests of data/ and samples/
Writes  export/<set>/<adapter>/ (PEFT), export/merged/<set>/<adapter>/ (merged), export/serving.json

    tune run persona_export --config quickstart.yaml
    tune run persona_export --config quickstart.yaml export.sets=[persona] export.format=merged export.dtype=bf16
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from omegaconf import DictConfig

from personas_tune import config
from personas_tune.adapters.base_model import checkpoint_inputs
from personas_tune.adapters.base_weights import weight_files
from personas_tune.adapters.layouts import read_layout
from personas_tune.config import base_sections
from personas_tune.errors import ConfigError
from personas_tune.export.facts import files_of_training, read_facts
from personas_tune.export.forms import is_dora
from personas_tune.export.hub import push_folder, require_token
from personas_tune.export.merging import copied_files
from personas_tune.export.origin import find_origin, require_same_base
from personas_tune.export.selection import choose_adapters, choose_kind, files_of_set, known_adapters
from personas_tune.export.serving import (
    RECORD,
    Exported,
    read_all_sets,
    read_set,
    served_name,
    serving_lines,
    serving_records,
    set_record,
)
from personas_tune.export.writing import CARD, Form, write_adapter
from personas_tune.workspace import Stage, Workspace, open_stage


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
        sets = cfg.adapter_sets if self.export.sets is None else self.export.sets
        self.adapters = choose_adapters(known_adapters(self.workspace, sets), self.export.adapters)
        self.bases = {name: cfg.adapter_sets[name].base for name in self.adapters}
        if len(set(self.bases.values())) > 1 and self.export.base_name is not None:
            raise ConfigError("one name for several bases", where="export.base_name", remedy="set export.sets too")
        self.sections = {base: base_sections(cfg, base) for base in dict.fromkeys(self.bases.values())}
        self.origins = {
            base: find_origin(each["model"], each["checkpointer"], self.export.base_name)
            for base, each in self.sections.items()
        }

    def export_set(self, name: str) -> Sequence[Exported]:
        """Export one set, or say that it is up to date."""
        origin, adapters = self.origins[self.bases[name]], self.adapters[name]
        has_magnitudes = is_dora(self.workspace.adapter_set(name) / adapters[0])
        form = self._form(name, has_magnitudes)
        is_merged = form.kind == "merged"
        needs_weights = is_merged or has_magnitudes or not (origin.folder / "config.json").is_file()
        weights = weight_files(checkpoint_inputs(**self.sections[self.bases[name]])) if needs_weights else []
        rest = copied_files(origin.folder).values() if is_merged else [origin.folder / "config.json"]
        base = {key: value for key, value in asdict(origin).items() if key not in ("folder", "loadable")}
        settings = {"form": asdict(form), "base": base, "adapters": adapters, "model_type": self._model_type(name)}
        inputs = [*files_of_set(self.workspace, name, adapters), *weights, *rest]
        folder = (self.root / "merged" if is_merged else self.root) / name
        with open_stage(folder, settings, inputs, seed=self.cfg.seed) as stage:
            if stage.is_current:
                print(f"export: {name} is up to date in {folder}")
            else:
                self._write_set(name, form, weights, stage)
        return read_set(folder).adapters

    def _model_type(self, name: str) -> str:
        return str(self.sections[self.bases[name]]["checkpointer"].get("model_type"))

    def _form(self, name: str, has_magnitudes: bool) -> Form:
        kind = choose_kind(self.export.format, has_magnitudes, self.export.max_rank)
        if self.export.format == "auto" and kind == "merged":
            print(f"export: {name} is merged, since vLLM takes no DoRA adapters (export.format=peft writes them)")
        return Form(kind, self.export.dtype, self.export.max_rank, self.export.license, self.export.words)

    def _write_set(self, name: str, form: Form, weights: Sequence[Path], stage: Stage) -> None:
        origin, trained = self.origins[self.bases[name]], self.workspace.adapter_set(name)
        base_files = [origin.folder / "config.json", *weights]
        require_same_base(base_files, files_of_training(trained), where=str(trained))
        layout = read_layout(self._model_type(name), origin.folder)
        record = {}
        for adapter in self.adapters[name]:
            names, record[adapter] = write_adapter(
                stage.path(f"{adapter}/{CARD}").parent,
                trained / adapter,
                form,
                origin,
                layout,
                read_facts(self.workspace, name, adapter),
                weights,
            )
            stage.include(f"{adapter}/{file}" for file in names)
            print(f"export: {served_name(name, adapter)} as {record[adapter].in_words}, {form.dtype_in_words}")
        stage.write_json(RECORD, set_record(self.bases[name], origin.name, origin.loadable, record))
        print(f"export: {name} written to {stage.folder}")

    def write_serving(self) -> None:
        """Say how to serve all that lies in ``export/``, and write it to ``serving.json``: a file per base."""
        current = {base: (origin.name, origin.loadable) for base, origin in self.origins.items()}
        records = serving_records(read_all_sets(self.root), current)
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
    recipe.write_serving()
    if recipe.token is not None:
        recipe.push(exported)


if __name__ == "__main__":
    recipe_main()
