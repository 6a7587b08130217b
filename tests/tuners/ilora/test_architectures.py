"""Language models of every kind: the rows of a batch keep their gates apart."""

from collections.abc import Callable

import pytest
import torch

from ..architectures import ARCHITECTURES, Architecture
from .conftest import alone

QUICK = ["OPT", "Mixtral", "DeepSeek-V3", "Gemma 4", "Mamba", "RWKV"]  # the others wait for `-m slow`


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(each, marks=() if each.name in QUICK else pytest.mark.slow, id=each.name) for each in ARCHITECTURES],
)
def test_other_kinds_keep_rows_apart_too(
    architecture: Architecture, make_model: Callable, make_inputs: Callable
) -> None:
    """Flattened tokens, mixtures of experts, per-layer embeddings, recurrence: everything in architectures.py."""
    # Its router is a linear layer that returns a pair, which no LoRA of PEFT can wrap.
    changes = {"exclude_modules": ["router"]} if architecture.name == "Phi-MoE" else {}
    model, inputs = make_model(architecture.build(), **changes), make_inputs()
    with torch.no_grad():
        together = model(**inputs).pooler_output
        singles = torch.cat([model(**alone(inputs, row)).pooler_output for row in range(3)])
        other = model(**(inputs | {"collaborative_embeds": -inputs["collaborative_embeds"]})).pooler_output
    assert float((together - singles).abs().max()) < 1e-5 * max(1.0, float(together.abs().max()))
    assert ((together - other).abs().amax(1)[:2] > 1e-3).all()
    torch.testing.assert_close(together[2], other[2])  # a row without items
