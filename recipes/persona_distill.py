"""Write a profile of each user and a memory of each train interaction.

Reads ``data/`` of the experiment (and, with ``distill.distiller=file``, your own texts).
Writes ``memory/profiles.parquet``, ``memory/memories.parquet`` and ``memory/index.html`` to look at; with
``distill.distiller=openai`` every paid answer goes into ``memory/journal.sqlite`` first.

    tune run persona_distill --config quickstart.yaml
    tune run persona_distill --config phi3_persona.yaml distill.dry_run=true   # calls, tokens, cost; sends nothing
"""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from personas_tune import config
from personas_tune.llm.journal import Journal, Total
from personas_tune.llm.settings import ServerSettings, output_limit_name
from personas_tune.memory.by_model import BatchSettings, Sources, distill_by_model, profile_words_for, report_lines
from personas_tune.memory.estimate import estimate_distillation, estimate_lines
from personas_tune.memory.imported import distill_from_files, find_file
from personas_tune.memory.page import render_users_page
from personas_tune.memory.reflection import PROMPT_VERSION, ReflectionSettings
from personas_tune.memory.stream import count_train_rows, stream_histories
from personas_tune.memory.taste import Scale
from personas_tune.memory.template import distill_by_template
from personas_tune.prompts.templates import find_template
from personas_tune.workspace import COLUMNS, Stage, Workspace, open_stage, read_table

# What of `distill` decides the texts; the other keys may change without a rewrite.
DECISIVE = {
    "template": ("batch_size", "max_words"),
    "file": ("max_words",),
    "openai": (
        "model", "batch_size", "max_words", "profile_words", "memory_words", "response_format", "sampling",
        "max_incomplete",
    ),
}  # fmt: skip
ROW_GROUP = 10_000  # so that `personas-tune show` finds a user at once


@config.parse
def recipe_main(cfg: DictConfig) -> None:
    """Write a profile of each user and a memory of each train interaction."""
    workspace = Workspace.at(cfg.output_dir)
    find_template(cfg.prompt.template)
    if cfg.distill.dry_run:
        _print_estimate(cfg, workspace)
        return
    tables = (workspace.interactions, workspace.items, workspace.users)
    with open_stage(workspace.root / "memory", _settings(cfg), [*tables, *_own_texts(cfg)], seed=cfg.seed) as stage:
        if stage.is_current:
            print(f"memory: up to date in {stage.folder}")
            return
        profiles, memories = stage.path("profiles.parquet"), stage.path("memories.parquet")
        if cfg.distill.distiller == "openai":
            notes = _ask_model(cfg, workspace, stage)
        else:
            notes = _write_at_once(cfg, tables, stage)
        stage.write_text("index.html", render_users_page(*tables, profiles, memories))
    for note in notes:
        print(f"memory: {note}")
    print(f"memory: written to {stage.folder}; index.html shows some users")


def _settings(cfg: DictConfig) -> dict[str, Any]:
    """What decides the outputs."""
    distill = config.settings_of(cfg, "distill")["distill"]
    distiller = distill["distiller"]
    settings = {
        "distill": {"distiller": distiller, **{key: distill[key] for key in DECISIVE[distiller]}},
        "template": cfg.prompt.template,
        "rating_scale": dict(cfg.data.rating_scale),
    }
    if distiller == "openai":
        settings["distill"]["profile_words"] = _profile_words(cfg)
        settings["prompt_version"] = PROMPT_VERSION
    return settings


def _own_texts(cfg: DictConfig) -> list[Path]:
    """The user's own files of profiles and memories, in this order."""
    if cfg.distill.distiller != "file":
        return []
    files = [find_file(cfg.distill.path, "distill.path")]
    if cfg.distill.memories_path is not None:
        files.append(find_file(cfg.distill.memories_path, "distill.memories_path"))
    return files


