"""What the stage ``personas/`` leaves behind, and how new users are assigned from it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from personas_tune.embedding import EmbeddingSettings, load_embedder
from personas_tune.embedding.vectors import Space, require_same_space
from personas_tune.errors import DataError
from personas_tune.personas.clustering import PersonaChoice, UserClusters, assign_users
from personas_tune.personas.profiles import embed_profiles
from personas_tune.personas.stability import Stability
from personas_tune.personas.words import DistinctWord
from personas_tune.workspace import Workspace, read_json


def personas_table(user_ids: Sequence[str], clusters: UserClusters, places: NDArray[np.float64]) -> pa.Table:
    """``personas.parquet``: user, persona, distance to its centre, place on the map (shape ``(n_users, 2)``)."""
    return pa.table(
        {
            "user_id": pa.array(user_ids, pa.string()),
            "persona": pa.array(clusters.personas, pa.int32()),
            "distance": pa.array(clusters.distances, pa.float64()),
            "x": pa.array(places[:, 0], pa.float64()),
            "y": pa.array(places[:, 1], pa.float64()),
        }
    )


def clustering_record(
    choice: PersonaChoice,
    space: Space,
    rule: int | str,
    words: Sequence[Sequence[DistinctWord]],
    stability: Stability | None,
) -> dict[str, Any]:
    """``clustering.json``: how the personas came about, and what every other k would have given.

    Args:
        choice: What was taken.
        space: The space of the profile embeddings, and so of the centres.
        rule: The setting that decided: a number or ``elbow``.
        words: The most distinct words of each persona.
        stability: How alike other seeds group the users; None if it wasn't measured.
    """
    tried = zip(choice.candidates, choice.silhouettes, strict=True)
    return {
        "rule": rule,
        "k": choice.clusters.k,
        "elbow": choice.elbow,
        "sizes": choice.clusters.sizes,
        "n_users": len(choice.clusters.personas),
        "embedder": asdict(space),
        "range": [
            {"k": candidate.k, "inertia": candidate.inertia, "silhouette": silhouette, "sizes": candidate.sizes}
            for candidate, silhouette in tried
        ],
        "centres": choice.clusters.centres.tolist(),
        "words": {str(persona): [asdict(word) for word in of_persona] for persona, of_persona in enumerate(words)},
        "stability": None if stability is None else _stability_record(stability),
    }


def _stability_record(stability: Stability) -> Mapping[str, Any]:
    return {**asdict(stability), "mean": stability.mean, "low": stability.low}


def assign_new_users(
    workspace: Workspace,
    user_ids: Sequence[str],
    profiles: Sequence[str],
    embedding: EmbeddingSettings | None = None,
) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """Give users outside the cohort the nearest persona of a finished ``personas/`` stage.

    Nothing is fitted again. With ``openai``, profiles that the journal doesn't know are paid for.

    Args:
        workspace: The experiment.
        user_ids: Who they are, for messages.
        profiles: Their profiles, written by the distiller that wrote the cohort's.
        embedding: The means of the embedder, needed by those other than ``lsa``.

    Returns:
        Personas and distances to their centres, each of shape ``(n_users,)``.

    Raises:
        MissingInputError: If the stage hasn't run.
        DataError: If its files don't belong together.
        ConfigError: If the embedder needs means that aren't given.
        ClusteringError: For each profile without a known word.
    """
    record = read_json(workspace.clustering)
    try:
        space, centres = Space(**record["embedder"]), np.array(record["centres"], dtype=np.float64)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"no centres of an embedder in it ({error!r})",
            where=str(workspace.clustering),
            remedy="run `tune run persona_cluster --config ...` again",
        ) from error
    embedder = load_embedder(workspace.personas.parent / "embedder", embedding)
    require_same_space(space, embedder.space, where=str(workspace.clustering))
    return assign_users(embed_profiles(embedder, user_ids, profiles).vectors, centres)
