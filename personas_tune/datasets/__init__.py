"""torchtune dataset builders over the files that our stages write."""

from personas_tune.datasets.ratings import RatingDataset, persona_rating_dataset
from personas_tune.datasets.shared_prefixes import (
    PrefixItem,
    SharedPrefixDataset,
    collate_shared_prefixes,
    persona_prefix_dataset,
)
from personas_tune.datasets.source import RatingSource, Sample
from personas_tune.datasets.tokens import ChatTokenizer, TokenRow

__all__ = [
    "ChatTokenizer",
    "PrefixItem",
    "RatingDataset",
    "RatingSource",
    "Sample",
    "SharedPrefixDataset",
    "TokenRow",
    "collate_shared_prefixes",
    "persona_prefix_dataset",
    "persona_rating_dataset",
]
