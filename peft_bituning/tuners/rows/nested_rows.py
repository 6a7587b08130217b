"""Rows whose text is the start of another's run inside it: one pass per user for all cuts of a history."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import RowLayout


def find_hosts(texts: Sequence[list[int]]) -> list[int]:
    """Find for each text (token ids) one that starts with it and is itself the start of no other.

    Returns:
        The row of each text's host; a host is its own, and of equal texts one is the host of all.
    """
    order = sorted(range(len(texts)), key=lambda row: texts[row])
    host = list(range(len(texts)))
    # A text sorts right before those that it starts, so its successor starts with it if any text does.
    for row, following in zip(order[-2::-1], order[:0:-1], strict=True):
        if texts[following][: len(texts[row])] == texts[row]:
            host[row] = host[following]
    return host


@dataclass(frozen=True)
class Nesting:
    """Which rows of a batch are run, and where the others stand in them.

    Causal attention gives a row's text the same states inside a longer row. Its suffix takes a slot behind the longer
    row, hidden from everything else, sees the row's own tokens alone, and has the position right after them.

    Args:
        hosts: the rows that are run [H].
        place: each row's host as a place in `hosts` [B].
        slot: the slot of each row's suffix [B]; -1 of a host, whose suffix stands where it always does.
        ends: tokens of each row without its suffix, P among them [B].
        num_slots: slots behind each host, G; 0 without a suffix.
    """

    hosts: Tensor
    place: Tensor
    slot: Tensor
    ends: Tensor
    num_slots: int

    @classmethod
    def of(cls, layout: RowLayout, texts: Sequence[list[int]]) -> "Nesting":
        """Nest the rows of a batch, whose texts are given as token ids [B]."""
        host = find_hosts(texts)
        guests: Counter[int] = Counter()
        slot = []
        for row, its_host in enumerate(host):
            slot.append(-1 if row == its_host else guests[its_host])
            guests[its_host] += row != its_host
        hosts, place = torch.tensor(host).unique(return_inverse=True)
        device = layout.lengths.device
        num_slots = max(guests.values()) if layout.has_suffix else 0
        ends = layout.lengths + layout.num_prefix
        return cls(hosts.to(device), place.to(device), torch.tensor(slot, device=device), ends, num_slots)

    @property
    def num_hosts(self) -> int:
        """H."""
        return len(self.hosts)

    def inputs(self, rows: Tensor, start: int) -> dict[str, Tensor]:
        """Give what the language model takes for the hosts of packed rows [B, W, D], from column `start` on.

        Returns:
            `inputs_embeds` [H, W - start + G, D]; with slots also `attention_mask` [H, 1, W - start + G, W + G],
            0 where a token is seen and the least number of the rows' type where not, and `position_ids`
            [H, W - start + G].
        """
        embeds = rows[self.hosts, start:]
        if not self.num_slots:
            return {"inputs_embeds": embeds}
        width, guests = rows.shape[1], (self.slot >= 0).nonzero()[:, 0]
        cells = (self.place[guests], self.slot[guests])
        suffixes = rows[guests, self.ends[guests]]  # [guests, D]
        slots = embeds.new_zeros(self.num_hosts, self.num_slots, embeds.shape[2]).index_put(cells, suffixes)
        ends = self.ends.new_zeros(self.num_hosts, self.num_slots).index_put(cells, self.ends[guests])  # [H, G]
        columns = torch.arange(width + self.num_slots, device=rows.device)
        text = columns[start:width]
        seen_by_text = (columns <= text.unsqueeze(1)).expand(self.num_hosts, -1, -1)
        itself = columns == columns[width:].unsqueeze(1)  # [G, W + G]
        seen_by_slots = (columns < ends.unsqueeze(-1)) | itself
        seen = torch.cat([seen_by_text, seen_by_slots], dim=1).unsqueeze(1)
        mask = torch.zeros(seen.shape, dtype=rows.dtype, device=rows.device)
        return {
            "inputs_embeds": torch.cat([embeds, slots], dim=1),
            "attention_mask": mask.masked_fill(~seen, torch.finfo(rows.dtype).min),
            "position_ids": torch.cat([text.expand(self.num_hosts, -1), ends], dim=1),
        }

    def spread(self, states: Tensor) -> Tensor:
        """Give every row its states [B, W, D] from those of hosts and slots [H, W + G, D]."""
        width = states.shape[1] - self.num_slots
        rows = states[self.place, :width]
        if not self.num_slots:
            return rows
        guests = (self.slot >= 0).nonzero()[:, 0]
        suffixes = states[self.place[guests], width + self.slot[guests]]
        return rows.index_put((guests, self.ends[guests]), suffixes)
