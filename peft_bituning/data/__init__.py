"""Purchase histories and items: reading, samples, prompts."""

from .interactions import IN_FILE_ORDER, Event, Interactions
from .items import ItemCatalog
from .prompts import PromptEncoder
from .readers.frames import as_interactions, interactions_from_tables
from .readers.sources import SOURCE_FORMS, load_interactions
from .rejects import ReadReport, RejectedRow
from .samples import LeaveOneOut, Sample
from .templates import PRESETS, PromptTemplate

__all__ = [
    "IN_FILE_ORDER",
    "PRESETS",
    "SOURCE_FORMS",
    "Event",
    "Interactions",
    "ItemCatalog",
    "LeaveOneOut",
    "PromptEncoder",
    "PromptTemplate",
    "ReadReport",
    "RejectedRow",
    "Sample",
    "as_interactions",
    "interactions_from_tables",
    "load_interactions",
]