def _write_at_once(cfg: DictConfig, tables: tuple[Path, ...], stage: Stage) -> list[str]:
    interactions, items, users = (read_table(path, COLUMNS[path.stem]) for path in tables)
    if cfg.distill.distiller == "file":
        profiles_path, *memories_path = _own_texts(cfg)
        distilled = distill_from_files(
            interactions,
            users,
            profiles_path=profiles_path,
            memories_path=memories_path[0] if memories_path else None,
            max_words=cfg.distill.max_words,
        )
    else:
        distilled = distill_by_template(
            interactions,
            items,
            users,
            scale=Scale(**cfg.data.rating_scale),
            template=cfg.prompt.template,
            batch_size=cfg.distill.batch_size,
            max_words=cfg.distill.max_words,
        )
    stage.write_table("profiles.parquet", distilled.profiles, row_group_size=ROW_GROUP)
    stage.write_table("memories.parquet", distilled.memories, row_group_size=ROW_GROUP)
    counts = f"{distilled.profiles.num_rows} profiles of {users.num_rows} users, {distilled.memories.num_rows} memories"
    return [*distilled.notes, counts]


def _ask_model(cfg: DictConfig, workspace: Workspace, stage: Stage) -> list[str]:
    server = ServerSettings.of(cfg.distill)
    journal = workspace.journal(cfg.distill.journal)
    report = distill_by_model(
        _sources(workspace),
        _reflection(cfg),
        server,
        journal,
        max_tries=cfg.distill.max_tries,
        max_incomplete=cfg.distill.max_incomplete,
        batches=BatchSettings(journal.parent / "batches", cfg.distill.batch_poll_s) if cfg.distill.batch_api else None,
        profiles=stage.path("profiles.parquet"),
        memories=stage.path("memories.parquet"),
    )
    if report.left_out:
        stage.write_json(workspace.left_out.name, dict(report.left_out))
    return [*report_lines(report, server), f"{report.n_profiles} profiles and {report.n_memories} memories"]


def _print_estimate(cfg: DictConfig, workspace: Workspace) -> None:
    if cfg.distill.distiller != "openai":
        print(f"dry run: distill.distiller={cfg.distill.distiller} makes no calls")
        return
    sources, server = _sources(workspace), ServerSettings.of(cfg.distill)
    histories = stream_histories(sources.interactions, sources.items, sources.users)
    n_train = count_train_rows(sources.users)
    journal = workspace.journal(cfg.distill.journal)
    spent: list[Total] = []
    if journal.is_file():
        with Journal.open(journal) as answers:
            estimate = estimate_distillation(histories, n_train, _reflection(cfg), answers)
            spent = answers.totals(server.model)
    else:
        estimate = estimate_distillation(histories, n_train, _reflection(cfg), None)
    for line in [*estimate_lines(estimate, server, spent, batch_api=cfg.distill.batch_api), "nothing was sent"]:
        print(f"dry run: {line}")


def _sources(workspace: Workspace) -> Sources:
    return Sources(workspace.interactions, workspace.items, workspace.users)


def _reflection(cfg: DictConfig) -> ReflectionSettings:
    distill = cfg.distill
    return ReflectionSettings(
        model=distill.model,
        batch_size=distill.batch_size,
        max_words=distill.max_words,
        profile_words=_profile_words(cfg),
        memory_words=distill.memory_words,
        response_format=distill.response_format,
        sampling=dict(distill.sampling),
        max_output_tokens=distill.max_output_tokens,
        output_limit_name=distill.output_limit_name or output_limit_name(ServerSettings.of(distill)),
        template=cfg.prompt.template,
        top=cfg.data.rating_scale.max,
    )


def _profile_words(cfg: DictConfig) -> int:
    context = None if cfg.tokenizer is None else cfg.tokenizer.get("max_seq_len")
    words: int | None = cfg.distill.profile_words
    return profile_words_for(context) if words is None else words


if __name__ == "__main__":
    recipe_main()
