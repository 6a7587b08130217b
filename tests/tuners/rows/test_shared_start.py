"""The common start of a batch is run once, and nothing changes by it; every kind of model is in test_architectures."""

import functools
import logging
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from peft_bituning import BiTuningConfig
from peft_bituning.tuners.rows import shared_start
from peft_bituning.tuners.rows.common_start import keep_starts
from peft_bituning.tuners.rows.shared_start import why_no_slots, why_not

from ..architectures import SIZES

ROWS, START = 5, 22
# Sums in float32 come in another order where rows are cut or nested: some 3e-6 is seen on these two layers.
EXACT = {"atol": 1e-5, "rtol": 1e-5}


def batch(seed: int = 0, left: bool = False) -> dict[str, Tensor]:
    """Return five rows that start alike, of up to 30 tokens, padded right or left."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(3, 97, (1, START), generator=generator).expand(ROWS, -1)
    ids = torch.cat([start, torch.randint(3, 97, (ROWS, 8), generator=generator)], dim=1)
    mask = (torch.arange(START + 8) < START + torch.randint(0, 9, (ROWS, 1), generator=generator)).long()
    if left:
        order = torch.argsort(mask, dim=1, stable=True)
        ids, mask = ids.gather(1, order), mask.gather(1, order)
    return {"input_ids": ids, "attention_mask": mask}


def tokens_of(model: PeftModel) -> list[int]:
    """Return a list that grows by the tokens each pass through the first layer takes."""
    seen: list[int] = []
    layer = model.base_model.backbone.layers[0]
    layer.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0].shape[0] * inputs[0].shape[1]))
    return seen


def both_ways(model: PeftModel, inputs: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return embeddings, text states and gradients with the start run once, and of whole rows."""
    own = [value for value in model.parameters() if value.requires_grad]
    results = []
    for share in (True, False):
        model.base_model.share_start = share
        output = model(**inputs)
        loss = (output.pooler_output * torch.linspace(-1, 1, output.pooler_output.shape[-1])).sum()
        gradients = torch.autograd.grad(loss, own) if own and loss.requires_grad else ()
        results.append([output.pooler_output.detach(), output.last_hidden_state.detach(), *gradients])
    return list(zip(*results, strict=True))


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("pooling", ["suffix", "eos", "mean", "last"])
@pytest.mark.parametrize("encoder", ["static", "none"])
def test_the_same_numbers(make_model: Callable, encoder: str, pooling: str, left: bool) -> None:
    model = make_model(prefix_encoder=encoder, pooling=pooling)
    seen = tokens_of(model)
    for found, expected in both_ways(model, batch(left=left)):
        torch.testing.assert_close(found, expected, **EXACT)
    prefix, suffix = (3 if encoder == "static" else 0), int(pooling in ("suffix", "eos"))
    once, rest, whole = seen
    assert once == prefix + START
    assert rest == ROWS * (8 + suffix)
    assert whole == ROWS * (prefix + START + 8 + suffix)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_rows(data: st.DataObject) -> None:
    """Equal rows, empty rows, rows that are the start of others."""
    torch.manual_seed(0)
    llm = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    model = get_peft_model(llm, BiTuningConfig(prefix_encoder="static", num_virtual_tokens=20)).eval()
    width = data.draw(st.integers(1, 12))
    rows = data.draw(st.lists(st.lists(st.integers(3, 5), max_size=width), min_size=2, max_size=6))
    width = max(1, *map(len, rows))
    inputs = {
        "input_ids": torch.tensor([row + [7] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
    }
    for found, expected in both_ways(model, inputs):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def cuts(left: bool = False) -> dict[str, Tensor]:
    """Return the cuts of two histories behind an instruction, in no order, padded right or left."""
    generator = torch.Generator().manual_seed(3)
    texts = torch.randint(3, 97, (2, 40), generator=generator)
    texts[:, :10] = texts[0, :10]
    lengths = torch.tensor([20, 40, 30, 39, 26])
    ids = texts[torch.tensor([0, 1, 0, 0, 1])]
    mask = (torch.arange(40) < lengths.unsqueeze(1)).long()
    if left:
        order = torch.argsort(mask, dim=1, stable=True)
        ids, mask = ids.gather(1, order), mask.gather(1, order)
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("pooling", ["suffix", "eos", "mean", "last"])
def test_one_pass_a_user(make_model: Callable, make_llm: Callable, pooling: str, left: bool, kernel: str) -> None:
    """The cuts of a history run inside its longest one, each with a suffix of its own."""
    llm = make_llm()
    llm.set_attn_implementation(kernel)
    model = make_model(llm, prefix_encoder="static", pooling=pooling)
    suffix = int(pooling in ("suffix", "eos"))
    if suffix:
        assert why_no_slots(model.get_base_model()) is None
    seen = tokens_of(model)
    for found, expected in both_ways(model, cuts(left)):
        torch.testing.assert_close(found, expected, **EXACT)
    # two users of up to 40 tokens, and two slots for the three cuts that are not the longest
    assert seen == [2 * (3 + 40 + suffix) + 2 * 2 * suffix, 5 * (3 + 40 + suffix)]


def test_one_pass_a_user_behind_a_long_start(make_model: Callable, make_llm: Callable) -> None:
    """Instruction once a batch, histories once a user."""
    inputs = cuts()
    start = torch.randint(3, 97, (1, 70), generator=torch.Generator().manual_seed(4)).expand(ROWS, -1)
    inputs = {
        "input_ids": torch.cat([start, inputs["input_ids"]], dim=1),
        "attention_mask": torch.cat([torch.ones_like(start), inputs["attention_mask"]], dim=1),
    }
    model = make_model(make_llm(max_position_embeddings=128), prefix_encoder="static")
    assert why_no_slots(model.get_base_model()) is None
    seen = tokens_of(model)
    for found, expected in both_ways(model, inputs):
        torch.testing.assert_close(found, expected, **EXACT)
    assert seen == [3 + 80, 2 * (30 + 1 + 2), 5 * (3 + 110 + 1)]


def test_models_that_do_not_honour_masks_run_every_cut(
    make_model: Callable, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A model that overlooks position ids is found out by trying, and every cut is a row of its own."""
    model = make_model(prefix_encoder="static")
    backbone = model.base_model.backbone
    forward = backbone.forward

    @functools.wraps(forward)
    def overlook(*args: object, position_ids: Tensor | None = None, **kwargs: object) -> object:
        return forward(*args, **kwargs)

    monkeypatch.setattr(backbone, "forward", overlook)
    shared_start._tell.cache_clear()
    with caplog.at_level(logging.INFO, logger="peft_bituning"):
        for found, expected in both_ways(model, cuts()):
            torch.testing.assert_close(found, expected, **EXACT)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(
        "cuts of one history run as rows of their own: LlamaForCausalLM does not honour 4-D masks"
    )


def test_dropout_is_on_again_after_the_trial(make_model: Callable) -> None:
    model = make_model(prefix_encoder="static").train()
    model(**cuts())
    assert all(module.training for module in model.modules())


def test_only_prefixes_that_all_rows_have(make_model: Callable, make_inputs: Callable) -> None:
    """An M-Former makes a prefix for each row: the instruction behind it cannot be shared."""
    model = make_model()
    seen = tokens_of(model)
    collaborative = {"collaborative_embeds": torch.randn(ROWS, 2, 6)}
    model(**batch(), **collaborative)
    assert len(seen) == 1


def test_whole_rows_where_more_is_asked_for(make_model: Callable) -> None:
    model = make_model(prefix_encoder="static")
    seen = tokens_of(model)
    whole = ROWS * (3 + START + 8 + 1)
    model(**batch(), output_hidden_states=True)
    model(inputs_embeds=model.get_input_embeddings()(batch()["input_ids"]))
    one = {key: value[:1] for key, value in batch().items()}
    model(**one)
    assert seen == [whole, whole, whole // ROWS]
    tuned = make_model(prefix_encoder="static", task_type="CAUSAL_LM")
    assert tuned(**batch(), labels=batch()["input_ids"]).logits.shape[:2] == (ROWS, START + 8)


def test_under_checkpointing(make_model: Callable, caplog: pytest.LogCaptureFixture) -> None:
    model = make_model(prefix_encoder="static").train()
    assert why_not(model.get_base_model()) is None
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    seen = tokens_of(model)
    shared_start._tell.cache_clear()
    with caplog.at_level(logging.INFO, logger="peft_bituning"):
        for _ in range(2):
            model(**batch())
    assert seen == [ROWS * (3 + START + 8 + 1)] * 2
    assert [record.getMessage() for record in caplog.records] == [
        "every row computes its own prefix and instruction: gradient checkpointing keeps no keys and values"
    ]


def test_a_context_shorter_than_the_padding(make_model: Callable, make_llm: Callable) -> None:
    """Rows are cut to the longest one before they are run."""
    model = make_model(make_llm(max_position_embeddings=36), prefix_encoder="static")
    inputs = batch()
    inputs = {
        "input_ids": torch.cat([inputs["input_ids"], torch.zeros(ROWS, 9, dtype=torch.long)], dim=1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.zeros(ROWS, 9, dtype=torch.long)], dim=1),
    }
    for found, expected in both_ways(model, inputs):
        torch.testing.assert_close(found, expected, **EXACT)


def test_batches_that_start_alike_run_it_once_for_all(make_model: Callable) -> None:
    """Inside `keep_starts`, without gradients; a batch that starts otherwise runs a start of its own."""
    model = make_model(prefix_encoder="static").eval()
    seen = tokens_of(model)
    first, second, other = batch(0), batch(1), batch(2)
    second["input_ids"][:, :START] = first["input_ids"][:, :START]
    longer = {"input_ids": first["input_ids"].clone(), "attention_mask": torch.ones(ROWS, START + 8, dtype=torch.long)}
    longer["input_ids"][:, START : START + 4] = 5
    start, rest, order = 3 + START, ROWS * 9, (longer, first, second, longer, other, first)
    with torch.no_grad():
        expected = [model(**inputs).pooler_output for inputs in order]
        seen.clear()
        with keep_starts():
            found = [model(**inputs).pooler_output for inputs in order]
    assert seen == [start + 4, rest - 4 * ROWS, rest, rest, rest - 4 * ROWS, start, rest, start, rest]
    for one, same in zip(found, expected, strict=True):
        torch.testing.assert_close(one, same, **EXACT)
    seen.clear()
    with keep_starts():
        model(**first).pooler_output.sum().backward()
        with torch.no_grad():
            model(**first)
    assert seen == [start, rest] * 2
    assert model.base_model.prefix_encoder.embeddings.grad.abs().sum() > 0
