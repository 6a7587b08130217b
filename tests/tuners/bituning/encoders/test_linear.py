"""The linear encoder against its formula."""

from collections.abc import Callable

import numpy as np
import torch

from peft_bituning import BiTuningConfig
from peft_bituning.tuners.bituning.encoders import LinearEncoder, build_prefix_encoder


def test_it_projects_the_mean_of_the_real_items(make_config: Callable[..., BiTuningConfig]) -> None:
    encoder = build_prefix_encoder(make_config(prefix_encoder="linear"), 8, 0.2).double()
    assert isinstance(encoder, LinearEncoder)
    embeds = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]])
    prefix = encoder(3, *encoder.read(3, embeds.masked_fill(mask.unsqueeze(-1) == 0, torch.nan), mask))
    weight, bias = encoder.projection.weight.detach().numpy(), encoder.projection.bias.detach().numpy()
    pooled = [embeds[0, [0, 2, 3]].mean(0).numpy(), embeds[1, 1].numpy(), encoder.null.detach().numpy()]
    expected = np.stack([(weight @ row + bias).reshape(3, 8) for row in pooled])
    np.testing.assert_allclose(prefix.embeddings.detach(), expected, rtol=1e-12)
    assert prefix.router_logits is None and prefix.router_mask is None


def test_its_tokens_start_at_the_scale_asked_for(make_config: Callable[..., BiTuningConfig]) -> None:
    torch.manual_seed(0)
    encoder = build_prefix_encoder(make_config(prefix_encoder="linear", num_virtual_tokens=64), 64, 0.3)
    bias = encoder.get_parameter("projection.bias").detach()
    assert 0.28 < float(bias.std()) < 0.32
