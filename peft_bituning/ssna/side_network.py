"""The side network: adapters beside the language model, chained over the states of J items in its top a layers."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

_LEAST_DEVIATION = 1e-3  # what hardly differs between items is not blown up beyond this


class SideAdapter(nn.Module):
    """One link of the chain, over the states of one layer.

    `h_j = h_{j-1} + up(GELU(down(LayerNorm(state_j) + h_{j-1})))`

    Args:
        state_size: D.
        adapter_size: Width of the bottleneck.
        dropout: Probability in training, within the bottleneck.
    """

    def __init__(self, state_size: int, adapter_size: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(state_size)
        self.down = nn.Linear(state_size, adapter_size)
        self.up = nn.Linear(adapter_size, state_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: Tensor, hidden: Tensor) -> Tensor:
        """Add what this layer says of its states `[J, D]` to h_{j-1} `[J, D]`, what the layers below said."""
        return hidden + self.up(self.dropout(functional.gelu(self.down(self.norm(states) + hidden))))


class SideNetwork(nn.Module):
    """Item embeddings `[J, C]` from the states of the top a layers, lowest layer first, `h_0 = 0`.

    `e = W LayerNorm(h_a)`: the network reads states and never runs the language model.

    Args:
        num_layers: a.
        state_size: D.
        adapter_size: Width of the adapters' bottlenecks.
        output_size: C.
        dropout: Probability in training, within the bottlenecks.
    """

    def __init__(
        self, num_layers: int, state_size: int, adapter_size: int, output_size: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.adapters: Sequence[SideAdapter] = nn.ModuleList(  # type: ignore[assignment]
            SideAdapter(state_size, adapter_size, dropout) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(state_size)
        self.projection = nn.Linear(state_size, output_size)

    @torch.no_grad()
    def start(self, states: Tensor, chunk_size: int) -> None:
        """Set the weights training starts from by the catalog's states `[I, a, D]`, `chunk_size` items at once.

        Every norm standardises its layer over the catalog (see `standardise`); the adapters keep the scale of what they
        read, and the item embeddings have a deviation of about 0.1, whatever D is.
        """
        for place, adapter in enumerate(self.adapters):
            standardise(adapter.norm, (piece[:, place] for piece in states.split(chunk_size)))
            for linear in (adapter.down, adapter.up):
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
                nn.init.zeros_(linear.bias)
        nn.init.normal_(self.projection.weight, std=0.1 * self.projection.in_features**-0.5)
        nn.init.zeros_(self.projection.bias)

    def forward(self, states: Tensor) -> Tensor:
        """Embed items by their states `[J, a, D]` float32, `[J, C]`."""
        hidden = torch.zeros_like(states[:, 0])
        for adapter, layer in zip(self.adapters, states.unbind(1), strict=True):
            hidden = adapter(layer, hidden)
        return self.projection(self.norm(hidden))


@torch.no_grad()
def standardise(norm: nn.LayerNorm, pieces: Iterable[Tensor]) -> None:
    """Start a norm so that over the catalog's vectors `[any, D]`, in pieces, its outputs have mean 0 and variance 1.

    What a language model says of all items alike is most of its states (97 % of their length for SmolLM2-135M); taken
    off from the start, training need not spend its first epochs on it.
    """
    count, total, squares = 0, torch.zeros(1), torch.zeros(1)
    for piece in pieces:
        values = functional.layer_norm(piece.float(), norm.normalized_shape, eps=norm.eps).double()
        count += len(values)
        total = total + values.sum(0)
        squares = squares + values.square().sum(0)
    mean = total / count
    deviation = (squares / count - mean.square()).clamp(min=0).sqrt().clamp(min=_LEAST_DEVIATION)
    norm.weight.copy_(1 / deviation)
    norm.bias.copy_(-mean / deviation)
