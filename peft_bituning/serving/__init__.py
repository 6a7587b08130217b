"""Serving: one folder that recommends."""

from .folder import LaserSettings
from .hybrid_recommender import HybridRecommender
from .recommender import LaserRecommender

__all__ = ["HybridRecommender", "LaserRecommender", "LaserSettings"]
