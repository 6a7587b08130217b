"""Adapters around 4-bit and 8-bit language models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

from peft_bituning import BiTuningConfig

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]


def _torchao() -> TorchAoConfig:
    quantization = pytest.importorskip("torchao.quantization")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


def _bits(**settings: Any) -> BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(**settings)


METHODS: dict[str, Callable[[], Any]] = {
    "nf4": lambda: _bits(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
    "fp4-nested": lambda: _bits(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True),
    "llm-int8": lambda: _bits(load_in_8bit=True),
    "torchao-int8": _torchao,
}


@pytest.fixture(params=METHODS)
def load(request: pytest.FixtureRequest, make_llm: Callable, tmp_path: Path) -> Callable[..., PreTrainedModel]:
    """Return a loader of one and the same quantised model, `load(device)`; `load(device, None)` is not quantised."""
    method = METHODS[request.param]()
    make_llm(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "llm")

    def make(device: str, quantization_config: Any = method) -> PreTrainedModel:
        settings = {} if quantization_config is None else {"quantization_config": quantization_config}
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "llm", dtype=torch.float32, device_map=device, **settings
        )

    return make


def gradients(model: PeftModel, inputs: dict[str, Tensor]) -> Tensor:
    """Return all gradients of a loss over the embeddings, in one vector."""
    model.zero_grad()
    embeddings = model(**inputs).pooler_output
    goal = torch.linspace(-1, 1, embeddings.numel(), device=embeddings.device).view_as(embeddings)
    torch.nn.functional.mse_loss(embeddings.float(), goal).backward()
    own = [each for each in model.parameters() if each.requires_grad]
    assert all(each.grad is not None for each in own)
    return torch.cat([each.grad.flatten() for each in own])


def on(device: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.to(device) for key, value in inputs.items()}


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_pass_through(
    load: Callable, make_model: Callable, make_inputs: Callable, device: str, request: pytest.FixtureRequest
) -> None:
    """Close to those of the model that is not quantised, also after it ran without gradients."""
    inputs = on(device, make_inputs())
    expected = gradients(make_model(load(device, None)), inputs)
    base = load(device).eval()
    with torch.no_grad():
        base(inputs["input_ids"])  # a 4-bit model on a CPU packs its weights here
    model = make_model(base)
    assert {each.dtype for each in model.parameters() if each.requires_grad} == {torch.float32}
    before = gradients(model, inputs)
    closeness = 0.99 if "int8" in request.node.name else 0.7  # of a random model, whose weights have no outliers
    assert torch.nn.functional.cosine_similarity(before, expected, dim=0) > closeness
    with torch.no_grad():
        model(**inputs)
    assert torch.equal(gradients(model, inputs), before)


@pytest.mark.parametrize("device", DEVICES)
def test_an_adapter_learns_and_reloads(
    load: Callable, make_config: Callable, make_inputs: Callable, tmp_path: Path, device: str
) -> None:
    """`prepare_model_for_kbit_training` brings gradient checkpointing and float32 norms."""
    inputs = on(device, make_inputs())
    base = prepare_model_for_kbit_training(load(device), gradient_checkpointing_kwargs={"use_reentrant": False})
    text = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    logits = base.eval()(**text).logits
    model = get_peft_model(base, make_config()).train()
    assert model.is_gradient_checkpointing
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    goal = torch.randn(3, 64, generator=torch.Generator().manual_seed(3)).to(device)
    losses = []
    for _ in range(8):
        loss = torch.nn.functional.mse_loss(model(**inputs).pooler_output.float(), goal)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with model.eval().disable_adapter():
        assert torch.equal(model(**text).logits, logits)
    model.save_pretrained(tmp_path / "adapter")
    expected = model(**inputs).pooler_output
    loaded = PeftModel.from_pretrained(prepare_model_for_kbit_training(load(device)), tmp_path / "adapter").eval()
    assert torch.equal(loaded(**inputs).pooler_output, expected)
    plain = PeftModel.from_pretrained(load(device, None), tmp_path / "adapter").eval()
    cosine = torch.nn.functional.cosine_similarity(plain(**inputs).pooler_output, expected, dim=1)
    assert float(cosine.min()) > 0.8


def test_settings_are_those_of_any_model(load: Callable) -> None:
    """The width of virtual tokens is that of the embeddings, which stay as they are."""
    model = get_peft_model(load("cpu"), BiTuningConfig(num_virtual_tokens=2, prefix_encoder="static"))
    assert model.get_nb_trainable_parameters()[0] == (2 + 1) * 64
