"""Frozen ID-based recommenders: the source of the collaborative information, and the baselines beside it."""

from ..data.collator import pad_histories
from .base import IDRecommender, pack_histories
from .bert4rec import BERT4Rec, BERT4RecConfig
from .counting import ItemKNN, Popularity
from .fitting import FitReport, default_fit_arguments, fit_recommender, validation_ndcg
from .hybrid import Hybrid, Part, TextVectors, register_part
from .loading import build_recommender, load_recommender, register_recommender
from .precomputed import Precomputed
from .sasrec import SASRec, SASRecConfig

__all__ = [
    "BERT4Rec",
    "BERT4RecConfig",
    "FitReport",
    "Hybrid",
    "IDRecommender",
    "ItemKNN",
    "Part",
    "Popularity",
    "Precomputed",
    "SASRec",
    "SASRecConfig",
    "TextVectors",
    "build_recommender",
    "default_fit_arguments",
    "fit_recommender",
    "load_recommender",
    "pack_histories",
    "pad_histories",
    "register_part",
    "register_recommender",
    "validation_ndcg",
]
