"""From histories to embeddings: prompts, the frozen recommender and the Bi-Tuning model together."""

from collections.abc import Sequence

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data.collator import HistoryBatch, HistoryCollator
from ..errors import InputError
from ..recommenders.base import IDRecommender
from ..tuners.bituning import BiTuningOutput


class HistoryEncoder:
    """Encodes users and items; an item is a one-item history (paper Section 3.1.1).

    Args:
        model: a PEFT model with a Bi-Tuning adapter, or what wraps one (DDP).
        collator: renders and pads histories.
        recommender: the frozen ID recommender that gives `C_u`; None where the prefix encoder needs none.
        device: where the model is.
        batch_size: rows a forward pass.
        max_collaborative_states: the prefix encoder reads the recommender's states of so many newest items, each of
            them made from the whole history; None is all of them.
    """

    def __init__(
        self,
        model: nn.Module,
        collator: HistoryCollator,
        recommender: IDRecommender | None,
        device: torch.device,
        batch_size: int = 32,
        max_collaborative_states: int | None = None,
    ) -> None:
        self.model = model
        self.collator = collator
        self.recommender = recommender
        self.device = device
        self.batch_size = batch_size
        self.max_collaborative_states = max_collaborative_states

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
        if self.recommender is not None:
            embeds = self.recommender.encode(batch.item_indices, batch.item_mask)
            mask = self.recommender.encoded_mask(batch.item_indices, batch.item_mask)
            if self.max_collaborative_states is not None:
                newer = mask.flip(1).cumsum(1).flip(1)  # real items from here to the newest [B, N]
                mask = mask & (newer <= self.max_collaborative_states)
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
    ) -> Tensor:
        """Encode many histories, in batches of similar length.

        Args:
            histories: catalog indices in time order, one sequence a row.
            kind: `user` or `item`.
            distributed: share the work with all processes, every one of which must call this with the same rows.
            progress: show a progress bar.
            description: its label.
            collaborative_histories: see `forward`.

        Returns:
            [M, D] float32 on the CPU, in the order given; the same on every process.

        Raises:
            InputError: an embedding that is not finite.
        """
        was_training = self.model.training
        self.model.eval()
        order = sorted(range(len(histories)), key=lambda row: (-self.collator.length(histories[row], kind), row))
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        world, rank = _processes() if distributed else (1, 0)
        mine = batches[rank::world]
        idle = -(-len(batches) // world) - len(mine) if hasattr(self.model, "unshard") else 0
        rows: list[int] = []
        parts: list[Tensor] = []
        try:
            with tqdm(
                total=sum(map(len, mine)), desc=description, unit="row", disable=not progress, leave=False
            ) as bar:
                for batch in mine:
                    others = collaborative_histories and [collaborative_histories[row] for row in batch]
                    output, _ = self.forward([histories[row] for row in batch], kind, others)
                    parts.append(output["pooler_output"].float().cpu())
                    rows.extend(batch)
                    bar.update(len(batch))
                for batch in batches[:idle]:  # FSDP2: a forward pass gathers weights from all processes
                    self.forward([histories[row] for row in batch], kind)
        finally:
            self.model.train(was_training)
        if world > 1:
            shares = gather_object([(rows, parts)])
            rows = [row for share in shares for row in share[0]]
            parts = [part for share in shares for part in share[1]]
        if not parts:
            return torch.zeros(0, 0)
        encoded = torch.cat(parts)
        result = torch.empty_like(encoded)
        result[torch.tensor(rows)] = encoded
        finite = torch.isfinite(result).all(1)
        if not bool(finite.all()):
            bad = torch.nonzero(~finite).flatten()[:10].tolist()
            raise InputError(
                f"embeddings must be finite, got NaN or infinity in rows {bad} of {len(result)} ({description}); "
                "a half-precision base model can overflow: load it in bfloat16 or float32"
            )
        return result

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


def _processes() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(), torch.distributed.get_rank()
    return 1, 0
