"""What a run writes down beside its weights: `results.json` and where its numbers come from."""

import json
import os
import resource
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

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
    return data.content_hash


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


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that a kill leaves the old file or the new one."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def to_json(value: Any) -> Any:
    """Return a value as JSON gives it back: sets as sorted lists, what JSON does not know as text."""
    return json.loads(json.dumps(value, default=lambda other: sorted(other) if isinstance(other, set) else str(other)))
