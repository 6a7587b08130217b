"""Training: two stages in one accelerate loop."""

from .arguments import LaserArguments
from .fit import fit

__all__ = ["LaserArguments", "fit"]
