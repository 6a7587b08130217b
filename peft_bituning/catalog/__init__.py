"""The catalog's side: encoding items and users, the item table, and the search in it."""

from .encoder import HistoryEncoder
from .index import ExactIndex
from .item_table import ItemTable
from .table_shards import TableShards

__all__ = ["ExactIndex", "HistoryEncoder", "ItemTable", "TableShards"]
