"""torchtune dataset builders over the files that our stages write."""

from personas_tune.datasets.ratings import RatingDataset, persona_rating_dataset
from personas_tune.datasets.source import RatingSource, Sample
from personas_tune.datasets.tokens import ChatTokenizer, TokenRow

__all__ = ["ChatTokenizer", "RatingDataset", "RatingSource", "Sample", "TokenRow", "persona_rating_dataset"]
