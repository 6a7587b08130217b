"""The catalog's side: encoding items and users, the item table, and the search in it."""

from .encoder import HistoryEncoder
from .faiss_index import FaissIndex, measured_recall
from .index import ExactIndex, ItemIndex
from .item_table import ItemTable
from .item_tables import encode_items_into, table_blocks

__all__ = [
    "ExactIndex",
    "FaissIndex",
    "HistoryEncoder",
    "ItemIndex",
    "ItemTable",
    "encode_items_into",
    "measured_recall",
    "table_blocks",
]
