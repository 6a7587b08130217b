"""Methods that are compared and not shipped: sequence models over texts, what texts recommend untrained, sums."""

from peft_bituning.recommenders import register_recommender

from .fdsa import FDSA
from .score_sum import ScoreSum
from .text_similarity import TextSimilarity
from .zesrec import ZESRec

for kind in (FDSA, ZESRec):
    register_recommender(kind)

__all__ = ["FDSA", "ScoreSum", "TextSimilarity", "ZESRec"]
