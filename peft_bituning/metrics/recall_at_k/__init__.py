"""Recall@k as an `evaluate` module."""
