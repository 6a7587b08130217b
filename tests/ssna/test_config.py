"""Settings of the side network: ranges, and JSON and back."""

import pytest

from peft_bituning.errors import ConfigurationError
from peft_bituning.ssna import SSNAConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"adapter_size": 0}, "adapter_size must be at least 1, got 0"),
        ({"item_chunk_size": 0}, "item_chunk_size must be at least 1, got 0"),
        ({"state_size": -1}, "state_size must be at least 1, got -1"),
        ({"adapter_dropout": 1.0}, r"adapter_dropout must be in \[0, 1\), got 1.0"),
        ({"pooling": "first"}, "pooling must be one of last, mean, got 'first'"),
        ({"hidden_size": 9}, "hidden_size must be a multiple of num_attention_heads"),
    ],
)
def test_ranges_are_checked(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        SSNAConfig(**settings)


def test_json_and_back(tmp_path):
    config = SSNAConfig(num_layers=3, adapter_size=5, pooling="mean", seed=4, states={"base_model": "b"}, hidden_size=8)
    config.save_pretrained(tmp_path)
    loaded = SSNAConfig.from_pretrained(tmp_path)
    for name in ("num_layers", "adapter_size", "adapter_dropout", "pooling", "seed", "states", "hidden_size"):
        assert getattr(loaded, name) == getattr(config, name)
    assert loaded.model_type == "ssna"
