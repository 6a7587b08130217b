"""The prefix encoder interface and its registry."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ....errors import ConfigurationError, InputError
from ..config import BiTuningConfig


class Prefix(NamedTuple):
    """What a prefix encoder returns; a tuple, as DeepSpeed's hooks find the tensors of no other class.

    Args:
        embeddings: the prefix tokens [B, P, D]; None where P is 0.
        router_logits: the router's scores [B, N, K], zero at padding; None without a router.
        router_mask: the items that count in load balancing [B, N] bool; None without a router.
        is_shared: whether every row has the same prefix: it is then run through the language model once a batch.
    """

    embeddings: Tensor | None
    router_logits: Tensor | None = None
    router_mask: Tensor | None = None
    is_shared: bool = False


class PrefixEncoder(nn.Module):
    """Makes the prefix of each row; subclass it, and name it with `register_prefix_encoder`.

    A subclass says whether it reads a recommender (`needs_collaborative`), and which of its own parameters are virtual
    tokens (`token_parameters`), for a learning rate of their own.

    Args:
        config: the adapter's settings.
        token_dim: D.
        scale: standard deviation the prefix tokens start with.
    """

    needs_collaborative: bool = False
    token_parameters: tuple[str, ...] = ()

    def __init__(self, config: BiTuningConfig, token_dim: int, scale: float) -> None:
        super().__init__()
        self.config = config
        self.token_dim = token_dim
        self.scale = scale

    @property
    def num_tokens(self) -> int:
        """P, the number of prefix tokens."""
        return self.config.num_virtual_tokens

    def start_from(self, tokens: Tensor) -> None:
        """Start the prefix from given token embeddings; an encoder that can do so overrides this.

        Args:
            tokens: [P, D].

        Raises:
            ConfigurationError: this encoder's prefix cannot start from tokens.
        """
        raise ConfigurationError(
            f"prefix_token_ids must be None for prefix_encoder={self.config.prefix_encoder!r}, which has no "
            f"`start_from`, got {self.config.prefix_token_ids!r}"
        )

    def forward(
        self, batch_size: int, collaborative_embeds: Tensor | None, collaborative_mask: Tensor | None
    ) -> Prefix:
        """Make the prefix of every row.

        Args:
            batch_size: B.
            collaborative_embeds: `C_u` [B, N, C], zero at padding; None only where `needs_collaborative` is False.
            collaborative_mask: which items are real [B, N] bool, with `collaborative_embeds`.

        Returns:
            The prefix.
        """
        raise NotImplementedError


Encoder = TypeVar("Encoder", bound=type[PrefixEncoder])
_ENCODERS: dict[str, type[PrefixEncoder]] = {}


def register_prefix_encoder(name: str) -> Callable[[Encoder], Encoder]:
    """Class decorator that makes a prefix encoder available as `BiTuningConfig(prefix_encoder=name)`.

    Args:
        name: the name that adapter files carry; they never name a class path.

    Returns:
        The decorator.

    Raises:
        ConfigurationError: the name belongs to another class.
    """

    def register(encoder: Encoder) -> Encoder:
        known = _ENCODERS.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (encoder.__module__, encoder.__qualname__):
            raise ConfigurationError(
                f"prefix encoder names must be unique, got {name!r}, which {known.__module__}.{known.__qualname__} "
                "already has"
            )
        _ENCODERS[name] = encoder
        return encoder

    return register


def prefix_encoders() -> tuple[str, ...]:
    """Return the names of the registered prefix encoders."""
    return tuple(sorted(_ENCODERS))


def prefix_encoder_class(name: str) -> type[PrefixEncoder]:
    """Return the class that is registered under a name.

    Args:
        name: as in `BiTuningConfig.prefix_encoder`.

    Raises:
        ConfigurationError: the name is not registered.
    """
    if name not in _ENCODERS:
        raise ConfigurationError(
            f"prefix_encoder must be one of {', '.join(prefix_encoders())}, got {name!r}; "
            "import the module that registers it before loading the adapter"
        )
    return _ENCODERS[name]


def build_prefix_encoder(config: BiTuningConfig, token_dim: int, scale: float) -> PrefixEncoder:
    """Make the prefix encoder that a configuration names.

    Args:
        config: the adapter's settings.
        token_dim: D.
        scale: standard deviation the prefix tokens start with.

    Returns:
        A freshly initialised encoder.

    Raises:
        ConfigurationError: the name is not registered, or `collaborative_dim` is missing.
    """
    encoder = prefix_encoder_class(config.prefix_encoder)
    if encoder.needs_collaborative and config.collaborative_dim is None:
        raise ConfigurationError(
            f"collaborative_dim must be set for prefix_encoder={config.prefix_encoder!r}, got None; give the width "
            "of the recommender's embeddings (`recommender.embedding_dim`)"
        )
    return encoder(config, token_dim, scale)


def check_collaborative(
    encoder: PrefixEncoder, batch_size: int, embeds: Tensor | None, mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Check the collaborative inputs of a batch and make padding inert.

    Args:
        encoder: who will read them.
        batch_size: B.
        embeds: `C_u` [B, N, C]; padding may hold anything, NaN too.
        mask: which items are real [B, N], int or bool; None means all of them.

    Returns:
        `C_u` in the encoder's type, zero at padding, and the mask as bool; (None, None) where the encoder reads none.

    Raises:
        InputError: they are missing, of the wrong shape, or not finite.
    """
    if not encoder.needs_collaborative:
        return None, None
    name, width = encoder.config.prefix_encoder, encoder.config.collaborative_dim
    if embeds is None:
        raise InputError(
            f"collaborative_embeds must be given to prefix_encoder={name!r}, got None; pass the recommender's "
            f"embeddings [B, N, {width}], and a collaborative_mask of zeros for rows that have none"
        )
    if embeds.ndim != 3 or embeds.shape[0] != batch_size or embeds.shape[2] != width:
        raise InputError(
            f"collaborative_embeds must be [B, N, C] = [{batch_size}, N, {width}], got {list(embeds.shape)}; "
            "pass those of the recommender that the adapter was made for, or set collaborative_dim to its embedding_dim"
        )
    if mask is None:
        mask = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    if mask.shape != embeds.shape[:2]:
        raise InputError(
            f"collaborative_mask must be [B, N] = {list(embeds.shape[:2])}, got {list(mask.shape)}; give one value an "
            "item of collaborative_embeds, 0 at padding"
        )
    if embeds.shape[1] == 0:
        embeds, mask = embeds.new_zeros(batch_size, 1, embeds.shape[2]), mask.new_zeros(batch_size, 1)
    mask = mask.bool()
    dtype = next((parameter.dtype for parameter in encoder.parameters()), torch.float32)
    embeds = embeds.to(dtype).masked_fill(~mask.unsqueeze(-1), 0.0)
    if not torch.compiler.is_compiling() and not bool(torch.isfinite(embeds).all()):
        rows = torch.nonzero(~torch.isfinite(embeds).flatten(1).all(1)).flatten().tolist()
        raise InputError(
            f"collaborative_embeds must be finite at real items, got NaN or infinity in rows {rows[:10]}; check the "
            "recommender they come from"
        )
    return embeds, mask


