"""Recommenders by name: build a new one, load a saved one."""

from pathlib import Path
from typing import Any

import torch

from ..errors import ArtifactError, ConfigurationError
from .base import IDRecommender
from .bert4rec import BERT4Rec
from .precomputed import Precomputed
from .sasrec import SASRec
from .saving import CONFIG_FILE, read_config
from .transformer import ItemSequenceModel

_TRAINABLE: dict[str, type[Any]] = {"sasrec": SASRec, "bert4rec": BERT4Rec}
_LOADABLE: dict[str, type[Any]] = {**_TRAINABLE, "precomputed": Precomputed}


def register_recommender(model_class: type[ItemSequenceModel]) -> None:
    """Let `load_recommender` load a kind; its `recommender_type` is how `config.json` spells it."""
    _LOADABLE[model_class.recommender_type] = model_class


def build_recommender(kind: str, num_items: int, *, seed: int = 0, **settings: Any) -> SASRec | BERT4Rec:
    """Build an untrained recommender for `fit_recommender`; the same seed gives the same weights.

    Args:
        kind: `"sasrec"` or `"bert4rec"`.
        num_items: Catalog size I.
        seed: Of the initial weights; torch's global random state is left as it was.
        settings: Other fields of its config.

    Raises:
        ConfigurationError: No such kind, or a setting is out of its range.
    """
    if kind not in _TRAINABLE:
        raise ConfigurationError(f"kind must be one of {', '.join(_TRAINABLE)}, got {kind!r}")
    model_class = _TRAINABLE[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(model_class.config_class(num_items=num_items, **settings))


def load_recommender(folder: str | Path) -> IDRecommender:
    """Load what `save_pretrained` wrote of any kind, in evaluation mode and strictly; `config.json` says which kind.

    Raises:
        ArtifactError: A file is missing, truncated or damaged, the kind is unknown, or tensors are missing, unexpected
            or mis-shaped.
    """
    kind = read_config(folder).get("model_type")
    if kind not in _LOADABLE:
        raise ArtifactError(
            f"{Path(folder) / CONFIG_FILE}: model_type must be one of {', '.join(_LOADABLE)}, got {kind!r}; a kind "
            "that another module registers is known once that is imported (ssna: import peft_bituning.ssna)"
        )
    return _LOADABLE[kind].from_pretrained(folder)
