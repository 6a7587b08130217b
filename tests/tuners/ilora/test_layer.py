"""Names: of adapters, and of the layers that they adapt."""

from collections.abc import Callable

import pytest
from torch import nn

from peft_bituning.errors import ConfigurationError
from peft_bituning.tuners.ilora.layer import without_head


@pytest.mark.parametrize("name", ["items", "train", "a.b", ""])
def test_names_that_modules_cannot_have_are_refused(make_model: Callable, name: str) -> None:
    with pytest.raises((ConfigurationError, ValueError), match="(?i)name"):
        make_model(adapter_name=name)


@pytest.mark.parametrize("name", ["weight", "model", "q_proj", "0", "lora_A", "ilora_gate", "instance_gates", "null"])
def test_names_that_are_parts_of_parameters_are_refused(make_model: Callable, make_config: Callable, name: str) -> None:
    """PEFT cuts every key with another adapter's name in it out of a file."""
    with pytest.raises(ConfigurationError, match=f"must not be part of a parameter's name, got '{name}'; choose"):
        make_model(adapter_name=name)
    with pytest.raises(ConfigurationError, match=f"must not be part of a parameter's name, got '{name}'; choose"):
        make_model().add_adapter(name, make_config())


def test_layers_are_named_as_in_the_headless_model(make_llm: Callable) -> None:
    llm = make_llm()
    names = {"model.layers.0.self_attn.q_proj", "up_proj", "lm_head"}
    assert without_head(names, llm) == {"layers.0.self_attn.q_proj", "up_proj", "lm_head"}
    assert without_head(names, llm.model) == names
    assert without_head(r".*\.q_proj", llm) == r".*\.q_proj"
    llm.tower = nn.ModuleDict(
        {"layers": nn.ModuleList([nn.ModuleDict({"self_attn": nn.ModuleDict({"q_proj": nn.Linear(1, 1)})})])}
    )
    assert without_head(names, llm) == names  # or the other tower's layer would be adapted too
