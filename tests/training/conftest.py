"""A run small enough to be made many times."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from peft_bituning import BiTuningConfig
from peft_bituning.base_models import BaseModel
from peft_bituning.data import Interactions
from peft_bituning.recommenders import Precomputed
from peft_bituning.serving import LaserRecommender
from peft_bituning.training import LaserArguments, fit

SMALL = {
    "num_virtual_tokens": 2,
    "num_experts": 2,
    "encoder_hidden_size": 16,
    "encoder_num_layers": 2,
    "encoder_num_attention_heads": 2,
}


@pytest.fixture(scope="session")
def embeddings() -> Precomputed:
    """Return collaborative embeddings of the ten items."""
    return Precomputed(torch.randn(10, 8, generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def train(
    few: Interactions, embeddings: Precomputed, tiny_base: Callable[[], BaseModel], tmp_path: Path
) -> Callable[..., LaserRecommender]:
    """Return a runner: `adapter={...}`, the ID recommender as `known`, settings of the run by name."""

    def run(
        folder: str = "output",
        adapter: dict[str, Any] | None = None,
        known: Any = "embeddings",
        data: Any = None,
        items: Any = None,
        base: Any = None,
        **changes: Any,
    ) -> LaserRecommender:
        settings: dict[str, Any] = {
            "stage1_epochs": 1,
            "stage2_epochs": 0,
            "per_device_train_batch_size": 8,
            "cuts": "last_cut",
            "template": "no_instruction",
            "learning_rate": 5e-3,
            "stage2_learning_rate": None,
            "logging_steps": 1,
            "disable_tqdm": True,
        }
        return fit(
            few if data is None else data,
            items,
            base or tiny_base(),
            BiTuningConfig(**{**SMALL, **(adapter or {})}),
            LaserArguments.paper(str(tmp_path / folder), **{**settings, **changes}),
            embeddings if known == "embeddings" else known,
        )

    return run


@pytest.fixture
def fresh_accelerate() -> Any:
    """Let a test choose another precision: accelerate keeps the first one of a process."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
