"""Group the cohort's users into personas by the similarity of their profiles.

Reads  memory/profiles.parquet
Writes personas/personas.parquet, personas/clustering.json, personas/elbow.png, personas/embedder/

    tune run persona_cluster --config quickstart.yaml personas.k=elbow
"""

from omegaconf import DictConfig

from personas_tune import config
from personas_tune.config import plain, settings_of
from personas_tune.embedding import EmbeddingSettings, deciding_settings, make_embedder
from personas_tune.personas.clustering import choose_personas
from personas_tune.personas.files import clustering_record, personas_table
from personas_tune.personas.plot import draw_choice
from personas_tune.personas.profiles import embed_profiles, final_profiles, map_profiles
from personas_tune.personas.stability import measure_stability
from personas_tune.personas.words import distinct_words, make_analyzer
from personas_tune.workspace import COLUMNS, Workspace, open_stage, read_table


@config.parse
def recipe_main(cfg: DictConfig) -> None:
    """Group the cohort's users into personas by the similarity of their profiles."""
    workspace = Workspace.at(cfg.output_dir)
    embedding = _embedding(cfg, workspace)
    name = cfg.personas.embedder
    settings = {"personas": deciding_settings(name, settings_of(cfg, "personas")["personas"], embedding)}
    with open_stage(workspace.root / "personas", settings, [workspace.profiles], seed=cfg.seed) as stage:
        if stage.is_current:
            print(f"personas: up to date in {stage.folder}")
            return
        analyzer = make_analyzer(cfg.personas.words)
        users = final_profiles(read_table(workspace.profiles, COLUMNS["profiles"]))
        embedder = make_embedder(name, cfg.personas.dim, cfg.seed, "tastes", embedding).fit(users.texts)
        embeddings = embed_profiles(embedder, users.user_ids, users.texts)
        choice = choose_personas(embeddings.vectors, cfg.personas.k, cfg.personas.k_max, cfg.seed)
        stability = None
        if cfg.personas.stability_seeds:
            stability = measure_stability(embeddings.vectors, choice.clusters, cfg.seed, cfg.personas.stability_seeds)
        words = distinct_words(users.texts, choice.clusters.personas, analyzer)

        places = map_profiles(embeddings.vectors)
        stage.write_table("personas.parquet", personas_table(users.user_ids, choice.clusters, places))
        record = clustering_record(choice, embedder.space, cfg.personas.k, words, stability)
        stage.write_json("clustering.json", record)
        stage.path("elbow.png").write_bytes(draw_choice(choice))
        for name, content in embedder.files().items():
            stage.path(f"embedder/{name}").write_bytes(content)

    sizes = ", ".join(map(str, choice.clusters.sizes))
    print(f"personas: {len(users.user_ids)} users in {choice.clusters.k} personas of {sizes}; elbow at {choice.elbow}")
    if stability is not None:
        print(f"personas: {stability}")
    print(f"personas: written to {stage.folder}")


def _embedding(cfg: DictConfig, workspace: Workspace) -> EmbeddingSettings:
    return EmbeddingSettings.of(
        cfg.embedding,
        stated_base_url=plain(cfg.embedding)["base_url"],
        journal=workspace.journal(cfg.distill.journal),
        device=cfg.device,
    )


if __name__ == "__main__":
    recipe_main()
