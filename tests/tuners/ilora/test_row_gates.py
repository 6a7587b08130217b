"""Gates on their way to the layers: rows, copies, threads, nested passes and recomputation."""

import copy
import pickle
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

from peft_bituning.errors import InputError, UnsupportedModelError
from peft_bituning.tuners.ilora.row_gates import RowGates, RowsOnTheWay


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 10_000),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 3),
    st.booleans(),
)
def test_scale_against_numpy(seed: int, count: int, copies: int, width: int, share: int, flat: bool) -> None:
    """Rows that generation repeats stand one after the other, and so do the tokens of flattened ones."""
    generator = np.random.default_rng(seed)
    gates = generator.random((count, 3)).astype(np.float32)
    states = generator.normal(size=(count * copies, width, 3 * share)).astype(np.float32)
    expected = states.copy()
    for row in range(count * copies):
        for expert in range(3):
            expected[row, :, expert * share : (expert + 1) * share] *= gates[row // copies, expert]
    given_states = torch.tensor(states.reshape(-1, 3 * share) if flat else states)
    row_gates = RowGates()
    with row_gates.use(RowsOnTheWay(torch.tensor(gates), width if copies == 1 else None)):
        found = row_gates.scale(given_states)
    np.testing.assert_allclose(found.numpy().reshape(expected.shape), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "width"),
    [((5, 2, 8), 2), ((4, 2, 8), 2), ((7, 8), 4), ((6, 8), 4), ((3, 8), None)],
    ids=["not a multiple", "time first", "some tokens", "some tokens, a multiple", "some tokens in generate"],
)
def test_states_that_are_not_rows_are_refused(shape: tuple[int, ...], width: int | None) -> None:
    row_gates, message = RowGates(), "tokens of 2 rows one row after the other, got states of shape"
    rows = RowsOnTheWay(torch.full((2, 4), 0.25), width)
    with row_gates.use(rows), pytest.raises(UnsupportedModelError, match=message):
        row_gates.scale(torch.ones(shape))


def test_outside_a_pass(make_model: Callable, make_inputs: Callable) -> None:
    model, inputs = make_model(), make_inputs()
    model(**inputs)
    with pytest.raises(InputError, match="must know the gates of its rows, got none; call the PEFT model itself, with"):
        model.get_base_model()(inputs["input_ids"])
    assert model.base_model._layer.row_gates.rows is None


def test_passes_nest(make_model: Callable, make_inputs: Callable) -> None:
    """A pass within a pass has its own rows, and gives those of the outer one back, after an error too."""
    model, inputs = make_model(), make_inputs()
    expected = model(**inputs).pooler_output
    inner: list[Tensor] = []

    def encode_another(*_: object) -> None:
        if not inner:
            inner.append(torch.empty(0))
            inner[0] = model(**{key: value[:2] for key, value in inputs.items()}).pooler_output
            with pytest.raises(InputError, match="collaborative_embeds must be given"):
                model(inputs["input_ids"])

    model.get_base_model().model.layers[1].register_forward_pre_hook(encode_another)
    assert torch.equal(model(**inputs).pooler_output, expected)
    torch.testing.assert_close(inner[0], expected[:2])


def test_threads_do_not_see_each_other(make_model: Callable, make_inputs: Callable) -> None:
    model, both = make_model(), threading.Barrier(2, timeout=30)
    batches = [make_inputs(seed) for seed in (0, 1)]
    expected = [model(**batch).pooler_output.detach() for batch in batches]

    def meet(*_: object) -> None:
        both.wait()

    layers = model.get_base_model().model.layers
    layers[0].register_forward_pre_hook(meet)
    layers[1].register_forward_hook(meet)  # neither is done before the other
    found: dict[int, Tensor] = {}

    def encode(number: int) -> None:
        with torch.no_grad():
            found[number] = model(**batches[number]).pooler_output

    threads = [threading.Thread(target=encode, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in (0, 1):
        torch.testing.assert_close(found[number], expected[number])


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_copy_starts_empty(copier: Callable) -> None:
    row_gates = RowGates()
    with row_gates.use(RowsOnTheWay(torch.ones(1, 4), None)):
        assert copier(row_gates).rows is None


def gradients(model: torch.nn.Module, batches: list[dict[str, Tensor]], thread: bool = False) -> dict[str, Tensor]:
    """Return the gradients of several passes with one backward pass, by another thread where asked (as on a GPU)."""
    model.zero_grad()
    outputs = [model(**batch).pooler_output for batch in batches]
    loss = torch.stack([(each * torch.linspace(-1, 1, each.shape[1])).sum() for each in outputs]).sum()
    if thread:
        worker = threading.Thread(target=loss.backward)
        worker.start()
        worker.join()
    else:
        loss.backward()
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.requires_grad}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["Llama", "GPT-2", "Qwen2"])
def test_gradient_checkpointing_gives_the_same_gradients(
    make_model: Callable, make_inputs: Callable, make_llm: Callable, family: str, reentrant: bool
) -> None:
    """Also of two passes before one backward pass, each with gates of its own, and of rows run without gradients."""
    no_dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0} if family == "GPT-2" else {}
    model = make_model(make_llm(family, **no_dropout), pooling="suffix").train()
    batches = [make_inputs(0), make_inputs(1)]
    expected = gradients(model, batches)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    runs: list[int] = []
    layer = next(each for each in model.modules() if type(each).__name__ == "Linear" and hasattr(each, "lora_A"))
    layer.register_forward_hook(lambda *_: runs.append(1))
    with torch.no_grad():
        encoded = model(**batches[0]).pooler_output
    for thread in (False, True):
        runs.clear()
        found = gradients(model, batches, thread)
        assert len(runs) == 4  # twice each
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    assert float(expected["base_model.model.instance_gates.ilora_gate.default.weight"].abs().max()) > 1e-3
    torch.testing.assert_close(encoded, model(**batches[0]).pooler_output)


@pytest.mark.parametrize("kind", [CheckpointImpl.REENTRANT, CheckpointImpl.NO_REENTRANT])
def test_checkpointing_by_a_wrapper_does_too(make_model: Callable, make_inputs: Callable, kind: CheckpointImpl) -> None:
    """As accelerate does with FSDP."""
    model, batches = make_model().train(), [make_inputs(0), make_inputs(1)]
    expected = gradients(model, batches)
    layers = model.get_base_model().model.layers
    for number, layer in enumerate(layers):
        layers[number] = checkpoint_wrapper(layer, checkpoint_impl=kind)
    found = {name.replace("_checkpoint_wrapped_module.", ""): each for name, each in gradients(model, batches).items()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_checkpointing_is_left_as_it_was(make_model: Callable, make_inputs: Callable) -> None:
    model = make_model().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    layer = model.get_base_model().model.layers[0]
    before = layer._gradient_checkpointing_func
    model(**make_inputs())
    with pytest.raises(InputError):
        model(**make_inputs(attention_mask=torch.ones(3, 9)))
    assert layer._gradient_checkpointing_func is before
