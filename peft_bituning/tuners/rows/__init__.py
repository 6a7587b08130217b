"""Rows of text through a frozen language model: what every tuner shares."""
