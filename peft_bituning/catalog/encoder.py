"""The history encoder: prompts, the frozen ID recommender and the embedding model together."""

import logging
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..block_file import BlockFile
from ..data.collator import HistoryBatch, HistoryCollator
from ..data.items import ItemCatalog
from ..errors import ArtifactError, ConfigurationError, InputError
from ..recommenders.base import IDRecommender
from ..tuners.rows.common_start import keep_starts
from ..tuners.rows.embedding_model import EmbeddingModel
from ..tuners.rows.outputs import BiTuningOutput
from .history_settings import HistorySettings
from .item_table import ItemTable, non_finite_rows

logger = logging.getLogger(__name__)

CPU_TOKENS = 768  # text tokens a pass and thread: what a longer one holds is given back to the system and fetched anew


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
        """Run one batch, with gradients where they are enabled.

        Args:
            histories: catalog indices in time order, one sequence a row.
            kind: `user` or `item`.
            collaborative_histories: what the recommender reads in place of the histories, to see what it matters.

        Returns:
            The model's output and the batch it came from.
        """
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
            histories: catalog indices in time order, one sequence a row.
            kind: `user` or `item`.
            collaborative_histories: see `forward`.

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
        """Encode many histories, in batches of similar length.

        Args:
            histories: catalog indices in time order, one sequence a row.
            kind: `user` or `item`.
            distributed: share the work with all processes, every one of which must call this with the same rows.
            progress: show a progress bar.
            description: its label.
            collaborative_histories: see `forward`.
            batch_size: rows per forward pass at most; None is the encoder's own.

        Returns:
            [M, D] float32 on the CPU, in the order given; the same on every process.

        Raises:
            InputError: an embedding that is not finite.
        """
        was_training = self.model.training
        self.model.train(False)
        world, rank = _processes() if distributed else (1, 0)
        batches = self._passes(
            [self.collator.length(history, kind) for history in histories], world, batch_size or self.batch_size
        )
        mine = batches[rank::world]
        idle = -(-len(batches) // world) - len(mine) if hasattr(self.model, "unshard") else 0
        result: Tensor | None = None
        try:
            bar = tqdm(total=sum(map(len, mine)), desc=description, unit="row", disable=not progress, leave=False)
            with bar, keep_starts():
                for batch in mine:
                    others = collaborative_histories and [collaborative_histories[row] for row in batch]
                    output, _ = self.forward([histories[row] for row in batch], kind, others)
                    embeddings = output["pooler_output"].float().cpu()
                    if result is None:
                        result = embeddings.new_empty(len(histories), embeddings.shape[1])
                    result[batch] = embeddings
                    bar.update(len(batch))
                for batch in batches[:idle]:  # FSDP2: a forward pass gathers weights from all processes
                    self.forward([histories[row] for row in batch], kind)
        finally:
            self.model.train(was_training)
        if world > 1:
            own = [row for batch in mine for row in batch]
            for rows, embeddings in _gathered([(own, None if result is None else result[own])]):
                if rows:
                    result = embeddings.new_empty(len(histories), embeddings.shape[1]) if result is None else result
                    result[rows] = embeddings
        if result is None:
            return torch.zeros(0, 0)
        bad = non_finite_rows(result)
        if bad:
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
        """Encode catalog items as one-item histories.

        Args:
            num_items: how many.
            first: catalog index of the first.
            distributed: see `encode`.
            progress: show a progress bar.

        Returns:
            [num_items, D].
        """
        histories = [[index] for index in range(first, first + num_items)]
        return self.encode(histories, "item", distributed, progress, "encoding items")

    def encode_items_into(
        self, blocks: BlockFile, autocast: torch.dtype | None = None, progress: bool = False
    ) -> ItemTable:
        """Encode catalog items block by block into a mapped table; what a run before this one finished is kept.

        Where several processes run, all of them must call this: each encodes blocks of its own, all wait, and each
        maps the whole table. A model in shards (FSDP2) is run by all processes on every block.

        Args:
            blocks: the folder, and which items, as `table_blocks` gives it.
            autocast: forward passes under `torch.autocast` in this type; it becomes part of the table's identity.
                None leaves them in the model's own type.
            progress: show a progress bar of this process's items.

        Returns:
            The table, in its file; nothing of it is held in memory.

        Raises:
            ArtifactError: the folder holds a table of another identity, size or type.
            InputError: an embedding that is not finite.
        """
        world, rank = _processes()
        if autocast is not None:
            identity = {**blocks.origin["identity"], "autocast": str(autocast).removeprefix("torch.")}
            blocks = replace(blocks, origin={**blocks.origin, "identity": identity})
        found = _unless_damaged(blocks.begun())
        file = found or blocks
        whole = _gathered([] if found is None else sorted(found.finished(range(file.num_blocks)[rank::world])))
        missing = sorted(set(range(file.num_blocks)).difference(whole))
        logger.info("%d of %d blocks are there, %d are encoded", len(whole), file.num_blocks, len(missing))
        together = hasattr(self.model, "unshard")  # FSDP2: a forward pass gathers weights from all processes
        mine = missing if together else missing[rank::world]
        total = sum(len(file.rows(block)) for block in mine)
        with tqdm(total=total, desc="encoding items", unit="row", disable=not progress) as bar:
            encoded = ((block, self._encode_block(file, block, together, autocast, progress)) for block in mine)
            first = list(islice(encoded, 1))
            widths = _gathered([rows.shape[1] for _, rows in first])  # known now, and the file is made
            if found is None:
                file = replace(blocks, shape=(blocks.shape[0], widths[0]))
                if rank == 0:
                    file.create()
            _gathered([])
            file.check()
            for block, rows in chain(first, encoded):
                if rank == 0 or not together:
                    file.write(block, rows, rank)
                bar.update(len(rows))
        _gathered([])
        return ItemTable.load(file.path, file.shape[0])

    def _encode_block(
        self, file: BlockFile, block: int, distributed: bool, autocast: torch.dtype | None, progress: bool
    ) -> Tensor:
        """Encode the items of a block to rows of length 1, in the type of the file."""
        first = file.origin["first_item"]
        items = [first + row for row in file.rows(block)]
        prompts = self.collator.prompts
        encoder = self.over(prompts.items)  # anew for every block: it keeps the tokens of each item that it ever saw
        label = f"items {items[0]} to {items[-1]}"
        with torch.autocast(self.device.type, dtype=autocast, enabled=autocast is not None):
            embeddings = encoder.encode([[item] for item in items], "item", distributed, progress, label)
        for name, count in encoder.collator.prompts.counts.items():
            prompts.counts[name] += count
        return ItemTable.from_embeddings(embeddings).embeddings.to(getattr(torch, file.dtype))


def _unless_damaged(file: BlockFile | None) -> BlockFile | None:
    """Return a table's file; None where it is truncated, to be made again."""
    try:
        if file is not None:
            file.check()
    except ArtifactError as error:
        logger.warning("the item table is damaged and is made again: %s", error)
        return None
    return file


def _gathered(values: list[Any]) -> list[Any]:
    """Return the values of all processes, first to last; they wait for one another here."""
    world, _ = _processes()
    if world == 1:
        return values
    shares: list[list[Any]] = [[] for _ in range(world)]
    torch.distributed.all_gather_object(shares, values)  # accelerate's own gathers nothing where it saw no device
    return [value for share in shares for value in share]


def _processes() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(), torch.distributed.get_rank()
    return 1, 0
