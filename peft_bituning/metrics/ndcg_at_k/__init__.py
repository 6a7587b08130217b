"""NDCG@k as an `evaluate` module."""
