"""The text that a user is grouped by: the final profile, as a vector and on a map."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from threadpoolctl import threadpool_limits

from personas_tune.embedding.vectors import Embedder, Embeddings
from personas_tune.errors import ClusteringError

# How many users a message names before it stops.
_NAMED = 5
# Of places on the map; what is smaller is rounding.
_DECIMALS = 9


@dataclass(frozen=True)
class UserProfiles:
    """One profile a user, sorted by user."""

    user_ids: list[str]
    texts: list[str]


def final_profiles(profiles: pa.Table) -> UserProfiles:
    """Each user's profile as it stood after the last train interaction that it covers.

    Args:
        profiles: Rows of ``memory/profiles.parquet``, in any order.

    Raises:
        ClusteringError: If there are no profiles, or some without a word.
    """
    in_order = profiles.sort_by([("user_id", "ascending"), ("upto_position", "ascending")])
    last = dict(zip(in_order["user_id"].to_pylist(), in_order["profile"].to_pylist(), strict=True))
    if not last:
        raise ClusteringError("no user has a profile", remedy="run `tune run persona_distill --config ...` first")
    speechless = [user_id for user_id, text in last.items() if not re.search(r"\w", text or "")]
    _refuse_speechless(speechless, len(last), "a word", remedy="write these profiles again or leave the users out")
    return UserProfiles(list(last), list(last.values()))


def embed_profiles(embedder: Embedder, user_ids: Sequence[str], texts: Sequence[str]) -> Embeddings:
    """One unit vector a user.

    Raises:
        ClusteringError: If a profile has no word that the embedder knows: it is near nobody.
    """
    embeddings = embedder.embed(texts)
    unknown = [user_id for user_id, is_known in zip(user_ids, embeddings.is_known, strict=True) if not is_known]
    remedy = "write these profiles again, leave the users out, or raise personas.dim if their words are rare ones"
    _refuse_speechless(unknown, len(texts), "a word that the embedder knows", remedy=remedy)
    return embeddings


def map_profiles(profile_embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
    """Users on a plane: the first two principal components of their embeddings, shape ``(n_users, 2)``.

    The direction of an axis means nothing; it is chosen so that the user farthest out lies on its positive side.
    """
    points = profile_embeddings.astype(np.float64)
    places = np.zeros((len(points), 2))
    n_axes = min(2, *points.shape)
    with threadpool_limits(1), np.errstate(invalid="ignore"):  # equal profiles have no variance to explain
        places[:, :n_axes] = PCA(n_axes, svd_solver="full").fit(points).transform(points)
    rounded = places.round(_DECIMALS)
    farthest = rounded[np.abs(rounded).argmax(axis=0), [0, 1]]
    return np.asarray(np.where(farthest < 0, -rounded, rounded) + 0.0)


def _refuse_speechless(user_ids: Sequence[str], n_profiles: int, lacked: str, *, remedy: str) -> None:
    if user_ids:
        named = ", ".join(user_ids[:_NAMED]) + (", ..." if len(user_ids) > _NAMED else "")
        raise ClusteringError(
            f"{len(user_ids)} of {n_profiles} profiles without {lacked}",
            where=f"user {named}",
            remedy=remedy,
        )
