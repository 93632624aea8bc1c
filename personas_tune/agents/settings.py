"""Which experiment an agent belongs to, and what it was made with: the config, and what the stages recorded."""

import difflib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from personas_tune import config
from personas_tune.adapters.base_model import TOKENIZER_FILES
from personas_tune.agents.calibrated import find_calibration
from personas_tune.agents.records import recorded
from personas_tune.embedding import EmbeddingSettings
from personas_tune.errors import ConfigError, MissingInputError, raise_together
from personas_tune.evaluation.calibration import Calibration
from personas_tune.export.origin import require_same_base
from personas_tune.schema import MemoriesSeen
from personas_tune.workspace import (
    MANIFEST,
    Workspace,
    home_path,
    missing_inputs,
    prompt_inputs,
    read_table,
)

_NAMED = 8  # known names in a message


@dataclass(frozen=True)
class AgentSettings:
    """An agent of an experiment.

    Args:
        name: Under ``agents``.
        cfg: The experiment's config, checked.
        workspace: Its files.
        adapters: Its adapter set; None for the base alone.
        per: Whether that set has an adapter per ``persona`` or one for ``all`` users.
        is_shuffled: Whether users were dealt out to that set's adapters at random.
        base: Under ``bases``; None for the default base.
        memories: What its prompts show.
        calibration: What mends its distributions; None if it isn't calibrated.
    """

    name: str
    cfg: Any
    workspace: Workspace
    adapters: str | None
    per: Literal["persona", "all"]
    is_shuffled: bool
    base: str | None
    memories: MemoriesSeen
    calibration: Calibration | None

    @property
    def cohort(self) -> set[str]:
        """Its users, of whom each has train or test ratings."""
        files = (self.workspace.train_samples, self.workspace.test_samples)
        return {user for file in files for user in read_table(file, ("user_id",))["user_id"].to_pylist()}

    def require_trained_base(self, files: Sequence[Path]) -> None:
        """Refuse files of a base on which its adapters weren't trained; hashing them is quick beside loading.

        Raises:
            AdapterError: If they have other bytes.
        """
        if self.adapters is not None:
            manifest = self.workspace.adapter_set(self.adapters) / MANIFEST
            require_same_base(files, recorded(manifest, "inputs"), where=str(manifest.parent))

    @property
    def base_sections(self) -> dict[str, Any]:
        """``model``, ``tokenizer`` and ``checkpointer`` of its base."""
        return config.base_sections(self.cfg, self.base)

    @property
    def embedding(self) -> EmbeddingSettings:
        """The means of embedders other than ``lsa``."""
        return EmbeddingSettings.of(
            self.cfg.embedding,
            stated_base_url=config.plain(self.cfg.embedding)["base_url"],
            journal=self.workspace.journal(self.cfg.distill.journal),
            device=self.cfg.device,
        )

    def embedding_if(self, allow_paid_calls: bool, section: str) -> EmbeddingSettings:
        """The means of the embedder that ``retrieval`` or ``personas`` names.

        Raises:
            ConfigError: If it takes paid calls, and these aren't allowed.
        """
        stage = {"retrieval": "samples", "personas": "personas"}[section]
        if self.made_with(stage, section)["embedder"] == "openai" and not allow_paid_calls:
            raise ConfigError(
                "embedding what the journal doesn't know takes paid calls",
                where=f"{section}.embedder=openai",
                remedy="give allow_paid_calls=True (embedding.max_usd bounds them)",
            )
        return self.embedding

    def made_with(self, stage: str, section: str) -> dict[str, Any]:
        """A section's settings with which a stage was really made, whatever the config says now.

        Args:
            stage: The stage's folder.
            section: Of its manifest and of the config.
        """
        then = recorded(self.workspace.root / stage / MANIFEST, "settings", section)
        return {**self.cfg[section], **{key: value for key, value in then.items() if not _is_reference(value)}}


