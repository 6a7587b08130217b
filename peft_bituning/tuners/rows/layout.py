"""The layout of a row: `[P prefix | text | suffix | padding]`, whatever padding the caller used."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class RowLayout:
    """The order in which a batch's tokens go into the language model (paper Eq. 1); rows are W = P + T + 1 wide.

    Args:
        order: for each packed text slot, the column of the caller's layout it comes from [B, T].
        lengths: real text tokens per row [B].
        num_prefix: P.
        has_suffix: whether a token follows the text; W is P + T without.
    """

    order: Tensor
    lengths: Tensor
    num_prefix: int
    has_suffix: bool

    @classmethod
    def from_mask(cls, mask: Tensor, num_prefix: int, has_suffix: bool) -> "RowLayout":
        """Build the layout from a mask [B, T], int or bool, with padding anywhere; real tokens keep their order."""
        real = mask.bool()
        order = torch.argsort((~real).to(torch.int8), dim=1, stable=True)
        return cls(order, real.sum(1), num_prefix, has_suffix)

    @property
    def width(self) -> int:
        """W, columns of the packed rows."""
        return self.num_prefix + self.order.shape[1] + int(self.has_suffix)

    @property
    def attention_mask(self) -> Tensor:
        """The mask of the packed rows [B, W], int64."""
        return (self._columns() < (self.lengths + self.num_prefix + int(self.has_suffix)).unsqueeze(1)).long()

    def pack(self, prefix: Tensor | None, tokens: Tensor, suffix: Tensor | None) -> Tensor:
        """Put prefix, text and suffix together.

        Args:
            prefix: [B, P, D], or None where P is 0.
            tokens: token embeddings in the caller's layout [B, T, D].
            suffix: [B, 1, D] or [1, 1, D], or None.

        Returns:
            The packed rows [B, W, D]; padding is zero, whatever it held.
        """
        text = self.pack_text(tokens)
        if suffix is not None:
            text = F.pad(text, (0, 0, 0, 1))  # [B, T + 1, D]
            columns = torch.arange(text.shape[1], device=text.device)
            text = torch.where((columns == self.lengths.unsqueeze(1)).unsqueeze(-1), suffix.to(text.dtype), text)
        return text if prefix is None else torch.cat([prefix.to(text.dtype), text], dim=1)

    def pack_text(self, values: Tensor, fill: float = 0) -> Tensor:
        """Bring values per token [B, T, ...] into packed order, real tokens first, padding replaced by `fill`."""
        return self._fill_padding(_gather(values, self.order), fill)

    def pack_ids(self, token_ids: Tensor, placeholder: int) -> Tensor:
        """Give the token ids of packed rows [B, W] from [B, T], with a placeholder at virtual tokens and padding."""
        text = self.pack_text(token_ids, fill=placeholder)
        return F.pad(text, (self.num_prefix, int(self.has_suffix)), value=placeholder)

    def pad_left(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """Bring packed rows [B, W, ...] to the right edge, where generation goes on.

        Returns:
            The rows with their padding, zero, first, and their mask, both as wide as the longest row.
        """
        filled = self.attention_mask.sum(1)  # [B]
        width = int(filled.max())
        columns = torch.arange(width, device=packed.device) - (width - filled).unsqueeze(1)  # < 0 is padding
        rows = _gather(packed, columns.clamp(min=0))
        real = columns >= 0
        return rows.masked_fill(_expand(~real, rows), 0), real.long()

    def text_states(self, states: Tensor) -> Tensor:
        """Take the text out of packed states [B, W, ...], in the caller's layout [B, T, ...], zero at padding."""
        text = states[:, self.num_prefix : self.num_prefix + self.order.shape[1]]
        return _gather(self._fill_padding(text, 0), torch.argsort(self.order, dim=1))

    def last_states(self, states: Tensor) -> Tensor:
        """Take each row's last real state [B, D]: the suffix's where there is one, the last text token's otherwise."""
        last = (self.lengths + self.num_prefix + int(self.has_suffix) - 1).clamp(min=0)
        return states[torch.arange(states.shape[0], device=states.device), last]

    def mean_states(self, states: Tensor) -> Tensor:
        """Average each row's text states: [B, D], zero for a row without text."""
        columns = self._columns()
        text = (columns >= self.num_prefix) & (columns < (self.lengths + self.num_prefix).unsqueeze(1))
        total = states.masked_fill(~text.unsqueeze(-1), 0).sum(1)
        return total / self.lengths.clamp(min=1).unsqueeze(1).to(states.dtype)

    def _columns(self) -> Tensor:
        return torch.arange(self.width, device=self.order.device)

    def _fill_padding(self, text: Tensor, fill: float) -> Tensor:
        columns = torch.arange(text.shape[1], device=text.device)
        return text.masked_fill(_expand(columns >= self.lengths.unsqueeze(1), text), fill)


def _gather(values: Tensor, order: Tensor) -> Tensor:
    return values.gather(1, _expand(order, values).expand(*order.shape, *values.shape[2:]))


def _expand(mask: Tensor, like: Tensor) -> Tensor:
    return mask.reshape(*mask.shape, *([1] * (like.ndim - 2)))
