"""M-Former against Eqs. 5-7 of the paper in numpy float64, its size, and the three gradients of its router."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from peft_bituning import BiTuningConfig
from peft_bituning.errors import ConfigurationError
from peft_bituning.losses import catalog_contrastive_loss
from peft_bituning.tuners.bituning.encoders import MFormer, build_prefix_encoder
from peft_bituning.tuners.bituning.encoders.mformer import row_scores

Config = Callable[..., BiTuningConfig]


def reference_scores(logits: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Compute r [B, K] item by item: softmax over experts (Eq. 6), mean over the row's real items (Eq. 7)."""
    scores = np.zeros((logits.shape[0], logits.shape[2]))
    for row in range(logits.shape[0]):
        items = [logits[row, item] for item in range(logits.shape[1]) if mask[row, item]]
        scores[row] = np.mean([np.exp(item) / np.exp(item).sum() for item in items], axis=0)
    return scores


def make(config: BiTuningConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> MFormer:
    torch.manual_seed(seed)
    encoder = build_prefix_encoder(config, 32, 0.2).to(dtype).eval()
    assert isinstance(encoder, MFormer)
    torch.nn.init.normal_(encoder.router.weight)
    return encoder


def example(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Return `C_u` [5, 4, 6] and its mask, with a holed row and a row without items."""
    embeds = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 1], [1, 0, 1, 0], [0, 0, 0, 0]])
    return embeds, mask.bool()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 4), items=st.integers(1, 6), experts=st.integers(1, 6))
def test_row_scores_are_the_papers_equations(seed: int, rows: int, items: int, experts: int) -> None:
    random = np.random.default_rng(seed)
    logits = random.normal(size=(rows, items, experts), scale=2)
    mask = random.random((rows, items)) < 0.6
    mask[:, random.integers(items)] = True
    found = row_scores(torch.tensor(logits), torch.tensor(mask))
    np.testing.assert_allclose(found, reference_scores(logits, mask), rtol=1e-12)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-12)


def test_router_and_expert_choice_against_numpy(make_config: Config) -> None:
    encoder = make(make_config())
    embeds, mask = example()
    prefix = encoder(5, *encoder.read(5, embeds, mask))
    weights, null = encoder.router.weight.detach().numpy(), encoder.null.detach().numpy()
    assert weights.shape == (4, 6)  # [K, C], no bias
    assert encoder.router.bias is None
    logits = embeds.numpy() @ weights.T  # Eq. 5
    np.testing.assert_allclose(prefix.router_logits[mask].detach(), logits[mask], rtol=1e-12)
    assert (prefix.router_logits[~mask] == 0).all()
    assert torch.equal(prefix.router_mask, mask)
    rows, filled = embeds.numpy().copy(), mask.numpy().copy()
    rows[4, 0], filled[4, 0] = null, True  # the cold row has the null vector as its only item
    best = reference_scores(rows @ weights.T, filled).argmax(1)
    assert len(set(best.tolist())) > 1
    for row, expert in enumerate(best):
        items = torch.tensor(rows[row][filled[row]])[None]  # only the real ones: masking must change nothing
        states = encoder.qformer(query_embeds=encoder.queries[expert][None], encoder_hidden_states=items)
        expected = encoder.projection(states.last_hidden_state)[0]
        torch.testing.assert_close(prefix.embeddings[row], expected, rtol=1e-9, atol=1e-12)


def test_the_papers_size_counted_by_hand() -> None:
    c, d, h, k, p, blocks = 64, 4096, 768, 8, 32, 12
    config = BiTuningConfig.paper(collaborative_dim=c)
    assert (config.num_experts, config.num_virtual_tokens, config.encoder_hidden_size) == (k, p, h)
    norm = 2 * h
    self_attention = 4 * (h * h + h) + norm  # query, key, value, output
    cross_attention = 2 * (h * h + h) + 2 * (c * h + h) + norm  # query and output; key and value from C
    feed_forward = (h * 4 * h + 4 * h) + (4 * h * h + h) + norm
    assert (self_attention, cross_attention, feed_forward) == (2_363_904, 1_282_560, 4_723_968)
    stack = norm + blocks * (self_attention + feed_forward) + blocks // 2 * cross_attention
    assert stack == 92_751_360
    ours = k * c + c + k * p * h + (h * d + d)  # router, null, experts, projection
    assert ours == 512 + 64 + 196_608 + 3_149_824
    with torch.device("meta"):
        encoder = build_prefix_encoder(config, d, 0.02)
    assert isinstance(encoder, MFormer)
    counts = {name: sum(each.numel() for each in module.parameters()) for name, module in encoder.named_children()}
    assert counts == {"router": k * c, "qformer": stack, "projection": h * d + d}
    assert encoder.queries.shape == (k, p, h)
    assert sum(parameter.numel() for parameter in encoder.parameters()) == stack + ours == 96_098_368


def test_straight_through_and_none_are_the_same_forward(make_config: Config) -> None:
    embeds, mask = example(dtype=torch.float32)
    prefixes = []
    for gradient in ("straight_through", "none", "switch"):
        encoder = make(make_config(router_gradient=gradient), dtype=torch.float32)
        prefixes.append(encoder(5, *encoder.read(5, embeds, mask)).embeddings)
    assert torch.equal(prefixes[0], prefixes[1])  # bit for bit
    encoder = make(make_config(), dtype=torch.float32)
    rows, filled = embeds.clone(), mask.clone()
    rows[4, 0], filled[4, 0] = encoder.null.detach(), True
    best = row_scores(encoder.router(rows), filled).max(-1).values
    torch.testing.assert_close(prefixes[2], prefixes[1] * best.view(-1, 1, 1))


def router_gradient(encoder: MFormer, direction: Tensor) -> Tensor | None:
    embeds, mask = example()
    (encoder(5, embeds.masked_fill(~mask.unsqueeze(-1), 0), mask).embeddings * direction).sum().backward()
    return encoder.router.weight.grad


def test_router_gradient_by_the_chain_rule(make_config: Config) -> None:
    """`switch` differentiates r_max * prefix, `straight_through` log r_max * prefix, `none` nothing."""
    direction = torch.randn(5, 3, 32, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    none = make(make_config(router_gradient="none"))
    assert router_gradient(none, direction) is None
    straight, switch = (make(make_config(router_gradient=name)) for name in ("straight_through", "switch"))
    found = {name: router_gradient(each, direction) for name, each in (("st", straight), ("sw", switch))}
    embeds, mask = example()
    rows, filled = embeds.clone(), mask.clone()
    rows[4, 0], filled[4, 0] = none.null.detach(), True
    prefix = none(5, embeds.masked_fill(~mask.unsqueeze(-1), 0), mask).embeddings.detach()
    weight = none.router.weight.detach().requires_grad_()
    best = row_scores(rows @ weight.T, filled).max(-1).values
    for name, factor in (("st", best.log()), ("sw", best)):
        (expected,) = torch.autograd.grad((factor * (prefix * direction).sum((1, 2))).sum(), weight, retain_graph=True)
        gradient = found[name]
        assert gradient is not None and gradient.abs().min() > 0
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


def test_switch_agrees_with_a_finite_difference(make_config: Config) -> None:
    direction = torch.randn(5, 3, 32, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    encoder = make(make_config(router_gradient="switch"))
    gradient = router_gradient(encoder, direction)
    assert gradient is not None
    embeds, mask = example()
    step, weight = 1e-6, encoder.router.weight.data

    def loss() -> float:
        with torch.no_grad():
            return float((encoder(5, embeds.masked_fill(~mask.unsqueeze(-1), 0), mask).embeddings * direction).sum())

    for position in np.ndindex(*weight.shape):
        start = float(weight[position])
        values = []
        for moved in (start + step, start - step):
            weight[position] = moved
            values.append(loss())
        weight[position] = start
        assert float(gradient[position]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-2, abs=1e-9)


@pytest.mark.parametrize("gradient", ["straight_through", "switch", "none"])
def test_recommendation_loss_reaches_the_router_through_the_language_model(
    gradient: str, make_model: Callable, make_inputs: Callable
) -> None:
    torch.manual_seed(0)
    # GPT-2 stays in float64 throughout; Llama's norms compute in float32, too coarse for finite differences.
    llm = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4))
    model = make_model(llm, router_gradient=gradient).double()
    inputs = make_inputs()
    table = torch.randn(9, 32, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    targets = torch.tensor([0, 4, 8])

    def loss() -> Tensor:
        return catalog_contrastive_loss(model(**inputs).pooler_output, table, targets)

    loss().backward()
    router = model.base_model.prefix_encoder.router.weight
    if gradient == "none":
        assert router.grad is None
        return
    assert router.grad.abs().sum() > 0
    if gradient == "switch":
        for position in ((0, 0), (1, 3), (3, 5)):
            step, start, values = 1e-6, float(router.data[position]), []
            for moved in (start + step, start - step):
                router.data[position] = moved
                values.append(loss().item())
            router.data[position] = start
            expected = (values[0] - values[1]) / (2 * step)
            assert float(router.grad[position]) == pytest.approx(expected, rel=1e-2, abs=1e-9)


def test_load_balancing_reaches_the_router_whatever_the_mode(make_model: Callable, make_inputs: Callable) -> None:
    model = make_model(router_gradient="none")
    out = model(**make_inputs())
    out.aux_loss.backward()
    assert model.base_model.prefix_encoder.router.weight.grad.abs().sum() > 0


def test_experts_that_no_row_chose_have_a_zero_gradient_not_none(make_config: Config) -> None:
    encoder = make(make_config())
    embeds, mask = example()
    out = encoder(1, embeds[:1], mask[:1])
    out.embeddings.sum().backward()
    assert encoder.queries.grad is not None
    assert (encoder.queries.grad.abs().sum((1, 2)) > 0).sum() == 1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_is_inert_under_both_attention_kernels(make_config: Config, attention: str) -> None:
    encoder = make(make_config(), dtype=torch.float32)
    encoder.qformer.config._attn_implementation = attention
    embeds, mask = example(dtype=torch.float32)
    expected = encoder(5, *encoder.read(5, embeds, mask)).embeddings
    for garbage in (float("nan"), float("inf"), -float("inf"), 1e30):
        spoilt = embeds.masked_fill(~mask.unsqueeze(-1), garbage)
        assert torch.equal(encoder(5, *encoder.read(5, spoilt, mask)).embeddings, expected)
    for row in range(4):
        real = embeds[row][mask[row]][None]
        alone = encoder(1, *encoder.read(1, real, None)).embeddings[0]
        torch.testing.assert_close(alone, expected[row], rtol=1e-4, atol=1e-6)


def test_cross_attention_stands_in_every_nth_block(make_config: Config) -> None:
    encoder = make(make_config(encoder_num_layers=5, encoder_cross_attention_frequency=2))
    assert [layer.has_cross_attention for layer in encoder.qformer.encoder.layer] == [True, False, True, False, True]
    wide = make(make_config(encoder_intermediate_size=24))
    assert wide.qformer.encoder.layer[0].intermediate_query.dense.weight.shape == (24, 16)


def test_collaborative_dim_is_needed(make_config: Config) -> None:
    with pytest.raises(
        ConfigurationError, match="collaborative_dim must be set for prefix_encoder='mformer', got None"
    ):
        build_prefix_encoder(make_config(collaborative_dim=None), 32, 0.02)
