"""Methods that are held against each other on one ruler, by name; importing this fills the register."""

from . import id_methods, tuned_methods
from .trial import METHODS, Method, Trial, TrialResult, register_method
from .tuned_methods import forget_checkpoints

__all__ = [
    "METHODS",
    "Method",
    "Trial",
    "TrialResult",
    "forget_checkpoints",
    "id_methods",
    "register_method",
    "tuned_methods",
]
