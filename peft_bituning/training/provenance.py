"""Provenance of a run's numbers: parameters, memory, versions, machine, prompts."""

import os
import resource
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch

from ..data import LeaveOneOut, PromptEncoder
from ..tuners.rows.embedding_model import EmbeddingModel

PACKAGES = ("peft_bituning", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "numpy")


def provenance(model: EmbeddingModel, device: torch.device) -> dict[str, Any]:
    """Say with how many `parameters`, which `peak_memory_mb`, `versions` and `machine` numbers were made.

    Args:
        model: what was trained.
        device: where it ran.
    """
    trainable, total = count_parameters(model)
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    if device.type == "cuda":
        peak["cuda"] = torch.cuda.max_memory_allocated(device) / 2**20
    return {
        "parameters": {"trainable": trainable, "total": total},
        "peak_memory_mb": peak,
        "versions": {name: version(name) for name in PACKAGES},
        "machine": {"cpu_cores": os.cpu_count(), "torch_threads": torch.get_num_threads(), "device": device.type},
    }


def count_parameters(model: EmbeddingModel) -> tuple[int, int]:
    """Return how many weights are trained, and how many there are with the frozen ones."""
    sizes = [(each.numel(), each.requires_grad) for each in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def prompt_cuts(prompts: PromptEncoder, split: LeaveOneOut) -> dict[str, int]:
    """Count what had to be left out of the prompts of the test users."""
    prompts.reset_counts()
    for sample in split.samples("test"):
        prompts.encode(sample.history)
    return dict(prompts.counts)


def weight_change(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> float:
    """Return the relative change of all weights together, `||right - left|| / ||left||`."""
    change = sum(float((right[name].double() - value.double()).square().sum()) for name, value in left.items())
    size = sum(float(value.double().square().sum()) for value in left.values())
    return (change / size) ** 0.5 if size else 0.0
