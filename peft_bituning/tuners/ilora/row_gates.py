"""The gates of the rows on their way through the language model."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from ...errors import InputError, UnsupportedModelError

# Where transformers' layers, and torch's wrapper around a module (FSDP), keep the function that runs them again.
CHECKPOINTS = ("_gradient_checkpointing_func", "checkpoint_fn")


class RowsOnTheWay(NamedTuple):
    """The rows of one pass.

    Args:
        gates: each row's weights of the experts [B, K].
        width: tokens per row W, padding among them; None where it changes from step to step (`generate`).
    """

    gates: Tensor
    width: int | None


class RowGates:
    """What the adapted layers of one model read their gates from, each thread its own.

    Layers get hidden states alone: there is no way to hand them the gates as an argument.
    """

    def __init__(self) -> None:
        self._local = threading.local()

    def __reduce__(self) -> tuple[type["RowGates"], tuple[()]]:
        """Copy and pickle as a new one: no pass goes on in a copy."""
        return RowGates, ()

    @property
    def rows(self) -> RowsOnTheWay | None:
        """The rows of this thread's innermost pass, or None outside one."""
        return getattr(self._local, "rows", None)

    @contextmanager
    def use(self, rows: RowsOnTheWay, model: nn.Module | None = None) -> Iterator[None]:
        """Give the layers the gates of the rows that are about to run, while inside; passes may nest.

        Given the model, its layers that run again in the backward pass do so with the gates of their forward pass.
        These become an input of the checkpointed function: they get their gradient through it, also where
        checkpointing is reentrant, and every forward pass keeps its own until its backward pass.
        """
        found = [] if model is None else [(each, key) for each in model.modules() for key in CHECKPOINTS]
        originals = [(each, key, getattr(each, key)) for each, key in found if key in each.__dict__]
        outer = self.rows
        self._local.rows = rows
        try:
            for each, key, original in originals:
                setattr(each, key, partial(self._checkpoint, original))
            yield
        finally:
            for each, key, original in originals:
                setattr(each, key, original)
            self._local.rows = outer

    def _checkpoint(self, original: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        rows = self.rows
        if rows is None:
            return original(function, *args, **kwargs)
        return original(partial(self._run_again, function, rows.width), rows.gates, *args, **kwargs)

    def _run_again(
        self, function: Callable[..., Any], width: int | None, gates: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        with self.use(RowsOnTheWay(gates, width)):
            return function(*args, **kwargs)

    def scale(self, states: Tensor) -> Tensor:
        """Scale each expert's share of low-rank states by its row's gate, which is repeated r / K times.

        Args:
            states: outputs of `lora_A`: [B, ..., r], flattened tokens [B W, r], or a multiple of B where `generate`
                repeats its rows.

        Raises:
            InputError: no pass is going on.
            UnsupportedModelError: the layer does not get its tokens row by row.
        """
        if self.rows is None:
            raise InputError(
                "an iLoRA layer must know the gates of its rows, got none; call the PEFT model itself, with "
                "collaborative_embeds, or run the base model inside `with model.disable_adapter():`"
            )
        gates, width = self.rows
        count, (copies, rest) = len(states), divmod(len(states), len(gates))
        flat = states.ndim == 2 and width is not None and count == len(gates) * width
        if rest or (width is not None and copies != 1 and not flat):
            raise UnsupportedModelError(
                f"an iLoRA layer must get the tokens of {len(gates)} rows one row after the other, got states of shape "
                f"{list(states.shape)}; leave out layers that see a choice of tokens (experts of a mixture), by "
                "target_modules or exclude_modules"
            )
        weights = gates.repeat_interleave(states.shape[-1] // gates.shape[1], dim=1)  # [B, r]
        weights = weights.repeat_interleave(copies, dim=0).to(states)
        return states * weights.view(count, *[1] * (states.ndim - 2), -1)
