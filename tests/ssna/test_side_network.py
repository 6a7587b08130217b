"""The chain of adapters against numpy written out by hand."""

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_bituning.ssna import SideAdapter, SideNetwork

ERF = np.vectorize(math.erf)


def weights_of(network):
    return {name: tensor.detach().double().numpy() for name, tensor in network.named_parameters()}


def layer_norm(values, weight, bias):
    centred = values - values.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weight + bias


def chain(weights, states):
    """h_j = h_{j-1} + up(GELU(down(LayerNorm(state_j) + h_{j-1}))), then the last norm and the projection."""
    hidden = np.zeros_like(states[:, 0])
    for link in range(states.shape[1]):
        own = {name.split(".", 2)[2]: value for name, value in weights.items() if name.startswith(f"adapters.{link}.")}
        inner = layer_norm(states[:, link], own["norm.weight"], own["norm.bias"]) + hidden
        inner = inner @ own["down.weight"].T + own["down.bias"]
        inner = 0.5 * inner * (1 + ERF(inner / math.sqrt(2)))
        hidden = hidden + inner @ own["up.weight"].T + own["up.bias"]
    normed = layer_norm(hidden, weights["norm.weight"], weights["norm.bias"])
    return normed @ weights["projection.weight"].T + weights["projection.bias"]


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 4), st.integers(1, 7), st.integers(1, 5), st.integers(0, 10**6))
def test_the_chain_equals_numpy(layers, width, bottleneck, seed):
    generator = torch.Generator().manual_seed(seed)
    network = SideNetwork(layers, width, bottleneck, 3, dropout=0.4).double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(generator=generator)
    states = torch.randn(5, layers, width, generator=generator, dtype=torch.float64) * 30
    assert np.allclose(network(states).detach().numpy(), chain(weights_of(network), states.numpy()), atol=1e-9)


def test_every_layer_and_the_order_of_layers_count():
    torch.manual_seed(0)
    network = SideNetwork(3, 6, 4, 5).eval()
    states = torch.randn(2, 3, 6)
    embeddings = network(states)
    for layer in range(3):
        changed = states.clone()
        changed[:, layer] = torch.randn(2, 6)
        assert not torch.allclose(network(changed), embeddings, atol=1e-4)
    assert not torch.allclose(network(states.flip(1)), embeddings, atol=1e-4)


def test_an_adapter_reads_what_the_layers_below_said():
    """Were the links side by side, an adapter would add the same whatever came before."""
    torch.manual_seed(0)
    adapter = SideAdapter(6, 4).eval()
    state, hidden = torch.randn(3, 6), torch.randn(3, 6)
    added = adapter(state, hidden) - hidden
    assert not torch.allclose(adapter(state, 2 * hidden) - 2 * hidden, added, atol=1e-3)
    with torch.no_grad():
        adapter.up.weight.zero_()
        adapter.up.bias.zero_()
    assert torch.equal(adapter(state, hidden), hidden)


def test_every_weight_has_a_gradient_and_the_states_have_none():
    network = SideNetwork(2, 6, 4, 5, dropout=0.1)
    states = torch.randn(3, 2, 6)
    network(states).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert states.grad is None


def test_items_without_text_are_embedded_alike():
    embeddings = SideNetwork(2, 6, 4, 5).eval()(torch.zeros(2, 2, 6))
    assert embeddings.isfinite().all() and torch.allclose(embeddings[0], embeddings[1])


def test_the_start_standardises_every_layer_and_keeps_a_scale_for_any_width():
    torch.manual_seed(0)
    for width in (16, 256):
        states = torch.randn(40, 3, width) + 20 * torch.randn(3, width)
        network = SideNetwork(3, width, 8, 32).eval()
        network.start(states, chunk_size=7)
        for place, adapter in enumerate(network.adapters):
            normed = adapter.norm(states[:, place])
            assert normed.mean(0).abs().max() < 1e-3 and (normed.std(0) - 1).abs().max() < 0.05
        assert 0.05 < float(network(states).detach().std()) < 0.2
