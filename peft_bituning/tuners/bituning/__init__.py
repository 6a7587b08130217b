"""Bi-Tuning: trainable virtual tokens before and after the text of a frozen language model (paper Section 3)."""

from ..embedding_tuner import EmbeddingTuner
from ..registration import register_tuner
from ..rows.center import EmbeddingCenter
from ..rows.embedding_model import BiTuningOutput
from .config import BiTuningConfig
from .encoders import PrefixEncoder, prefix_encoders, register_prefix_encoder
from .model import BiTuningModel

register_tuner("bituning", config_cls=BiTuningConfig, model_cls=BiTuningModel)

__all__ = [
    "BiTuningConfig",
    "BiTuningModel",
    "BiTuningOutput",
    "EmbeddingCenter",
    "EmbeddingTuner",
    "PrefixEncoder",
    "prefix_encoders",
    "register_prefix_encoder",
]
