"""Readers of public formats, and one door to all of them."""
