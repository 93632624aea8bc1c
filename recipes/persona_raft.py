"""Give every interaction the memories its prompt will show: the samples to train and test on.

Reads  data/interactions.parquet, data/items.parquet, memory/memories.parquet, personas/personas.parquet
       (and memory/profiles.parquet with retrieval.query=user_and_item, memory/left_out.json if it is there,
       and data/outside.parquet with retrieval.neighbours)
Writes samples/train.parquet, samples/test.parquet, samples/prompt.json, samples/index/

    tune run persona_raft --config quickstart.yaml retrieval.k=3
"""

import pyarrow as pa
from omegaconf import DictConfig

from personas_tune import config
from personas_tune.collaborative.neighbours import neighbour_ratings
from personas_tune.config import plain, settings_of
from personas_tune.embedding import EmbeddingSettings, deciding_settings, make_embedder
from personas_tune.prompts.labels import rating_labels
from personas_tune.prompts.templates import find_template
from personas_tune.retrieval.samples import (
    find_memories,
    index_memories,
    leave_out,
    read_left_out,
    require_train_memories,
    rows_of_split,
    samples_table,
    with_neighbours,
)
from personas_tune.retrieval.texts import ProfilesInTime, RetrievalTexts, item_texts
from personas_tune.workspace import COLUMNS, Workspace, open_stage, read_table


@config.parse
def recipe_main(cfg: DictConfig) -> None:
    """Give every interaction the memories its prompt will show: the samples to train and test on."""
    workspace = Workspace.at(cfg.output_dir)
    find_template(cfg.prompt.template)
    retrieval, scale = cfg.retrieval, cfg.data.rating_scale
    embedding = _embedding(cfg, workspace)
    settings = {
        **settings_of(cfg, "prompt"),
        "retrieval": deciding_settings(retrieval.embedder, settings_of(cfg, "retrieval")["retrieval"], embedding),
        "rating_scale": dict(scale),
    }
    inputs = [workspace.interactions, workspace.items, workspace.memories, workspace.personas]
    uses_profiles = retrieval.query == "user_and_item"
    if uses_profiles:
        inputs.append(workspace.profiles)
    if retrieval.neighbours:
        inputs.append(workspace.outside)
    if workspace.left_out.exists():
        inputs.append(workspace.left_out)

    with open_stage(workspace.root / "samples", settings, inputs, seed=cfg.seed) as stage:
        if stage.is_current:
            print(f"samples: up to date in {stage.folder}")
            return
        interactions = read_table(workspace.interactions, COLUMNS["interactions"])
        memories = read_table(workspace.memories, COLUMNS["memories"])
        personas = read_table(workspace.personas, COLUMNS["personas"])
        items = read_table(workspace.items, COLUMNS["items"])
        if workspace.left_out in inputs:
            interactions, note = leave_out(interactions, read_left_out(workspace.left_out))
            print(f"samples: {note}")
        profiles = ProfilesInTime(read_table(workspace.profiles, COLUMNS["profiles"])) if uses_profiles else None
        train = rows_of_split(interactions, "train")
        require_train_memories(memories, train)

        texts = RetrievalTexts(retrieval.query, item_texts(items), profiles, cfg.prompt.profile)
        embedder = make_embedder(retrieval.embedder, retrieval.dim, cfg.seed, settings=embedding)
        search = index_memories(embedder, texts, train, memories) if retrieval.k else None
        samples = {}
        for split, rows in {"train": train, "test": rows_of_split(interactions, "test")}.items():
            found = find_memories(
                search,
                texts,
                rows,
                retrieval.k,
                min_similarity=retrieval.min_similarity,
                before_target=retrieval.before_target,
            )
            samples[split] = samples_table(rows, personas, found)
            print(f"samples: {len(found)} {split} rows, {sum(map(bool, found))} of them with memories")
        if retrieval.neighbours:
            both = pa.concat_tables(samples.values())
            outside = read_table(workspace.outside, ("user_id", "item_id", "rating"))
            ratings, n_neighbours = neighbour_ratings(
                both,
                train,
                outside,
                retrieval.neighbours,
                before_target=retrieval.before_target,
                low=scale.min,
                high=scale.max,
            )
            both = with_neighbours(both, ratings, n_neighbours)
            samples = {"train": both.slice(0, len(train)), "test": both.slice(len(train))}
        for split, table in samples.items():
            stage.write_table(f"{split}.parquet", table)

        prompt = {"template": cfg.prompt.template, "profile": cfg.prompt.profile}
        stage.write_json("prompt.json", {**prompt, "labels": rating_labels(scale.min, scale.max, scale.step)})
        if search is not None:
            for name, content in search.files().items():
                stage.path(f"index/{name}").write_bytes(content)
    print(f"samples: written to {stage.folder}")


def _embedding(cfg: DictConfig, workspace: Workspace) -> EmbeddingSettings:
    return EmbeddingSettings.of(
        cfg.embedding,
        stated_base_url=plain(cfg.embedding)["base_url"],
        journal=workspace.journal(cfg.distill.journal),
        device=cfg.device,
    )


if __name__ == "__main__":
    recipe_main()
