"""Tiny random language models and the inputs they take."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from peft_bituning import BiTuningConfig

from .architectures import SIZES

TINY: dict[str, Any] = {
    "num_virtual_tokens": 3,
    "collaborative_dim": 6,
    "num_experts": 4,
    "encoder_hidden_size": 16,
    "encoder_num_layers": 2,
    "encoder_num_attention_heads": 2,
}


@pytest.fixture
def make_config() -> Callable[..., BiTuningConfig]:
    """Return a maker of small configurations; its arguments replace the small sizes."""
    return lambda **changes: BiTuningConfig(**(TINY | changes))


@pytest.fixture
def make_llm() -> Callable[..., LlamaForCausalLM]:
    """Return a maker of two-layer Llamas with D = 32 and V = 97, the same weights for the same seed."""

    def make(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**(SIZES | changes))).eval()

    return make


@pytest.fixture
def make_model(make_llm: Callable[..., LlamaForCausalLM]) -> Callable[..., PeftModel]:
    """Return a maker of Bi-Tuned Llamas; its arguments replace the small configuration's."""

    def make(llm: Any = None, adapter_name: str = "default", **changes: Any) -> PeftModel:
        base = make_llm() if llm is None else llm
        torch.manual_seed(1)
        return get_peft_model(base, BiTuningConfig(**(TINY | changes)), adapter_name=adapter_name).eval()

    return make


@pytest.fixture
def make_inputs() -> Callable[..., dict[str, Tensor]]:
    """Return a maker of right-padded inputs: text of 7, 4 and 1 tokens, 4, 2 and 0 items."""

    def make(seed: int = 0, **changes: Tensor | None) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        inputs: dict[str, Any] = {
            "input_ids": torch.randint(3, 97, (3, 7), generator=generator),
            "attention_mask": (torch.arange(7) < torch.tensor([[7], [4], [1]])).long(),
            "collaborative_embeds": torch.randn(3, 4, 6, generator=generator),
            "collaborative_mask": (torch.arange(4) < torch.tensor([[4], [2], [0]])).long(),
        }
        return {key: value for key, value in (inputs | changes).items() if value is not None}

    return make
