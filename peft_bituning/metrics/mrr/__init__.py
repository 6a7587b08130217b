"""Mean reciprocal rank as an `evaluate` module."""
