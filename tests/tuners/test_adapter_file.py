"""The names of tensors in files and in the model."""

import pytest
import torch

from peft_bituning.errors import AdapterLoadError
from peft_bituning.tuners.adapter_file import adapter_keys, check_fit, without_adapter_name
from peft_bituning.tuners.bituning.layer import VirtualTokens

PARTS = VirtualTokens.adapter_layer_names
ROOT = "base_model.model.virtual_tokens"


@pytest.mark.parametrize(
    ("key", "name", "short"),
    [
        (f"{ROOT}.bituning_prefix.default.router.weight", "default", f"{ROOT}.bituning_prefix.router.weight"),
        (f"{ROOT}.bituning_suffix.default.weight", "default", f"{ROOT}.bituning_suffix.weight"),
        (f"{ROOT}.bituning_prefix.ab.null", "ab", f"{ROOT}.bituning_prefix.null"),
        (f"{ROOT}.bituning_prefix.ab.null", "a", None),  # one name within another
        (f"{ROOT}.bituning_prefix.default.router.weight", "router", None),
        ("base_model.model.lm_head.weight", "default", None),
    ],
)
def test_the_adapters_name_stands_mid_key(key: str, name: str, short: str | None) -> None:
    assert without_adapter_name(key, PARTS, name) == short


def test_all_that_does_not_fit_is_named() -> None:
    model = {f"{ROOT}.bituning_prefix.a.{part}": torch.zeros(2) for part in "uvwxyz"}
    model["lm_head.weight"] = torch.zeros(3)
    check_fit(
        "a",
        {key: value for key, value in model.items() if "lm_head" not in key},
        model,
        adapter_keys(model, PARTS, "a"),
    )
    loaded = {f"{ROOT}.bituning_prefix.a.u": torch.zeros(4), "extra": torch.zeros(1)}
    with pytest.raises(AdapterLoadError) as caught:
        check_fit("a", loaded, model, adapter_keys(model, PARTS, "a"))
    message = str(caught.value)
    assert "do not fit the adapter 'a' (6 tensors expected, 2 in the file)" in message
    missing = ", ".join(f"{ROOT}.bituning_prefix.a.{part}" for part in "vwxyz")
    assert (
        f"missing: {missing}; unexpected: extra; of another shape: {ROOT}.bituning_prefix.a.u: file [4], model [2]"
        in message
    )
    many = {f"{ROOT}.bituning_prefix.a.{part}": torch.zeros(2) for part in range(8)}
    with pytest.raises(AdapterLoadError, match=r"bituning_prefix\.a\.4 and 3 more\."):
        check_fit("a", {}, many, adapter_keys(many, PARTS, "a"))
