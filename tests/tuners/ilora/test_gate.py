"""The gate: what it reads, what it makes of rows without items, and what it refuses."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_bituning import ILoRAConfig
from peft_bituning.errors import ConfigurationError
from peft_bituning.tuners.ilora.gate import InstanceGate


def make_gate(seed: int = 0, **changes: object) -> InstanceGate:
    torch.manual_seed(seed)
    return InstanceGate(ILoRAConfig(collaborative_dim=6, **changes)).eval()  # type: ignore[arg-type]


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 6), st.sampled_from(["last", "mean"]))
def test_gates_against_numpy(seed: int, count: int, items: int, pooling: str) -> None:
    gate = make_gate(seed % 7, gate_pooling=pooling)
    generator = np.random.default_rng(seed)
    embeds = generator.normal(size=(count, items, 6)).astype(np.float32)
    mask = generator.random((count, items)) < 0.5  # holes, and rows with nothing
    found = gate(*gate.read(count, torch.tensor(embeds), torch.tensor(mask))).detach().numpy()
    weight, null = gate.weight.detach().numpy(), gate.null.detach().numpy()
    for row in range(count):
        real = embeds[row][mask[row]]
        state = null if not len(real) else real[-1] if pooling == "last" else real.mean(0)
        scores = np.exp(weight @ state)
        np.testing.assert_allclose(found[row], scores / scores.sum(), rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-6)


def test_no_items_at_all_is_null() -> None:
    gate = make_gate()
    expected = gate(*gate.read(2, torch.randn(2, 3, 6), torch.zeros(2, 3)))
    torch.testing.assert_close(gate(*gate.read(2, torch.zeros(2, 0, 6), torch.zeros(2, 0))), expected)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_padding_is_inert_whatever_it_holds(garbage: float) -> None:
    gate, mask = make_gate(gate_pooling="mean"), torch.tensor([[1, 1, 0], [0, 0, 0]])
    embeds = torch.randn(2, 3, 6)
    expected = gate(*gate.read(2, embeds, mask))
    spoilt = embeds.masked_fill(mask.unsqueeze(-1) == 0, garbage)
    assert torch.equal(gate(*gate.read(2, spoilt, mask.bool())), expected)


def test_collaborative_dropout_is_for_training() -> None:
    gate, embeds = make_gate(collaborative_dropout=0.999), torch.randn(4, 3, 6)
    cold = gate(*gate.read(4, embeds, torch.zeros(4, 3)))
    torch.manual_seed(0)
    assert torch.equal(gate.train()(*gate.read(4, embeds, None)), cold)
    assert not torch.allclose(gate.eval()(*gate.read(4, embeds, None)), cold)


def test_every_weight_has_a_gradient_in_every_batch() -> None:
    """Processes that train together wait for all of them, `null` too where no row is cold."""
    gate = make_gate()
    for mask in (torch.ones(2, 3), torch.zeros(2, 3)):
        gate.zero_grad()
        gate(*gate.read(2, torch.randn(2, 3, 6), mask))[:, 0].sum().backward()
        assert all(each.grad is not None for each in gate.parameters())


def test_it_needs_to_know_the_width(make_model: Callable) -> None:
    with pytest.raises(ConfigurationError, match="collaborative_dim must be set for iLoRA, got None; give the width"):
        make_model(collaborative_dim=None)
