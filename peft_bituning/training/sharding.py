"""The processes of a run: how it was launched, and frozen weights in shards (FSDP2) around an adapter that is whole."""

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, is_torch_version
from torch import nn

from ..errors import ConfigurationError
from ..launch import launched_state
from ..tuners.bituning.layer import VirtualTokens
from .arguments import LaserArguments


def launched_accelerator(arguments: LaserArguments) -> Accelerator:
    """Make the accelerator of a run, as it was launched.

    Raises:
        ConfigurationError: the tracker is not installed, or the launcher is none that training works with.
    """
    tracker = arguments.log_with
    installed = [str(name) for name in get_available_trackers()]
    if isinstance(tracker, str) and tracker not in installed:
        raise ConfigurationError(
            f"log_with must be an installed tracker ({', '.join(installed) or 'there is none'}), got {tracker!r}; "
            "install it, or leave log_with out: results.json holds the curves too"
        )
    launched_state()
    precision, folder = arguments.mixed_precision, arguments.output_dir
    accelerator = Accelerator(mixed_precision=precision, log_with=tracker, project_dir=folder)
    check_launcher(accelerator)
    return accelerator


def check_launcher(accelerator: Accelerator) -> None:
    """Refuse kinds of distributed runs that `fit` does not train under, before any work is done.

    Raises:
        ConfigurationError: DeepSpeed, FSDP1, or FSDP2 with weights that only the first process loads, or with a PyTorch
            that cannot leave the adapter whole.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ConfigurationError(
            "distributed_type must be NO, MULTI_GPU, MULTI_CPU or FSDP (version 2) for fit, got DEEPSPEED; take "
            "examples/configs/accelerate/fsdp2.yaml, or transformers.Trainer, which runs under DeepSpeed"
        )
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    if not accelerator.is_fsdp2:
        raise ConfigurationError("fsdp_version must be 2, got 1; take examples/configs/accelerate/fsdp2.yaml")
    if is_torch_version("<", "2.7.0"):  # accelerate would shard the adapter too, without a word
        raise ConfigurationError(f"torch must be >= 2.7 for FSDP2, got {torch.__version__}; update it, or use DDP")
    if accelerator.state.fsdp_plugin.cpu_ram_efficient_loading:
        raise ConfigurationError(
            "fsdp_cpu_ram_efficient_loading must be false, got true: every process draws the adapter's first weights "
            "from the base model's embeddings; take examples/configs/accelerate/fsdp2.yaml"
        )


def prepare_model(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """Hand a model over to accelerate: one process, DDP, or FSDP2; see `check_launcher`.

    Under FSDP2 the frozen weights are sharded in place, and the adapter is not: it is small, and saved and loaded as
    everywhere else.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return accelerator.prepare(model)
    layers = [module for module in model.modules() if isinstance(module, VirtualTokens)]
    accelerator.state.fsdp_plugin.ignored_modules = layers
    # accelerate takes no model alone under FSDP2; every stage makes an optimizer of its own later.
    prepared, _ = accelerator.prepare(model, torch.optim.SGD(_trainable(model), lr=0.0))
    return prepared


def average_gradients(accelerator: Accelerator, model: nn.Module) -> None:
    """Take the mean of the adapter's gradients over the processes where FSDP2 does not, as DDP does."""
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    for parameter in _trainable(model):
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = accelerator.reduce(gradient, reduction="mean")


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
