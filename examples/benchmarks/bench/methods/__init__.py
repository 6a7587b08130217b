"""Methods that are held against each other on one ruler, by name; importing this fills the register."""

from . import candidate_methods, id_methods, tuned_methods
from .trial import METHODS, Method, Trial, TrialResult, register_method
from .tuned import TUNERS, merge_lora
from .tuned_methods import forget_checkpoints

__all__ = [
    "METHODS",
    "TUNERS",
    "Method",
    "Trial",
    "TrialResult",
    "candidate_methods",
    "forget_checkpoints",
    "id_methods",
    "merge_lora",
    "register_method",
    "tuned_methods",
]
