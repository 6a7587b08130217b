"""Where each token of a row stands: `[P prefix | text | suffix | padding]`, whatever padding the caller used."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class RowLayout:
    """The order in which a batch's tokens go into the language model (paper Eq. 1).

    Args:
        order: for each packed text slot, the column of the caller's layout it comes from [B, T].
        lengths: real text tokens a row [B].
        num_prefix: P.
        has_suffix: whether a token follows the text.
    """

    order: Tensor
    lengths: Tensor
    num_prefix: int
    has_suffix: bool

    @classmethod
    def from_mask(cls, mask: Tensor, num_prefix: int, has_suffix: bool) -> "RowLayout":
        """Build the layout of a batch from its attention mask.

        Args:
            mask: which tokens are real [B, T], int or bool; padding may stand anywhere.
            num_prefix: P.
            has_suffix: whether a token follows the text.

        Returns:
            The layout; real tokens keep their order.
        """
        real = mask.bool()
        order = torch.argsort((~real).to(torch.int8), dim=1, stable=True)
        return cls(order, real.sum(1), num_prefix, has_suffix)

    @property
    def attention_mask(self) -> Tensor:
        """The mask of the packed rows [B, P + T + (1 with a suffix)], int64."""
        return (self._columns() < (self.lengths + self.num_prefix + int(self.has_suffix)).unsqueeze(1)).long()

    def pack(self, prefix: Tensor | None, tokens: Tensor, suffix: Tensor | None) -> Tensor:
        """Put prefix, text and suffix together.

        Args:
            prefix: [B, P, D], or None where P is 0.
            tokens: token embeddings in the caller's layout [B, T, D].
            suffix: [B, 1, D] or [1, 1, D], or None.

        Returns:
            The packed rows [B, P + T + (1 with a suffix), D]; padding is zero, whatever it held.
        """
        text = self.pack_text(tokens)
        if suffix is not None:
            slot = torch.zeros_like(text[:, :1]) if text.shape[1] else suffix.new_zeros(text.shape[0], 1, text.shape[2])
            text = torch.cat([text, slot.to(text.dtype)], dim=1)  # [B, T + 1, D]
            columns = torch.arange(text.shape[1], device=text.device)
            text = torch.where((columns == self.lengths.unsqueeze(1)).unsqueeze(-1), suffix.to(text.dtype), text)
        return text if prefix is None else torch.cat([prefix.to(text.dtype), text], dim=1)

    def pack_text(self, values: Tensor, fill: float = 0) -> Tensor:
        """Bring per-token values into packed order, padding last.

        Args:
            values: [B, T, ...] in the caller's layout.
            fill: what padding is replaced by.

        Returns:
            [B, T, ...] with the row's real tokens first.
        """
        packed = _gather(values, self.order)
        columns = torch.arange(values.shape[1], device=values.device)
        padding = _expand(columns >= self.lengths.unsqueeze(1), packed)
        return packed.masked_fill(padding, fill)

    def pack_ids(self, token_ids: Tensor, placeholder: int) -> Tensor:
        """Give the token ids of packed rows.

        Args:
            token_ids: [B, T] in the caller's layout.
            placeholder: the id at virtual tokens and padding.

        Returns:
            [B, P + T + (1 with a suffix)].
        """
        text = self.pack_text(token_ids, fill=placeholder)
        return F.pad(text, (self.num_prefix, int(self.has_suffix)), value=placeholder)

    def pad_left(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """Bring packed rows to the right edge, where generation goes on.

        Args:
            packed: [B, P + T + (1 with a suffix), ...], from `pack` or `pack_ids`.

        Returns:
            The rows with their padding first [B, W, ...], zero there, and their mask [B, W], where W is the longest
            row's tokens.
        """
        filled = self.attention_mask.sum(1)  # [B]
        width = int(filled.max())
        columns = torch.arange(width, device=packed.device) - (width - filled).unsqueeze(1)  # [B, W], < 0 is padding
        rows = _gather(packed, columns.clamp(min=0))
        real = columns >= 0
        return rows.masked_fill(_expand(~real, rows), 0), real.long()

    def text_states(self, states: Tensor) -> Tensor:
        """Take the text positions out of packed states and give them back in the caller's layout.

        Args:
            states: [B, P + T + (1 with a suffix), ...].

        Returns:
            [B, T, ...], zero at padding.
        """
        width = self.order.shape[1]
        text = states[:, self.num_prefix : self.num_prefix + width]
        columns = torch.arange(width, device=states.device)
        text = text.masked_fill(_expand(columns >= self.lengths.unsqueeze(1), text), 0)
        return _gather(text, torch.argsort(self.order, dim=1))

    def last_states(self, states: Tensor) -> Tensor:
        """Take each row's last real position: the suffix where there is one, the last text token otherwise.

        Args:
            states: [B, P + T + (1 with a suffix), D].

        Returns:
            [B, D].
        """
        last = (self.lengths + self.num_prefix + int(self.has_suffix) - 1).clamp(min=0)
        return states[torch.arange(states.shape[0], device=states.device), last]

    def mean_states(self, states: Tensor) -> Tensor:
        """Average each row's text states.

        Args:
            states: [B, P + T + (1 with a suffix), D].

        Returns:
            [B, D]; zero for a row without text.
        """
        columns = self._columns()
        text = (columns >= self.num_prefix) & (columns < (self.lengths + self.num_prefix).unsqueeze(1))
        total = states.masked_fill(~text.unsqueeze(-1), 0).sum(1)
        return total / self.lengths.clamp(min=1).unsqueeze(1).to(states.dtype)

    def _columns(self) -> Tensor:
        width = self.num_prefix + self.order.shape[1] + int(self.has_suffix)
        return torch.arange(width, device=self.order.device)


def _gather(values: Tensor, order: Tensor) -> Tensor:
    return values.gather(1, _expand(order, values).expand(*order.shape, *values.shape[2:]))


def _expand(mask: Tensor, like: Tensor) -> Tensor:
    return mask.reshape(*mask.shape, *([1] * (like.ndim - 2)))
