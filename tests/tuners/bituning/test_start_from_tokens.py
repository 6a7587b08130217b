"""Virtual tokens that start from the embeddings of words."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import LlamaForCausalLM

from peft_bituning.errors import ConfigurationError
from peft_bituning.tuners.bituning.encoders import Prefix, PrefixEncoder, register_prefix_encoder, registry

Make = Callable[..., PeftModel]


def tokens_of(model: PeftModel) -> tuple[PrefixEncoder, Tensor, Tensor]:
    """Return the prefix encoder, the suffix and the vocabulary's embeddings."""
    layer = model.base_model.model.virtual_tokens
    return (
        layer.encoder("default"),
        layer.suffix("default").detach()[0],
        model.base_model.model.get_input_embeddings().weight.detach(),
    )


@pytest.mark.parametrize(("ids", "repeated"), [([9, 4], [9, 4, 9]), ([7, 8, 9, 10], [7, 8, 9]), ([5], [5, 5, 5])])
def test_a_static_prefix_is_the_text_repeated_or_cut(make_model: Make, ids: list[int], repeated: list[int]) -> None:
    encoder, suffix, words = tokens_of(make_model(prefix_encoder="static", prefix_token_ids=ids, suffix_token_id=11))
    assert torch.equal(encoder.embeddings.detach(), words[repeated])  # type: ignore[arg-type]
    assert torch.equal(suffix, words[[11]])


def test_the_mean_of_a_linear_prefix_is_the_text(make_model: Make) -> None:
    encoder, _, words = tokens_of(make_model(prefix_encoder="linear", prefix_token_ids=[9, 4, 5]))
    nothing = torch.zeros(1, 1, 6), torch.ones(1, 1, dtype=torch.bool)
    torch.testing.assert_close(encoder(1, *nothing).embeddings[0].detach(), words[[9, 4, 5]])


def test_an_m_former_adds_a_trainable_anchor(make_model: Make, make_inputs: Callable[..., dict[str, Any]]) -> None:
    model = make_model(prefix_token_ids=[9, 4, 5])
    encoder, _, words = tokens_of(model)
    inputs = make_inputs()
    embeds, mask = inputs["collaborative_embeds"], inputs["collaborative_mask"].bool()
    with_anchor = encoder(3, embeds, mask).embeddings
    encoder.anchor.data.zero_()  # type: ignore[union-attr]
    without = encoder(3, embeds, mask).embeddings
    torch.testing.assert_close(with_anchor - without, words[[9, 4, 5]].expand(3, -1, -1))
    model(**inputs).pooler_output.sum().backward()
    assert float(encoder.anchor.grad.abs().sum()) > 0  # type: ignore[union-attr]


def test_without_token_ids_there_is_no_anchor(make_model: Make) -> None:
    assert not [name for name, _ in make_model().named_parameters() if "anchor" in name]


@pytest.mark.parametrize("encoder", ["mformer", "linear", "static"])
def test_the_trained_tokens_come_back_and_not_the_words(
    make_model: Make,
    make_llm: Callable[..., LlamaForCausalLM],
    make_inputs: Callable[..., dict[str, Any]],
    tmp_path: Path,
    encoder: str,
) -> None:
    model = make_model(prefix_encoder=encoder, prefix_token_ids=[9, 4], suffix_token_id=11)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llm(), tmp_path).eval()
    assert torch.equal(loaded(**make_inputs()).pooler_output, model(**make_inputs()).pooler_output)
    lazily = PeftModel.from_pretrained(make_llm(), tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(lazily(**make_inputs()).pooler_output, model(**make_inputs()).pooler_output)


@pytest.mark.parametrize("changes", [{"prefix_token_ids": [3, 97]}, {"suffix_token_id": 97}])
def test_an_id_outside_the_vocabulary_is_refused(make_model: Make, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="must be below the vocabulary's 97, got 97"):
        make_model(**changes)


def test_an_encoder_without_a_start_says_so(make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_ENCODERS", dict(registry._ENCODERS))

    @register_prefix_encoder("startless")
    class Startless(PrefixEncoder):
        def forward(self, batch_size: int, embeds: Tensor | None, mask: Tensor | None) -> Prefix:
            return Prefix(torch.zeros(batch_size, self.num_tokens, self.token_dim))

    with pytest.raises(ConfigurationError, match="prefix_encoder='startless', which has no `start_from`"):
        make_model(prefix_encoder="startless", prefix_token_ids=[3])


def test_weights_in_pieces_are_gathered(
    make_model: Make, make_llm: Callable[..., LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed's ZeRO-3 leaves empty weights in a process, and gives them whole inside `GatheredParameters`."""
    llm = make_llm()
    whole = llm.get_input_embeddings().weight.data

    @contextmanager
    def gathered(parameters: Iterator[Tensor], **_: Any) -> Iterator[None]:
        (parameter,) = parameters
        parameter.data = whole
        yield
        parameter.data = whole[:0]

    zero = SimpleNamespace(GatheredParameters=gathered)
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=zero))
    monkeypatch.setattr("peft.utils.integrations.check_deepspeed_zero3_enabled", lambda: True)
    llm.get_input_embeddings().weight.data = whole[:0]
    layer = make_model(llm, prefix_token_ids=[5], suffix_token_id=7).base_model.model.virtual_tokens
    assert torch.equal(layer.encoder("default").anchor, whole[[5, 5, 5]])
    assert torch.equal(layer.suffix("default")[0], whole[[7]])
    assert float(layer.encoder("default").projection.weight.detach().std()) > 0.03  # 0.2 / sqrt(16), not the fallback
