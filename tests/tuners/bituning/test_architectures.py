"""Language models of every kind: what holds for one holds for all; docs/architectures.md is written here."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import Tensor

from peft_bituning import BiTuningConfig
from peft_bituning.tuners.rows.shared_start import why_no_slots, why_not

from ..architectures import ARCHITECTURES, Architecture

CHECKS = {
    "padding": "left = right padding",
    "ragged": "ragged batch = single rows",
    "gradients": "gradients reach prefix and suffix alone",
    "checkpointing": "gradient checkpointing, same gradients",
    "reload": "reloaded, same bits",
    "generate": "generate = uncached loop",
    "start": "common start run once = whole rows",
    "nested": "one pass a user = a row a cut",
}
HEADER = """# Architectures

Tiny random models of {count} kinds, transformers {version}; `-` is what a model does not offer. The test run itself
writes this table:

    pytest tests/tuners/bituning/test_architectures.py -m "slow or not slow" --architectures-table docs/architectures.md

Figures are the largest difference of an embedding (of a gradient, relative to the largest one, under checkpointing; of
either, relative to the largest one, with the common start of a batch run once, and with all cuts of a history run in
one row; "whole" where they are not).

"""

every_architecture = pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(architecture, id=architecture.name, marks=[] if architecture.in_ci else [pytest.mark.slow])
        for architecture in ARCHITECTURES
    ],
)
Record = Callable[[Architecture, str, str], None]


@pytest.fixture(scope="module")
def record(request: pytest.FixtureRequest) -> Iterator[Record]:
    """Return what notes a check that held; at the end the table is written where the command line asks for it."""
    results: dict[tuple[str, str], str] = {}
    yield lambda architecture, check, value: results.__setitem__((architecture.name, check), value)
    path = request.config.getoption("--architectures-table")
    if path is None:
        return
    lines = ["| model | kind | " + " | ".join(CHECKS.values()) + " |", "| --- " * (len(CHECKS) + 2) + "|"]
    for architecture in ARCHITECTURES:
        found = [results.get((architecture.name, check), "**fails**") for check in CHECKS]
        lines.append(f"| {architecture.name} | {architecture.kind} | " + " | ".join(found) + " |")
    header = HEADER.format(count=len(ARCHITECTURES), version=transformers.__version__)
    Path(path).write_text(header + "\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def tuned(make_config: Callable[..., BiTuningConfig]) -> Callable[..., PeftModel]:
    """Return a maker of Bi-Tuned models of an architecture."""

    def make(architecture: Architecture, **changes: Any) -> PeftModel:
        model = architecture.build()
        torch.manual_seed(1)
        return get_peft_model(model, make_config(**changes)).eval()

    return make


@every_architecture
def test_padding(architecture: Architecture, tuned: Callable, make_inputs: Callable, record: Record) -> None:
    model, inputs = tuned(architecture), make_inputs()
    with torch.no_grad():
        difference = _largest(model(**inputs).pooler_output, model(**_left_padded(inputs)).pooler_output)
    assert difference <= 1e-6
    record(architecture, "padding", f"{difference:.0e}" if difference else "0")


@every_architecture
def test_ragged(architecture: Architecture, tuned: Callable, make_inputs: Callable, record: Record) -> None:
    model, inputs = tuned(architecture), make_inputs()
    with torch.no_grad():
        together = model(**inputs).pooler_output
        alone = torch.cat([model(**_row(inputs, row)).pooler_output for row in range(len(together))])
    assert _largest(together[0], together[1]) > 1e-2  # or nothing is seen
    difference = _largest(together, alone)
    assert difference < 1e-5 * max(1.0, float(together.abs().max()))
    record(architecture, "ragged", f"{difference:.0e}")


@every_architecture
def test_gradients(architecture: Architecture, tuned: Callable, make_inputs: Callable, record: Record) -> None:
    model = tuned(architecture).train()
    gradients = _gradients(model, make_inputs())
    assert gradients and all("bituning_" in name for name in gradients)
    for part in ("suffix", "projection.weight", "queries"):
        assert max(float(value.abs().max()) for name, value in gradients.items() if part in name) > 0
    record(architecture, "gradients", "yes")


@every_architecture
def test_checkpointing(architecture: Architecture, tuned: Callable, make_inputs: Callable, record: Record) -> None:
    model, inputs = tuned(architecture).train(), make_inputs()
    plain = _gradients(model, inputs)
    if not model.get_base_model().supports_gradient_checkpointing:
        with pytest.raises(ValueError, match="does not support gradient checkpointing"):
            model.gradient_checkpointing_enable()
        record(architecture, "checkpointing", "-")
        return
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    saved = _gradients(model, inputs)
    assert plain.keys() == saved.keys()
    scale = max(float(value.abs().max()) for value in plain.values())
    difference = max(_largest(plain[name], saved[name]) for name in plain) / scale
    assert difference < 1e-5
    record(architecture, "checkpointing", f"{difference:.0e}" if difference else "0")


@every_architecture
def test_reload(
    architecture: Architecture, tuned: Callable, make_inputs: Callable, record: Record, tmp_path: Path
) -> None:
    model, inputs = tuned(architecture), make_inputs()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(architecture.build(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(model(**inputs).pooler_output, again(**inputs).pooler_output)
    record(architecture, "reload", "yes")


@every_architecture
def test_generate(architecture: Architecture, tuned: Callable, make_inputs: Callable, record: Record) -> None:
    model, inputs = tuned(architecture, task_type="CAUSAL_LM"), _row(make_inputs(), 0)
    model.generation_config.eos_token_id = None
    ids, expected = inputs["input_ids"], []
    with torch.no_grad():
        for _ in range(4):
            best = model(**(inputs | {"input_ids": ids}), labels=ids).logits[0, -1].argmax()
            expected.append(int(best))
            ids = torch.cat([ids, best.view(1, 1)], dim=1)
    found = model.generate(**inputs, do_sample=False, max_new_tokens=4)
    assert found.tolist() == [expected]
    record(architecture, "generate", "yes")


@every_architecture
def test_shared_start(architecture: Architecture, tuned: Callable, record: Record) -> None:
    """With a static prefix, prefix and instruction go through the model once a batch."""
    model = tuned(architecture, prefix_encoder="static")
    instruction = torch.randint(3, 97, (1, 20), generator=torch.Generator().manual_seed(5)).expand(4, -1)
    tails = torch.randint(3, 97, (4, 6), generator=torch.Generator().manual_seed(6))
    lengths = torch.tensor([[26], [23], [21], [20]])
    inputs = {
        "input_ids": torch.cat([instruction, tails], dim=1),
        "attention_mask": (torch.arange(26) < lengths).long(),
    }
    passes: list[int] = []
    model.base_model.backbone.register_forward_hook(lambda *_: passes.append(1))
    found = _embeddings_and_gradients(model, inputs)
    expected_passes = 1 if why_not(model.get_base_model()) else 2
    assert len(passes) == expected_passes
    model.base_model.share_start = False
    expected = _embeddings_and_gradients(model, inputs)
    assert len(passes) == expected_passes + 1
    if expected_passes == 1:
        record(architecture, "start", "whole")
        return
    difference = max(_largest(one, two) / float(two.abs().max()) for one, two in zip(found, expected, strict=True))
    assert difference < 1e-4
    record(architecture, "start", f"{difference:.0e}")


@every_architecture
def test_nested(architecture: Architecture, tuned: Callable, record: Record) -> None:
    """With a static prefix, the cuts of a history go through the model in one row; the model is tried for it first."""
    model = tuned(architecture, prefix_encoder="static")
    text = torch.randint(3, 97, (1, 40), generator=torch.Generator().manual_seed(5)).expand(4, -1)
    inputs = {"input_ids": text, "attention_mask": (torch.arange(40) < torch.tensor([[26], [40], [33], [20]])).long()}
    possible = why_not(model.get_base_model()) is None and why_no_slots(model.get_base_model()) is None
    rows: list[int] = []
    model.base_model.backbone.register_forward_pre_hook(
        lambda _m, _a, inputs: rows.append(len(inputs["attention_mask"])), with_kwargs=True
    )
    found = _embeddings_and_gradients(model, inputs)
    model.base_model.share_start = False
    expected = _embeddings_and_gradients(model, inputs)
    assert rows[-2:] == [1 if possible else 4, 4]
    if not possible:  # both ran whole rows
        record(architecture, "nested", "whole")
        return
    difference = max(_largest(one, two) / float(two.abs().max()) for one, two in zip(found, expected, strict=True))
    assert difference < 1e-4
    record(architecture, "nested", f"{difference:.0e}")


def _embeddings_and_gradients(model: PeftModel, inputs: dict[str, Tensor]) -> list[Tensor]:
    output = model(**inputs).pooler_output
    loss = (output * torch.linspace(-1, 1, output.shape[-1])).sum()
    own = [value for value in model.parameters() if value.requires_grad]
    return [output.detach(), *torch.autograd.grad(loss, own)]


def _left_padded(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    order = torch.argsort(inputs["attention_mask"], dim=1, stable=True)
    return inputs | {key: inputs[key].gather(1, order) for key in ("input_ids", "attention_mask")}


def _row(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """Return one row without its padding."""
    real = inputs["attention_mask"][row].bool()
    return {
        "input_ids": inputs["input_ids"][row, real][None],
        "collaborative_embeds": inputs["collaborative_embeds"][row : row + 1],
        "collaborative_mask": inputs["collaborative_mask"][row : row + 1],
    }


def _largest(one: Tensor, two: Tensor) -> float:
    return float((one - two).abs().max())


def _gradients(model: PeftModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(0)  # some models drop out
    output = model(**inputs)
    weights = torch.linspace(-1, 1, output.pooler_output.shape[-1])
    ((output.pooler_output * weights).sum() + output.aux_loss).backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
