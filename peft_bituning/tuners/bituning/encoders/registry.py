"""The registry of prefix encoders: classes by the names that settings and files carry."""

from collections.abc import Callable
from typing import TypeVar

from ....errors import ConfigurationError
from ..config import BiTuningConfig
from .base import PrefixEncoder

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
        config: the adapter's settings; sizes that are None are filled in.
        token_dim: D.
        scale: standard deviation the prefix tokens start with.

    Returns:
        A freshly initialised encoder.

    Raises:
        ConfigurationError: the name is not registered, or `collaborative_dim` is missing.
    """
    encoder = prefix_encoder_class(config.prefix_encoder)
    config.fill_sizes(token_dim)
    return encoder(config, token_dim, scale)
