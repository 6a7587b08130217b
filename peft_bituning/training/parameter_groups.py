"""Learning rates apart for the prefix tokens, the suffix and everything else."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..errors import ConfigurationError
from ..tuners.bituning import PrefixEncoder
from ..tuners.bituning.layer import VirtualTokens
from .arguments import LaserArguments


def parameter_groups(model: nn.Module, rate: float, arguments: LaserArguments) -> list[dict[str, Any]]:
    """Sort what is trained into groups for an optimizer.

    Args:
        model: the model with its adapter; weights without a gradient are left out.
        rate: learning rate of what is neither prefix token nor suffix, such as the M-Former.
        arguments: `prefix_lr_ratio` and `suffix_lr_ratio` multiply it for these.

    Returns:
        One group where the ratios are 1; otherwise the rest, which may be nothing, the prefix tokens (an encoder's
        `token_parameters`) and the suffix.

    Raises:
        ConfigurationError: a ratio for what the model does not train.
    """
    ratios = {"prefix_lr_ratio": arguments.prefix_lr_ratio, "suffix_lr_ratio": arguments.suffix_lr_ratio}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if all(ratio == 1 for ratio in ratios.values()):
        return [{"params": trained, "lr": rate}]
    tokens = dict(zip(ratios, (_prefix_tokens(model), _suffixes(model)), strict=True))
    apart = {name: [each for each in found if each.requires_grad] for name, found in tokens.items()}
    if missing := [name for name, ratio in ratios.items() if ratio != 1 and not apart[name]]:
        raise ConfigurationError(
            f"{' and '.join(missing)} must be 1 for an adapter that trains no such tokens, got "
            f"{', '.join(str(ratios[name]) for name in missing)}"
        )
    taken = {id(parameter) for group in apart.values() for parameter in group}
    rest = [parameter for parameter in trained if id(parameter) not in taken]
    return [{"params": rest, "lr": rate}, *({"params": apart[name], "lr": rate * ratios[name]} for name in ratios)]


def _prefix_tokens(model: nn.Module) -> Iterable[nn.Parameter]:
    encoders = [module for module in model.modules() if isinstance(module, PrefixEncoder)]
    named = [getattr(encoder, name) for encoder in encoders for name in encoder.token_parameters]
    return [parameter for parameter in named if parameter is not None]


def _suffixes(model: nn.Module) -> Iterable[nn.Parameter]:
    layers = [module for module in model.modules() if isinstance(module, VirtualTokens)]
    return [parameter for layer in layers for parameter in layer.bituning_suffix.parameters()]
