"""A retriever whose scores are known, and prompts over the ten items."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench.candidates import LETTERS, TITLES, CandidatePrompts, Retriever
from bench.plan import DEFAULTS
from tokenizers import decoders
from torch import Tensor

from peft_bituning.base_models import BaseModel
from peft_bituning.data import Interactions, LeaveOneOut
from peft_bituning.evaluation import history_scorer
from peft_bituning.training import LaserArguments


@dataclass(frozen=True)
class ByLastItem:
    """Scores the catalog by a table's row of the last item."""

    table: Tensor  # [I, I]

    @property
    def num_items(self) -> int:
        return len(self.table)

    def scores(self, item_indices: Tensor, mask: Tensor) -> Tensor:
        last = item_indices.gather(1, mask.long().sum(1, keepdim=True) - 1)[:, 0]
        return self.table[last]


@pytest.fixture(scope="session")
def table() -> np.ndarray:
    """Return scores of the ten items after each of them, no two the same."""
    return np.random.default_rng(0).permutation(100).reshape(10, 10).astype(np.float32)


@pytest.fixture
def make_retriever(table: np.ndarray) -> Callable[..., Retriever]:
    """Return a maker of retrievers that read the table."""

    def make(size: int = 4, seed: str = "s", values: Any = None) -> Retriever:
        scores = torch.tensor(table if values is None else values)
        return Retriever(history_scorer(ByLastItem(scores)), size, seed)

    return make


@pytest.fixture
def make_base(tiny_base: Callable[[], BaseModel]) -> Callable[[], BaseModel]:
    """Return a maker of the tiny base model whose tokenizer also writes text."""

    def make() -> BaseModel:
        base = tiny_base()
        base.tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
        return base

    return make


@pytest.fixture
def split(few: Interactions) -> LeaveOneOut:
    return LeaveOneOut(few.histories)


@pytest.fixture
def make_prompts(few: Interactions, make_base: Callable[[], BaseModel]) -> Callable[..., CandidatePrompts]:
    """Return a maker of prompts over the ten items."""

    def make(kind: str = "letters", items: Any = None, size: int = 4, max_length: int = 512, **limits: Any) -> Any:
        choice = {"letters": LETTERS, "titles": TITLES}[kind]
        return CandidatePrompts(choice, make_base().tokenizer, items or few.items, size, max_length, **limits)

    return make


@pytest.fixture
def make_arguments(tmp_path: Path) -> Callable[..., LaserArguments]:
    """Return a maker of settings of short runs."""

    def make(**changes: Any) -> LaserArguments:
        settings: dict[str, Any] = {
            "output_dir": str(tmp_path / "output"),
            "stage1_epochs": 2,
            "stage2_epochs": 1,
            "max_samples_per_epoch": 6,
            "per_device_train_batch_size": 3,
            "learning_rate": 5e-3,
            "save_steps": 1,
            "logging_steps": 1,
            "disable_tqdm": True,
        }
        return LaserArguments(**{**DEFAULTS, **settings, **changes})

    return make
