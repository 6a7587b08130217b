"""Tiny random language models, iLoRA around them, and the inputs they take."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from peft_bituning import ILoRAConfig

from ..architectures import ARCHITECTURES

FAMILIES = ["Llama", "GPT-2", "Qwen2"]  # GPT-2 keeps its weights the other way round (Conv1D)
TINY: dict[str, Any] = {"collaborative_dim": 6, "lora_alpha": 8, "lora_dropout": 0.0}


@pytest.fixture
def make_llm() -> Callable[..., PreTrainedModel]:
    """Return a maker of two-layer models with D = 32 and V = 97, the same weights for the same family."""
    known = {each.name: each for each in ARCHITECTURES}

    def make(family: str = "Llama", **changes: Any) -> PreTrainedModel:
        architecture = known[family]
        return type(architecture)(architecture.name, architecture.model_type, "", architecture.sizes | changes).build()

    return make


@pytest.fixture
def make_config() -> Callable[..., ILoRAConfig]:
    """Return a maker of small configurations; its arguments replace the small sizes."""
    return lambda **changes: ILoRAConfig(**(TINY | changes))


@pytest.fixture
def make_model(make_llm: Callable[..., PreTrainedModel]) -> Callable[..., PeftModel]:
    """Return a maker of models whose experts and gates are not those of the start, as after some training."""

    def make(llm: Any = "Llama", adapter_name: str = "default", **changes: Any) -> PeftModel:
        base = make_llm(llm) if isinstance(llm, str) else llm
        torch.manual_seed(1)
        model = get_peft_model(base, ILoRAConfig(**(TINY | changes)), adapter_name=adapter_name).eval()
        stir(model, adapter_name)
        return model

    return make


@pytest.fixture
def make_inputs() -> Callable[..., dict[str, Tensor]]:
    """Return a maker of right-padded inputs: text of 7, 4 and 1 tokens, 4, 2 and 0 items."""

    def make(seed: int = 0, **changes: Tensor | None) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        inputs: dict[str, Any] = {
            "input_ids": torch.randint(3, 97, (3, 7), generator=generator),
            "attention_mask": (torch.arange(7) < torch.tensor([[7], [4], [1]])).long(),
            "collaborative_embeds": 2 * torch.randn(3, 4, 6, generator=generator),
            "collaborative_mask": (torch.arange(4) < torch.tensor([[4], [2], [0]])).long(),
        }
        return {key: value for key, value in (inputs | changes).items() if value is not None}

    return make


def stir(model: PeftModel, adapter: str = "default", seed: int = 5) -> None:
    """Give an adapter other weights, as training would; a fresh `lora_B` is zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f".{adapter}." in name:
            scale = 1.0 if "ilora_gate" in name else 0.1
            parameter.data.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * scale)


def embed(model: PeftModel, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(**inputs).pooler_output


def alone(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """Return one row without its padding; its items stay, as they may be none."""
    real = inputs["attention_mask"][row].bool()
    return {key: value[row : row + 1] for key, value in inputs.items()} | {
        "input_ids": inputs["input_ids"][row, real][None],
        "attention_mask": torch.ones(1, int(real.sum())),
    }
