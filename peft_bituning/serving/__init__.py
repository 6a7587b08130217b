"""Serving: one folder that recommends."""

from .recommender import LaserRecommender, LaserSettings

__all__ = ["LaserRecommender", "LaserSettings"]