def find_agent(
    experiment: str | Path, name: str, overrides: Sequence[str] = (), more: Sequence[str] = ()
) -> AgentSettings:
    """Look an agent up, and see that all it needs is there.

    Args:
        experiment: The folder of an experiment (``output_dir``) that was trained, or a config: a path or a
            bundled name.
        name: The agent's.
        overrides: ``key=value`` for the config.
        more: The same, from arguments of their own.

    Raises:
        ConfigError: If there is no such experiment or agent.
        MissingInputError: If a stage hasn't run; for a calibrated agent ``persona_eval``, too.
        DataError: If a stage's files are damaged, or a calibration is of other adapters.
        SeveralErrors: For several mistakes.
    """
    if isinstance(overrides, str):
        raise ConfigError("overrides is no list", where=overrides, remedy="write overrides=['key=value']")
    cfg = _read_config(experiment, [*overrides, *more])
    workspace = Workspace.at(cfg.output_dir)
    if not isinstance(name, str) or name not in cfg.agents:
        remedy = nearest(str(name), list(cfg.agents), "agents")
        raise ConfigError(f"no agent {name!r}", where=str(experiment), remedy=remedy)
    agent = cfg.agents[name]
    files = [*prompt_inputs(workspace), workspace.test_samples, workspace.root / "samples" / MANIFEST]
    if agent.adapters is not None:
        files.append(workspace.adapter_set(agent.adapters) / MANIFEST)
    raise_together(missing_inputs(files))
    trained = _trained_with(cfg, workspace, agent.adapters)
    return AgentSettings(
        name=name,
        cfg=cfg,
        workspace=workspace,
        adapters=agent.adapters,
        per=trained.get("per", "all"),
        is_shuffled=trained.get("shuffle_personas", False),
        base=agent.base or trained.get("base"),
        memories=agent.memories or trained.get("memories", "both"),
        calibration=find_calibration(cfg, workspace, name) if agent.calibrate else None,
    )


def nearest(name: str, known: Collection[str], kind: str) -> str:
    """A remedy for a name that isn't known: the nearest known one, else some of those there are."""
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"did you mean {near[0]}?"
    some = sorted(known)
    return f"{kind}: {', '.join(some[:_NAMED]) or 'none'}{', ...' if len(some) > _NAMED else ''}"


def _read_config(experiment: str | Path, overrides: Sequence[str]) -> Any:
    folder = home_path(experiment)
    if not folder.is_dir():
        if folder.suffix not in (".yaml", ".yml") and config.bundled_config(str(experiment)) is None:
            raise MissingInputError(
                "no such folder", where=str(experiment), remedy="give an experiment's output_dir, or its config"
            )
        return config.load_experiment(str(experiment), overrides)
    manifest = Workspace.at(folder).root / "eval" / MANIFEST
    # Agents may have been added when nothing was left to train, which alone is recorded with the whole config.
    later = recorded(manifest, "settings") if manifest.is_file() else {}
    sections: dict[str, Any] = {key: later[key] for key in ("agents", "adapter_sets", "bases") if key in later}
    return config.load_recorded(folder.absolute(), sections, overrides)


def _trained_with(cfg: Any, workspace: Workspace, adapters: str | None) -> dict[str, Any]:
    """The settings that an adapter set was trained with; none for the base alone.

    Refuses a base that is put together otherwise now: the same weights would say something else.
    """
    if adapters is None:
        return {}
    manifest = workspace.adapter_set(adapters) / MANIFEST
    own = recorded(manifest, "settings", "adapter_set")
    sections = config.base_sections(cfg, own.get("base"))
    now = {"model": sections["model"], "tokenizer": _without_files(sections["tokenizer"])}
    for section, values in now.items():
        trained = recorded(manifest, "settings", section)
        for key in sorted(values.keys() | trained.keys()):
            then = trained.get(key)
            if then != values.get(key) and not _is_reference(then):
                raise ConfigError(
                    f"{section}.{key} is {values.get(key)!r}, its adapters were trained with {then!r}",
                    where=str(manifest),
                    remedy="set it back, or train them again",
                )
    return own


def _without_files(tokenizer: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in tokenizer.items() if key not in TOKENIZER_FILES}


def _is_reference(value: object) -> bool:
    """Whether a manifest has a value as it was written, such as ``${...}``."""
    return isinstance(value, str) and "${" in value
