"""The side network on cached states, SSNA-style: the language model runs once, over the items' texts, then no more."""

from ..recommenders.loading import register_recommender
from .fit import default_ssna_arguments, fit_ssna, train_ssna
from .item_states import ITEM_TEXT, ItemStates, cache_item_states
from .model import SSNA, SSNAConfig
from .side_network import SideAdapter, SideNetwork

register_recommender(SSNA)

__all__ = [
    "ITEM_TEXT",
    "SSNA",
    "ItemStates",
    "SSNAConfig",
    "SideAdapter",
    "SideNetwork",
    "cache_item_states",
    "default_ssna_arguments",
    "fit_ssna",
    "train_ssna",
]
