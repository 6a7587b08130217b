"""The history encoder: prompts, the frozen ID recommender and the embedding model together."""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data.collator import HistoryBatch, HistoryCollator
from ..data.items import ItemCatalog
from ..errors import ConfigurationError, InputError
from ..launch import gathered, processes
from ..recommenders.base import IDRecommender
from ..tuners.rows.common_start import keep_starts
from ..tuners.rows.embedding_model import BiTuningOutput, EmbeddingModel
from .item_table import non_finite_rows

ITEM_COLLABORATIVE = ("history", "embedding")
CPU_TOKENS = 768  # text tokens a pass and thread: what a longer one holds is given back to the system and fetched anew


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


class HistoryEncoder:
    """Encodes users and items; an item is a one-item history (paper Section 3.1.1). `assemble` makes one.

    Args:
        model: the model, or what wraps it (DDP).
        collator: renders and pads histories.
        id_recommender: the frozen ID recommender that gives `C_u`; None where the model reads none.
        device: where the model is.
        settings: how much of a history is read; limits of the text are the collator's.
        batch_size: rows per forward pass at most; one process on a CPU takes fewer where they have prefixes of their
            own (an ID recommender is given) and more than 768 tokens of text per thread, padding among them.

    Raises:
        ConfigurationError: a batch size below 1.
    """

    def __init__(
        self,
        model: EmbeddingModel,
        collator: HistoryCollator,
        id_recommender: IDRecommender | None,
        device: torch.device,
        settings: HistorySettings | None = None,
        batch_size: int = 32,
    ) -> None:
        if batch_size < 1:
            raise ConfigurationError(f"batch_size must be >= 1, got {batch_size!r}")
        self.model = model
        self.collator = collator
        self.id_recommender = id_recommender
        self.device = device
        self.settings = settings or HistorySettings()
        self.batch_size = batch_size

    def around(self, model: EmbeddingModel) -> "HistoryEncoder":
        """Return an encoder that differs in the model alone, such as what DDP wraps around it."""
        other = copy(self)
        other.model = model
        return other

    def over(self, items: ItemCatalog) -> "HistoryEncoder":
        """Return an encoder that differs in the catalog alone; nothing is kept of the items that it has seen."""
        other = copy(self)
        other.collator = copy(self.collator)
        other.collator.prompts = self.collator.prompts.over(items)
        return other

    def forward(
        self,
        histories: Sequence[Sequence[int]],
        kind: str = "user",
        collaborative_histories: Sequence[Sequence[int]] | None = None,
    ) -> tuple[BiTuningOutput, HistoryBatch]:
        """Run one batch, with gradients where they are enabled: the model's output, and the batch from `inputs`."""
        inputs, batch = self.inputs(histories, kind, collaborative_histories)
        return self.model(**inputs), batch

    def inputs(
        self,
        histories: Sequence[Sequence[int]],
        kind: str = "user",
        collaborative_histories: Sequence[Sequence[int]] | None = None,
    ) -> tuple[dict[str, Tensor], HistoryBatch]:
        """Make the model's inputs of one batch: the text, and what the recommender says of the histories.

        Args:
            histories: Catalog indices in time order, one sequence a row.
            kind: `user` or `item`.
            collaborative_histories: What the recommender reads in place of the histories, to see what it matters.

        Returns:
            `input_ids`, `attention_mask` [B, T] and, with a recommender, `collaborative_embeds` [B, N, C] and
            `collaborative_mask` [B, N]; and the batch they came from.
        """
        batch = self.collator(histories, kind, collaborative_histories).to(self.device)
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if self.id_recommender is not None:
            by_embedding = kind == "item" and self.settings.item_collaborative == "embedding"
            embeds, mask = self.id_recommender.read(batch.item_indices, batch.item_mask, by_embedding)
            if self.settings.max_collaborative_states is not None:
                newer = mask.flip(1).cumsum(1).flip(1)  # real items from here to the newest [B, N]
                mask = mask & (newer <= self.settings.max_collaborative_states)
            inputs |= {"collaborative_embeds": embeds, "collaborative_mask": mask}
        return inputs, batch

    @torch.no_grad()
    def encode(
        self,
        histories: Sequence[Sequence[int]],
        kind: str = "user",
        distributed: bool = False,
        progress: bool = False,
        description: str = "encoding",
        collaborative_histories: Sequence[Sequence[int]] | None = None,
        batch_size: int | None = None,
    ) -> Tensor:
        """Encode M histories, in batches of similar length, to [M, D] float32 on the CPU, in the order given.

        Args:
            histories: Catalog indices in time order, one sequence a row.
            kind: `user` or `item`.
            distributed: Share the work with all processes, every one of which must call this and gets all rows.
            progress: Show a progress bar.
            description: Its label.
            collaborative_histories: See `inputs`.
            batch_size: Rows per forward pass at most; None is the encoder's own.

        Raises:
            InputError: An embedding that is not finite.
        """
        world, rank = processes() if distributed else (1, 0)
        lengths = [self.collator.length(history, kind) for history in histories]
        batches = self._passes(lengths, world, batch_size or self.batch_size)
        mine = batches[rank::world]
        if hasattr(self.model, "unshard") and len(mine) * world < len(batches):
            mine.append(batches[0])  # FSDP2: a forward pass gathers weights from all processes
        found: list[tuple[list[int], Tensor]] = []  # rows and their embeddings
        bar = tqdm(total=sum(map(len, mine)), desc=description, unit="row", disable=not progress, leave=False)
        was_training = self.model.training
        self.model.train(False)
        try:
            with bar, keep_starts():
                for batch in mine:
                    others = collaborative_histories and [collaborative_histories[row] for row in batch]
                    output, _ = self.forward([histories[row] for row in batch], kind, others)
                    found.append((batch, output["pooler_output"].float().cpu()))
                    bar.update(len(batch))
        finally:
            self.model.train(was_training)
        found = gathered(found) if world > 1 else found
        if not found:
            return torch.zeros(0, 0)
        result = found[0][1].new_empty(len(histories), found[0][1].shape[1])
        for batch, embeddings in found:
            result[batch] = embeddings
        if bad := non_finite_rows(result):
            raise InputError(
                f"embeddings must be finite, got NaN or infinity in rows {bad} of {len(result)} ({description}); "
                "a half-precision base model can overflow: load it in bfloat16 or float32"
            )
        return result

    def _passes(self, lengths: list[int], world: int, batch_size: int) -> list[list[int]]:
        """Cut rows of so many text tokens into forward passes, the longest first; the same on every process."""
        limit = float("inf")  # rows that share their start had better stay together, and threads may differ by process
        if self.device.type == "cpu" and self.id_recommender is not None and world == 1:
            limit = CPU_TOKENS * torch.get_num_threads()
        passes: list[list[int]] = []
        for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
            size = len(passes[-1]) if passes else batch_size
            if size == batch_size or (size + 1) * lengths[passes[-1][0]] > limit:
                passes.append([])
            passes[-1].append(row)
        return passes

    def encode_items(self, num_items: int, first: int = 0, distributed: bool = False, progress: bool = False) -> Tensor:
        """Encode catalog items from `first` on as one-item histories, [num_items, D], as `encode` does."""
        histories = [[index] for index in range(first, first + num_items)]
        return self.encode(histories, "item", distributed, progress, "encoding items")
