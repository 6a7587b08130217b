"""Text encoders: mean states of a language model against one text at a time, and what is said of those that fail."""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from peft_bituning.base_models import BaseModel
from peft_bituning.catalog import text_encoder
from peft_bituning.catalog.text_encoder import MAX_TOKENS, open_text_encoder
from peft_bituning.errors import ConfigurationError

TEXTS = [
    "Brass lamp; Acme; garden",
    "",
    "Steel kettle",
    "Copper pan " * 100,  # longer than is read
    "x",
    *(f"item {number} of {number * number}" for number in range(40)),  # more than one batch
]


@pytest.fixture(scope="module")
def base(tiny_base: Callable[[], BaseModel]) -> BaseModel:
    """Return a random Llama of two layers; read it, do not change it."""
    return tiny_base()


@torch.no_grad()
def by_hand(base: BaseModel, text: str, layer: int) -> np.ndarray:
    """Return the mean of the states after so many layers, of one text alone."""
    tokens: Any = base.tokenizer
    ids = torch.tensor([tokens(text or " ")["input_ids"][:MAX_TOKENS]])
    states: Any = base.model(input_ids=ids, output_hidden_states=True)
    return states.hidden_states[layer][0].mean(0).numpy()


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_language_model_gives_the_mean_states_of_a_layer(base: BaseModel, layer: int) -> None:
    encoder = open_text_encoder(f"language-model:{layer}", base)
    assert encoder.name == f"language-model:{layer}"
    found = encoder.encode(TEXTS, False)
    assert found.shape == (len(TEXTS), 32) and found.dtype == np.float32
    for text, vector in zip(TEXTS, found, strict=True):
        assert np.allclose(vector, by_hand(base, text, layer), rtol=1e-4, atol=1e-4), text[:20]


def test_long_texts_are_cut(base: BaseModel) -> None:
    tokens: Any = base.tokenizer
    assert len(tokens(TEXTS[3])["input_ids"]) > MAX_TOKENS
    encode = open_text_encoder("language-model:2", base).encode
    assert np.allclose(encode([TEXTS[3]], False), encode([TEXTS[3] + " and much more"], False), atol=1e-5)


def test_a_third_of_the_layers_is_taken_if_none_is_named(base: BaseModel) -> None:
    encoder = open_text_encoder("language-model", base)
    assert encoder.name == "language-model:1"  # at least one, of two
    assert np.array_equal(encoder.encode(TEXTS, False), open_text_encoder(encoder.name, base).encode(TEXTS, False))


def test_a_text_is_the_same_beside_others_and_in_any_order(base: BaseModel) -> None:
    encode = open_text_encoder("language-model", base).encode
    whole = encode(TEXTS, False)
    assert np.allclose(encode(TEXTS[::-1], False)[::-1], whole, atol=1e-5)
    assert np.allclose(encode([TEXTS[2]], False)[0], whole[2], atol=1e-5)


def test_the_model_is_left_as_it_was(base: BaseModel) -> None:
    def hooks() -> list[int]:
        return [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in base.model.modules()]

    ids = torch.tensor([[5, 6, 7]])
    base.model(input_ids=ids, output_hidden_states=True)  # transformers hooks itself in for these
    before, hooked = base.model(input_ids=ids), hooks()
    for layer in range(3):
        open_text_encoder(f"language-model:{layer}", base).encode(TEXTS[:3], False)
    assert hooks() == hooked
    assert torch.equal(before.logits, base.model(input_ids=ids).logits)


def test_layers_above_are_not_run(base: BaseModel) -> None:
    ran: list[int] = []
    layers: Any = base.model.get_submodule("model.layers")
    handles = [
        layer.register_forward_hook(lambda *_, number=number: ran.append(number)) for number, layer in enumerate(layers)
    ]
    try:
        open_text_encoder("language-model:1", base).encode(["Brass lamp"], False)
    finally:
        for handle in handles:
            handle.remove()
    assert ran == [0]


def test_a_layer_that_is_not_there_and_no_base_model(base: BaseModel) -> None:
    with pytest.raises(ConfigurationError, match="must name a layer from 0 to 2, got 'language-model:3'"):
        open_text_encoder("language-model:3", base)
    with pytest.raises(ConfigurationError, match="'language-model:1' needs the base model"):
        open_text_encoder("language-model:1")


# ---------------------------------------------------------------------- sentence-transformers


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_a_folder_that_holds_no_model_is_named(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    folder = tmp_path / "nothing"
    if kind == "empty":
        folder.mkdir()
    elif kind == "file":
        folder.write_text("no model", encoding="utf-8")
    with pytest.raises(ConfigurationError, match="text_model must be tf-idf, minilm, language-model") as error:
        open_text_encoder(str(folder))
    assert repr(str(folder)) in str(error.value)


@pytest.mark.parametrize("name", ["language-model:last", "language-model:-1", "language model"])
def test_a_name_that_is_nearly_right_is_no_language_model(name: str, base: BaseModel) -> None:
    pytest.importorskip("sentence_transformers")
    with pytest.raises(ConfigurationError, match="text_model must be tf-idf") as error:
        open_text_encoder(name, base)
    assert repr(name) in str(error.value)


def test_without_sentence_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ConfigurationError, match="'some/model' needs sentence-transformers; run: pip install"):
        open_text_encoder("some/model")


def test_minilm_that_is_not_installed_says_how_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_encoder, "MINILM_PACKAGE", "no_such_package_of_a_model")
    assert importlib.util.find_spec("no_such_package_of_a_model") is None
    with pytest.raises(ConfigurationError, match="'minilm' is in a package that is not installed; run: pip install"):
        open_text_encoder("minilm")


def test_a_sentence_encoder_is_asked_for_its_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that stands in for sentence-transformers: the lengths of texts."""
    asked: list[tuple[str, bool]] = []

    class Lengths:
        def __init__(self, source: str) -> None:
            self.source = source

        def encode(self, texts: Sequence[str], show_progress_bar: bool, convert_to_numpy: bool) -> np.ndarray:
            assert convert_to_numpy
            asked.append((self.source, show_progress_bar))
            return np.array([[len(text), 1.0] for text in texts], dtype=np.float32)

    module: Any = ModuleType("sentence_transformers")
    module.SentenceTransformer = Lengths
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    encoder = open_text_encoder("some/model")
    assert encoder.name == "some/model"
    assert encoder.encode(("a", "bcd"), True).tolist() == [[1.0, 1.0], [3.0, 1.0]]
    assert asked == [("some/model", True)]


def test_minilm_is_unpacked_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Out of a wheel that holds a zip, into the cache of the Hub; the second time nothing is read of it."""
    import zipfile

    package = tmp_path / "package"
    package.mkdir()
    with zipfile.ZipFile(package / "model.zip", "w") as packed:
        packed.writestr("inner/modules.json", "[]")
    spec = SimpleNamespace(submodule_search_locations=[str(package)])
    monkeypatch.setattr(text_encoder, "HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(text_encoder.importlib.util, "find_spec", lambda name: spec)
    sources: list[str] = []
    module: Any = ModuleType("sentence_transformers")
    module.SentenceTransformer = sources.append
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    assert open_text_encoder("minilm").name == "minilm"
    (package / "model.zip").unlink()
    open_text_encoder("minilm")
    assert len(set(sources)) == 1 and Path(sources[0]).is_relative_to(tmp_path / "cache")
    assert (Path(sources[0]) / "modules.json").is_file()
