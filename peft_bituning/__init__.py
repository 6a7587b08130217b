"""Laser and Bi-Tuning: recommending with a frozen language model, as a PEFT method."""

from typing import TYPE_CHECKING, Any

from .tuners.bituning import (
    BiTuningConfig,
    BiTuningModel,
    BiTuningOutput,
    PrefixEncoder,
    prefix_encoders,
    register_prefix_encoder,
)
from .tuners.ilora import ILoRAConfig, ILoRAModel

if TYPE_CHECKING:
    from .serving import LaserRecommender

__version__ = "0.1.0"

__all__ = [
    "BiTuningConfig",
    "BiTuningModel",
    "BiTuningOutput",
    "ILoRAConfig",
    "ILoRAModel",
    "LaserRecommender",
    "PrefixEncoder",
    "prefix_encoders",
    "register_prefix_encoder",
]


def __getattr__(name: str) -> Any:
    """Import the serving room on first use: registering the method with PEFT stays light."""
    if name == "LaserRecommender":
        from .serving import LaserRecommender

        return LaserRecommender
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
