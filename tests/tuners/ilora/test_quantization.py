"""iLoRA around language models that bitsandbytes has quantised."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from peft_bituning import ILoRAConfig
from peft_bituning.errors import UnsupportedOperationError

from .conftest import stir

METHODS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "llm-int8": {"load_in_8bit": True},
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.fixture(params=METHODS)
def load(request: pytest.FixtureRequest, make_llm: Callable, tmp_path: Path) -> Callable[..., PreTrainedModel]:
    """Return a loader of one and the same quantised model, `load(device)`; `load(device, False)` is not quantised."""
    pytest.importorskip("bitsandbytes")
    make_llm(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "llm")

    def make(device: str, quantised: bool = True) -> PreTrainedModel:
        settings = {"quantization_config": BitsAndBytesConfig(**METHODS[request.param])} if quantised else {}
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "llm", dtype=torch.float32, device_map=device, **settings
        )

    return make


def tuned(llm: PreTrainedModel, config: ILoRAConfig) -> PeftModel:
    """Return iLoRA with the same experts and gates around any model."""
    torch.manual_seed(1)
    model = get_peft_model(llm, config).eval()
    stir(model)
    return model


def gradients(model: PeftModel, inputs: dict[str, Tensor]) -> Tensor:
    """Return all gradients of a loss over the embeddings, in one vector."""
    model.zero_grad()
    embeddings = model(**inputs).pooler_output
    (embeddings.float() * torch.linspace(-1, 1, embeddings.shape[1], device=embeddings.device)).sum().backward()
    return torch.cat([each.grad.flatten() for each in model.parameters() if each.requires_grad])


@pytest.mark.parametrize("device", DEVICES)
def test_it_works_learns_and_reloads(
    load: Callable,
    make_config: Callable,
    make_inputs: Callable,
    tmp_path: Path,
    device: str,
    request: pytest.FixtureRequest,
) -> None:
    """Rows keep apart, gradients are close to those of the model that is not quantised, checkpointing changes none."""
    is_int8 = "int8" in request.node.name
    inputs = {key: value.to(device) for key, value in make_inputs().items()}
    model, plain = (
        tuned(llm, make_config(pooling="suffix"))
        for llm in (prepare_model_for_kbit_training(load(device), False), load(device, False))
    )
    assert {each.dtype for each in model.parameters() if each.requires_grad} == {torch.float32}
    assert {type(each).__name__ for each in model.modules() if hasattr(each, "lora_A")} != {"Linear"}
    with torch.no_grad():
        together = model(**inputs).pooler_output
    alone = model(**{key: value[:1] for key, value in inputs.items()}).pooler_output[0]
    # LLM.int8 looks for outliers in the whole batch
    torch.testing.assert_close(alone, together[0], **({"rtol": 0.02, "atol": 0.1} if is_int8 else {}))
    swapped = model(**(inputs | {"collaborative_embeds": -inputs["collaborative_embeds"]})).pooler_output
    assert not torch.allclose(swapped[:2], together[:2], atol=1e-2)
    model.train()
    expected = gradients(model, inputs)  # a 4-bit model on a CPU ran without gradients before
    assert torch.nn.functional.cosine_similarity(expected, gradients(plain, inputs), dim=0) > 0.6
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.testing.assert_close(gradients(model, inputs), expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(UnsupportedOperationError, match="cannot be merged"):
        model.get_base_model().model.layers[0].mlp.up_proj.merge()
    model.eval().save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(prepare_model_for_kbit_training(load(device), False), tmp_path / "adapter").eval()
    torch.testing.assert_close(again(**inputs).pooler_output, together)
