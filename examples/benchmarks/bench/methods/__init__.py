"""Methods that are held against each other on one ruler, by name; importing this fills the register."""

from . import hybrid_methods, id_methods, llamarec, tuned_methods
from .trial import METHODS, KeptWeights, Method, Trial, TrialResult, register_method
from .tuners import TUNERS, merge_lora

__all__ = ["METHODS", "TUNERS", "KeptWeights", "Method", "Trial", "TrialResult"]
__all__ += ["hybrid_methods", "id_methods", "llamarec", "merge_lora", "register_method", "tuned_methods"]
