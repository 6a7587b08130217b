"""The formula of an adapted layer, and what plain LoRA makes of it."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import convert_to_lora
from torch import Tensor

from peft_bituning.errors import UnsupportedOperationError
from peft_bituning.tuners.ilora.row_gates import RowsOnTheWay

from .conftest import FAMILIES

GATES = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.0, 0.5, 0.25, 0.25], [0.1, 0.2, 0.3, 0.4]])


def make_uniform(model: PeftModel) -> None:
    """Let every expert count the same for every row."""
    with torch.no_grad():
        model.base_model.gate.weight.zero_()


def plain_lora(ilora: PeftModel, base: Any, **changes: Any) -> PeftModel:
    """Return PEFT's own LoRA with the experts' weights."""
    config = ilora.peft_config["default"]
    same = {key: getattr(config, key) for key in ("r", "lora_alpha", "lora_dropout", "target_modules", "rank_pattern")}
    plain = get_peft_model(base, LoraConfig(**same, task_type="FEATURE_EXTRACTION", **changes)).eval()
    missing, unexpected = plain.load_state_dict(ilora.state_dict(), strict=False)
    assert not missing and all("ilora_" in key for key in unexpected)
    return plain


def pool(plain: PeftModel, inputs: dict[str, Tensor]) -> Tensor:
    """Return the state of each row's last token, of right-padded rows, by PEFT's own forward pass."""
    states = plain(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], output_hidden_states=True)
    return states.hidden_states[-1][torch.arange(3), inputs["attention_mask"].sum(1) - 1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "changes", [{}, {"num_experts": 2}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 4, "c_attn": 4}}], ids=str
)
@pytest.mark.filterwarnings("ignore:The following rank_pattern", "ignore:fan_in_fan_out")
def test_uniform_gates_are_plain_lora(
    make_model: Callable, make_llm: Callable, make_inputs: Callable, family: str, changes: dict[str, Any]
) -> None:
    """Outputs and gradients, with dropout that falls on the same inputs."""
    ilora, inputs = make_model(family, lora_dropout=0.1, **changes), make_inputs()
    make_uniform(ilora)
    plain = plain_lora(ilora, make_llm(family), use_rslora=changes.get("use_rslora", False))
    with torch.no_grad():
        torch.testing.assert_close(ilora(**inputs).pooler_output, pool(plain, inputs), rtol=1e-6, atol=1e-6)
        with ilora.disable_adapter():
            assert not torch.allclose(pool(ilora, inputs), pool(plain, inputs), atol=1e-2)
    gradients = []
    for model, embed in ((ilora, lambda: ilora(**inputs).pooler_output), (plain, lambda: pool(plain, inputs))):
        model.train()
        model.zero_grad()
        torch.manual_seed(7)
        output = embed()
        (output * torch.linspace(-1, 1, output.shape[1])).sum().backward()
        gradients.append(
            {name: each.grad for name, each in model.named_parameters() if "lora_A" in name or "lora_B" in name}
        )
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) >= 16
    for name, gradient in gradients[1].items():
        scale = float(gradient.abs().max())
        assert scale > 0
        assert float((gradients[0][name] - gradient).abs().max()) <= 1e-6 * max(scale, 1.0), name


@pytest.mark.parametrize("target", ["q_proj", "down_proj"])
def test_one_layer_against_numpy(make_model: Callable, target: str) -> None:
    model = make_model(lora_alpha=24)
    layer = next(each for name, each in model.named_modules() if name.endswith(f"layers.1.{_home(target)}.{target}"))
    inputs = torch.randn(3, 5, layer.in_features, generator=torch.Generator().manual_seed(2))
    with model.base_model._layer.row_gates.use(RowsOnTheWay(GATES, 5)), torch.no_grad():
        found = layer(inputs).numpy()
    rank, count = 8, 4
    share = rank // count
    weight = layer.base_layer.weight.detach().numpy().astype(np.float64)
    down = layer.lora_A["default"].weight.detach().numpy().astype(np.float64)  # [r, in]
    up = layer.lora_B["default"].weight.detach().numpy().astype(np.float64)  # [out, r]
    for row, tokens in enumerate(inputs.numpy().astype(np.float64)):
        expected = tokens @ weight.T
        for expert in range(count):
            part = slice(expert * share, (expert + 1) * share)
            expected = expected + 24 / share * float(GATES[row, expert]) * (tokens @ down[part].T) @ up[:, part].T
        np.testing.assert_allclose(found[row], expected, rtol=1e-4, atol=1e-5)


def _home(target: str) -> str:
    return "mlp" if target == "down_proj" else "self_attn"


@pytest.mark.parametrize(
    "operation",
    [
        lambda model: model.merge_and_unload(),
        lambda model: model.merge_adapter(),
        lambda model: model.base_model._layer.merge(),
        lambda model: model.get_base_model().model.layers[0].mlp.up_proj.merge(),
        lambda model: model.get_base_model().model.layers[0].mlp.up_proj.merge(safe_merge=True),
    ],
)
def test_merging_is_refused(make_model: Callable, make_inputs: Callable, operation: Callable) -> None:
    model, inputs = make_model(), make_inputs()
    expected = model(**inputs).pooler_output
    refusal = re.escape("experts cannot be merged into the base model: their weights differ from row to row; keep the")
    with pytest.raises(UnsupportedOperationError, match=refusal):
        operation(model)
    assert torch.equal(model(**inputs).pooler_output, expected)
    model.unmerge_adapter()


def test_it_is_not_to_be_converted(make_model: Callable) -> None:
    assert not make_model().supports_lora_conversion()
    with pytest.raises(TypeError, match="conver"):
        convert_to_lora(make_model(), rank=4)
