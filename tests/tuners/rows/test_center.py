"""The mean of the items' embeddings comes off every embedding, and goes wherever the adapter goes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_bituning import BiTuningModel
from peft_bituning.errors import AdapterLoadError
from peft_bituning.tuners.bituning import EmbeddingCenter

KEY = "base_model.model.virtual_tokens.bituning_center.weight"


def embed(model: PeftModel, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).pooler_output


def center_of(model: PeftModel) -> EmbeddingCenter:
    assert isinstance(model.base_model, BiTuningModel)
    center = model.base_model.embedding_center
    assert center is not None
    return center


@given(seed=st.integers(0, 10_000), rows=st.integers(1, 9), moves=st.integers(1, 3), scale=st.floats(0.01, 100))
@settings(max_examples=40, deadline=None)
def test_the_mean_goes(seed: int, rows: int, moves: int, scale: float) -> None:
    """Whatever rows it was moved by before, and however long they are."""
    random = np.random.default_rng(seed)
    center = EmbeddingCenter(5)
    for _ in range(moves):
        states = random.normal(1, 1, size=(rows, 5)) * scale
        unit = states / np.linalg.norm(states, axis=1, keepdims=True)
        moved = center.move(center(torch.from_numpy(states)))
        np.testing.assert_allclose(moved, unit - unit.mean(0), atol=1e-5)
        np.testing.assert_allclose(center(torch.from_numpy(states)), moved, atol=1e-5)
        np.testing.assert_allclose(center.weight, unit.mean(0), atol=1e-5)


@pytest.mark.parametrize("encoder", ["mformer", "static", "none"])
def test_embeddings_are_centered(make_model: Callable, make_inputs: Callable, encoder: str) -> None:
    plain, inputs = make_model(prefix_encoder=encoder), make_inputs()
    model = make_model(prefix_encoder=encoder, center_embeddings=True)
    unit = torch.nn.functional.normalize(embed(plain, inputs), dim=-1)
    torch.testing.assert_close(embed(model, inputs), unit)  # the center is zero at first
    center_of(model).move(embed(model, inputs))
    torch.testing.assert_close(embed(model, inputs), unit - unit.mean(0))
    torch.testing.assert_close(model(**inputs).last_hidden_state, plain(**inputs).last_hidden_state)


def test_it_is_no_trained_weight(make_model: Callable, make_inputs: Callable) -> None:
    plain, model = make_model(), make_model(center_embeddings=True)
    assert model.get_nb_trainable_parameters() == plain.get_nb_trainable_parameters()
    model(**make_inputs()).pooler_output.square().sum().backward()
    assert not center_of(model).weight.requires_grad and center_of(model).weight.grad is None


@pytest.mark.parametrize("low", [False, True])
def test_it_is_in_the_adapters_file(
    make_model: Callable, make_llm: Callable, make_inputs: Callable, tmp_path: Path, low: bool
) -> None:
    model, inputs = make_model(center_embeddings=True), make_inputs()
    center_of(model).move(embed(model, inputs))
    expected = embed(model, inputs)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(load_file(tmp_path / "adapter_model.safetensors")[KEY], center_of(model).weight)
    loaded = PeftModel.from_pretrained(make_llm(), tmp_path, adapter_name="items", low_cpu_mem_usage=low)
    assert torch.equal(embed(loaded.eval(), inputs), expected)
    assert KEY not in get_peft_model_state_dict(make_model())


def test_a_file_without_it_is_refused(make_model: Callable, make_llm: Callable, tmp_path: Path) -> None:
    make_model(center_embeddings=True).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({name: value for name, value in load_file(path).items() if name != KEY}, path, {"format": "pt"})
    with pytest.raises(AdapterLoadError, match="missing: .*bituning_center"):
        PeftModel.from_pretrained(make_llm(), tmp_path)


def test_each_adapter_has_its_own(make_model: Callable, make_config: Callable, make_inputs: Callable) -> None:
    model, inputs = make_model(center_embeddings=True), make_inputs()
    model.add_adapter("plain", make_config())
    model.add_adapter("other", make_config(center_embeddings=True))
    center_of(model).move(embed(model, inputs))
    model.set_adapter("plain")
    assert model.base_model.embedding_center is None
    assert embed(model, inputs).norm(dim=-1).min() > 1.5
    model.set_adapter("other")
    assert not center_of(model).weight.any()
    model.delete_adapter("other")
    model.set_adapter("default")
    assert center_of(model).weight.any() and "bituning_center.other" not in " ".join(model.state_dict())


def test_in_half_precision_the_difference_is_not(
    make_llm: Callable, make_model: Callable, make_inputs: Callable
) -> None:
    model, inputs = make_model(make_llm().to(torch.bfloat16), center_embeddings=True), make_inputs()
    assert embed(model, inputs).dtype == torch.float32
    moved = center_of(model).move(embed(model, inputs))
    torch.testing.assert_close(embed(model, inputs), moved, atol=1e-6, rtol=0)
    assert center_of(model).weight.dtype == torch.float32
