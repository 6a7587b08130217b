"""`torch.compile` of a Bi-Tuned model: nothing falls out of the graph, and lengths do not compile one by one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

LENGTHS = (8, 40, 8, 24)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def make_batch(length: int, seed: int = 0) -> dict[str, Tensor]:
    """Return four ragged rows of up to `length` tokens, with 0 to 4 items each."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, length + 1, (4, 1), generator=generator)
    items = torch.randint(0, 5, (4, 1), generator=generator)
    return {
        "input_ids": torch.randint(3, 97, (4, length), generator=generator),
        "attention_mask": (torch.arange(length) < lengths).long(),
        "collaborative_embeds": torch.randn(4, 4, 6, generator=generator),
        "collaborative_mask": (torch.arange(4) < items).long(),
    }


def step(model: Any, own: list[Tensor], inputs: dict[str, Tensor]) -> list[Tensor]:
    """Return the embeddings, the loss and the gradients of one step."""
    output = model(**inputs)
    loss = output.pooler_output.square().sum() if output.get("loss") is None else output.loss
    if output.aux_loss is not None:
        loss = loss + output.aux_loss
    found = torch.autograd.grad(loss, own, allow_unused=True)
    return [output.pooler_output.detach(), loss.detach(), *(each for each in found if each is not None)]


def check(
    model: PeftModel, backend: Any, fullgraph: bool = True, with_labels: bool = False, tolerance: float = 0.0
) -> None:
    """Compare compiled steps with eager ones, over lengths that come and go; a broken graph is an error."""
    own = [each for each in model.parameters() if each.requires_grad]
    compiled = torch.compile(model, backend=backend, fullgraph=fullgraph)
    for seed, length in enumerate(LENGTHS):
        inputs = make_batch(length, seed)
        if with_labels:
            inputs["labels"] = inputs["input_ids"]
        expected, found = step(model, own, inputs), step(compiled, own, inputs)
        assert len(expected) == len(found) >= 3
        for left, right in zip(expected, found, strict=True):
            torch.testing.assert_close(right, left, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("encoder", "pooling"),
    [
        pytest.param("mformer", "suffix", marks=pytest.mark.slow),
        ("linear", "eos"),
        ("static", "mean"),
        ("static", "suffix"),
    ],
)
def test_one_graph_for_all_lengths(make_model: Callable, encoder: str, pooling: str) -> None:
    """The first length compiles, a second one compiles again for any; no operation breaks the graph."""
    counter = CompileCounterWithBackend("aot_eager")
    check(make_model(prefix_encoder=encoder, pooling=pooling).train(), counter)
    assert counter.frame_count == 2


@pytest.mark.slow
def test_with_labels(make_model: Callable) -> None:
    """The hook that catches the states beside the logits breaks the graph twice."""
    model = make_model(task_type="CAUSAL_LM", prefix_encoder="static").train()
    check(model, "aot_eager", fullgraph=False, with_labels=True)


def test_the_backbone_alone(make_model: Callable, make_llm: Callable) -> None:
    """Compiled before the adapter is put around it."""
    llm = make_llm()
    counter = CompileCounterWithBackend("aot_eager")
    llm.model.compile(backend=counter, fullgraph=True)
    model, plain = make_model(llm).train(), make_model().train()
    for seed, length in enumerate(LENGTHS):
        inputs = make_batch(length, seed)
        found = step(model, [each for each in model.parameters() if each.requires_grad], inputs)
        expected = step(plain, [each for each in plain.parameters() if each.requires_grad], inputs)
        for left, right in zip(expected, found, strict=True):
            torch.testing.assert_close(right, left, atol=1e-6, rtol=1e-6)
    assert counter.frame_count == 2


@pytest.mark.slow
def test_inductor(make_model: Callable) -> None:
    check(make_model(prefix_encoder="linear").train(), "inductor", tolerance=1e-3)
