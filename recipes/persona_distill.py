"""Write a profile of each user and a memory of each train interaction.

Reads ``data/`` of the experiment (and, with ``distill.distiller=file``, your own texts).
Writes ``memory/profiles.parquet`` and ``memory/memories.parquet``.

    tune run persona_distill --config quickstart.yaml
"""

from omegaconf import DictConfig

from personas_tune import config
from personas_tune.errors import ConfigError
from personas_tune.memory.imported import distill_from_files, find_file
from personas_tune.memory.taste import Scale
from personas_tune.memory.template import distill_by_template
from personas_tune.prompts.templates import find_template
from personas_tune.workspace import COLUMNS, Workspace, open_stage, read_table


@config.parse
def recipe_main(cfg: DictConfig) -> None:
    """Write a profile of each user and a memory of each train interaction."""
    distill, workspace = cfg.distill, Workspace.at(cfg.output_dir)
    find_template(cfg.prompt.template)
    profiles_path = memories_path = None
    if distill.distiller == "openai":
        raise ConfigError(
            "openai is not in this version yet",
            where="distill.distiller",
            remedy="use distill.distiller=template (offline) or =file (your own profiles)",
        )
    if distill.distiller == "file":
        profiles_path = find_file(distill.path, "distill.path")
        if distill.memories_path is not None:
            memories_path = find_file(distill.memories_path, "distill.memories_path")

    tables = [workspace.interactions, workspace.items, workspace.users]
    settings = {
        **config.settings_of(cfg, "distill"),
        "template": cfg.prompt.template,
        "rating_scale": dict(cfg.data.rating_scale),
    }
    inputs = [path for path in (*tables, profiles_path, memories_path) if path is not None]
    with open_stage(workspace.root / "memory", settings, inputs, seed=cfg.seed) as stage:
        if stage.is_current:
            print(f"memory: up to date in {stage.folder}")
            return
        interactions, items, users = (read_table(path, COLUMNS[path.stem]) for path in tables)
        if profiles_path is not None:
            distilled = distill_from_files(
                interactions,
                users,
                profiles_path=profiles_path,
                memories_path=memories_path,
                max_words=distill.max_words,
            )
        else:
            distilled = distill_by_template(
                interactions,
                items,
                users,
                scale=Scale(**cfg.data.rating_scale),
                template=cfg.prompt.template,
                batch_size=distill.batch_size,
                max_words=distill.max_words,
            )
        stage.write_table("profiles.parquet", distilled.profiles)
        stage.write_table("memories.parquet", distilled.memories)
    for note in distilled.notes:
        print(f"memory: {note}")
    print(
        f"memory: {distilled.profiles.num_rows} profiles of {users.num_rows} users and "
        f"{distilled.memories.num_rows} memories written to {stage.folder}"
    )


if __name__ == "__main__":
    recipe_main()