def drop_collaborative(encoder: PrefixEncoder, mask: Tensor) -> Tensor:
    """Hide all items of some training rows, so that the encoder learns to do without.

    Args:
        encoder: its `config.collaborative_dropout` is the share of rows, its `training` switches this on.
        mask: [B, N] bool.

    Returns:
        The mask with the rows that were drawn set to False.
    """
    rate = encoder.config.collaborative_dropout
    if not encoder.training or rate == 0.0:
        return mask
    return mask & (torch.rand(mask.shape[0], 1, device=mask.device) >= rate)


def fill_cold_rows(embeds: Tensor, mask: Tensor, null: Tensor) -> tuple[Tensor, Tensor]:
    """Give rows without any item the learned `null` vector as their only item.

    Args:
        embeds: `C_u` [B, N, C], zero at padding.
        mask: [B, N] bool.
        null: [C].

    Returns:
        `C_u` and mask in which every row has at least one item.
    """
    first = torch.arange(mask.shape[1], device=mask.device) == 0  # [N]
    slot = ~mask.any(1, keepdim=True) & first  # [B, N]
    return torch.where(slot.unsqueeze(-1), null, embeds), mask | slot


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Average over the real items of each row.

    Args:
        values: [B, N, X].
        mask: [B, N] bool; every row has at least one item.

    Returns:
        [B, X].
    """
    weights = mask.unsqueeze(-1).to(values.dtype)
    return (values * weights).sum(1) / weights.sum(1)
