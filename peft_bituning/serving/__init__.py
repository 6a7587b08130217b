"""Serving: one folder that recommends."""

from .folder import LaserSettings
from .recommender import LaserRecommender

__all__ = ["LaserRecommender", "LaserSettings"]
