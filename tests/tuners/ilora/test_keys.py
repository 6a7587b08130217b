"""Files of an adapter: on a base model with or without its head, and what does not fit."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from peft_bituning.errors import AdapterLoadError

from .conftest import FAMILIES, embed

TENSORS = "adapter_model.safetensors"
GATE = "base_model.model.instance_gates.ilora_gate"
EXPERT = "base_model.model.model.layers.0.mlp.up_proj.lora_A"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_hidden_layers", [1, 4])  # few names are kept whole, many are made short by PEFT
def test_the_adapter_does_not_depend_on_the_base_class(
    make_model: Callable, make_llm: Callable, make_inputs: Callable, tmp_path: Path, family: str, num_hidden_layers: int
) -> None:
    def llm() -> PreTrainedModel:
        return make_llm(family, num_hidden_layers=num_hidden_layers)

    model, inputs = make_model(llm(), pooling="suffix"), make_inputs()
    model.save_pretrained(tmp_path / "from_causal")
    headless = PeftModel.from_pretrained(llm().base_model, tmp_path / "from_causal")
    assert torch.equal(embed(headless, inputs), embed(model, inputs))
    headless.save_pretrained(tmp_path / "from_headless")
    back = PeftModel.from_pretrained(llm(), tmp_path / "from_headless")
    assert torch.equal(embed(back, inputs), embed(model, inputs))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop(f"{GATE}.weight"), "missing: .*ilora_gate.default.weight"),
        (lambda tensors: tensors.pop(f"{EXPERT}.weight"), "missing: .*up_proj.lora_A.default.weight"),
        (lambda tensors: tensors.clear(), r"\(30 tensors expected, 0 in the file\); missing: .* and 25 more"),
        (lambda tensors: tensors.update({f"{GATE}.extra": torch.ones(1)}), "unexpected: .*ilora_gate.extra"),
        (
            lambda tensors: tensors.update({f"{GATE}.weight": torch.ones(5, 6)}),
            r"of another shape: .*ilora_gate.default.weight: file \[5, 6\], model \[4, 6\]",
        ),
    ],
    ids=["no gate", "no expert", "empty", "extra", "mis-shaped"],
)
def test_tensors_that_do_not_fit_are_an_error(
    make_model: Callable, make_llm: Callable, tmp_path: Path, edit: Callable, message: str
) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    edit(tensors)
    save_file(tensors, tmp_path / TENSORS)
    with pytest.raises(AdapterLoadError, match=message):
        PeftModel.from_pretrained(make_llm(), tmp_path)
    with pytest.raises(AdapterLoadError, match="another configuration, another base model .* or damaged"):
        model.load_adapter(tmp_path, "second", ignore_mismatched_sizes=True)


def test_a_base_of_another_width_is_an_error(make_model: Callable, make_llm: Callable, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    with pytest.raises(
        AdapterLoadError, match=r"of another shape: .*lora_A.default.weight: file \[8, 48\], model \[8, "
    ):
        PeftModel.from_pretrained(make_llm(intermediate_size=64), tmp_path)
