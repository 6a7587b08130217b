"""The keys and values of what rows start with, kept from one batch to the next where all of a catalog starts alike."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from .backbone import find_backbone

_kept: ContextVar["WeakKeyDictionary[PreTrainedModel, CommonStart] | None"] = ContextVar("kept", default=None)


@dataclass(frozen=True)
class CommonStart:
    """What a model made of S tokens without anything before them.

    Args:
        rows: their input embeddings [1, S, D].
        states: their last hidden states [1, S, D].
        layers: keys and values of each layer [1, heads, S, head width].
    """

    rows: Tensor
    states: Tensor
    layers: list[tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, model: PreTrainedModel, rows: Tensor, hosts: int) -> "CommonStart | None":
        """Run the start [1, S, D] of a batch of so many rows, or find it where `keep_starts` kept one that serves.

        Returns:
            All of it, or the part of it that is known; None where the model keeps no keys and values for some layers.
        """
        kept = None if torch.is_grad_enabled() or model.training else _kept.get()
        known = None if kept is None else kept.get(model)
        if known is not None:
            length = min(known.rows.shape[1], rows.shape[1])
            missing = (rows.shape[1] - length) * hosts  # token slots that every row would have to run
            if missing <= rows.shape[1] and torch.equal(known.rows[:, :length], rows[:, :length]):
                return known.cut(length)
        past = empty_cache(model)
        ones = torch.ones(rows.shape[:2], dtype=torch.long, device=rows.device)
        output = find_backbone(model)(
            inputs_embeds=rows, attention_mask=ones, past_key_values=past, use_cache=True, return_dict=True
        )
        if past is None or any(past.get_seq_length(layer) != rows.shape[1] for layer in range(len(past.layers))):
            return None
        made = cls(rows, output.last_hidden_state, [(layer.keys, layer.values) for layer in cast(Any, past.layers)])
        if kept is not None:
            kept[model] = made
        return made

    def cut(self, length: int) -> "CommonStart":
        """Return the first `length` tokens, which know nothing of those behind them."""
        layers = [(keys[:, :, :length], values[:, :, :length]) for keys, values in self.layers]
        return CommonStart(self.rows[:, :length], self.states[:, :length], layers)

    def cache(self, model: PreTrainedModel, hosts: int) -> DynamicCache:
        """Return keys and values for so many rows that go on from here."""
        past = DynamicCache(config=model.config)
        for index, (keys, values) in enumerate(self.layers):
            past.update(keys.expand(hosts, -1, -1, -1), values.expand(hosts, -1, -1, -1), index)
        return past


@contextmanager
def keep_starts() -> Iterator[None]:
    """Run what batches have in common once for all of them; without gradients, while no weight changes."""
    token = _kept.set(WeakKeyDictionary())
    try:
        yield
    finally:
        _kept.reset(token)


def empty_cache(model: PreTrainedModel) -> DynamicCache | None:
    """Return a cache of the model's kinds of layers; None where its configuration names none."""
    try:
        return DynamicCache(config=model.config)
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
