"""Settings of how a history is read: as text by the language model, as collaborative states by the prefix."""

from dataclasses import dataclass

from ..errors import ConfigurationError

ITEM_COLLABORATIVE = ("history", "embedding")


@dataclass(frozen=True)
class HistorySettings:
    """How much of a history is read; another `item_collaborative` than these is a `ConfigurationError`."""

    max_length: int = 1024  # tokens of a prompt at most (T)
    max_history: int | None = None  # items in a prompt at most, the newest; None is no limit
    max_item_tokens: int | None = None  # tokens of an item's line at most; None is no limit
    max_collaborative_items: int | None = None  # that the ID recommender reads at most (N), the newest; None is its own
    # newest items whose states the prefix reads, each of them made from the whole history; None is all of them
    max_collaborative_states: int | None = None
    # what the prefix reads of an item: `history`, the recommender's state of a history of it alone (paper Section
    # 3.1.1), or `embedding`, the vector that the recommender scores it by
    item_collaborative: str = "history"

    def __post_init__(self) -> None:
        if self.item_collaborative not in ITEM_COLLABORATIVE:
            raise ConfigurationError(
                f"item_collaborative must be one of {', '.join(ITEM_COLLABORATIVE)}, got {self.item_collaborative!r}"
            )
