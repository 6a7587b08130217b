"""What a run writes down beside its weights: `results.json` and where its numbers come from."""

import os
import resource
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch
from peft import PeftModel

from ..artifacts import sha256_of_json
from ..data import Interactions, LeaveOneOut, PromptEncoder

RESULTS_FILE = "results.json"
PACKAGES = ("peft_bituning", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "numpy")


def prompt_cuts(prompts: PromptEncoder, split: LeaveOneOut) -> dict[str, int]:
    """Count what had to be left out of the prompts of the test users and of the items."""
    prompts.reset_counts()
    for sample in split.samples("test"):
        prompts.encode(sample.history)
    return dict(prompts.counts)


def data_hash(data: Interactions) -> str:
    """Return the sha256 (hex) over item ids, user ids and histories, by which a resumed run knows its data."""
    return sha256_of_json(data.items.item_ids, [data.user_ids, data.histories])


def provenance(model: PeftModel, device: torch.device) -> dict[str, Any]:
    """Say with how many parameters, how much memory, which versions and on what the numbers were made.

    Args:
        model: the PEFT model.
        device: where it ran.

    Returns:
        `parameters`, `peak_memory_mb`, `versions`, `machine`.
    """
    trainable, total = model.get_nb_trainable_parameters()
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    if device.type == "cuda":
        peak["cuda"] = torch.cuda.max_memory_allocated(device) / 2**20
    return {
        "parameters": {"trainable": trainable, "total": total},
        "peak_memory_mb": peak,
        "versions": {name: version(name) for name in PACKAGES},
        "machine": {"cpu_cores": os.cpu_count(), "torch_threads": torch.get_num_threads(), "device": device.type},
    }


def weight_change(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> float:
    """Return the relative change of all weights together, `||right - left|| / ||left||`."""
    change = sum(float((right[name].double() - value.double()).square().sum()) for name, value in left.items())
    size = sum(float(value.double().square().sum()) for value in left.values())
    return (change / size) ** 0.5 if size else 0.0
