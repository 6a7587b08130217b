"""One update: every row has its weight, however rows fall into passes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from peft_bituning import BiTuningConfig
from peft_bituning.assembly import assemble
from peft_bituning.base_models import BaseModel
from peft_bituning.catalog import HistoryEncoder, ItemTable
from peft_bituning.data import Interactions, LeaveOneOut
from peft_bituning.errors import NonFiniteLossError
from peft_bituning.losses import catalog_contrastive_loss
from peft_bituning.recommenders import Precomputed
from peft_bituning.training import LaserArguments
from peft_bituning.training.stage_rows import StageRows
from peft_bituning.training.update import PassLoss, Update


class Lines:
    """Rows of `w x - y`, of weights and lengths of their own; some passes count how often they are run idle."""

    aux_loss_coef = 0.5
    num_virtual_tokens = 1
    users = None

    def __init__(self, weights: Sequence[int], aux: float | None = None) -> None:
        self.xs = torch.arange(1.0, len(weights) + 1)
        self.weights = list(weights)
        self.lengths = [3] * len(weights)
        self.aux = aux
        self.passes: list[list[int]] = []

    def loss(self, model: Any, rows: Sequence[int], is_idle: bool) -> PassLoss:
        assert not is_idle
        self.passes.append(list(rows))
        losses = (model(self.xs[list(rows)]) - 2 * self.xs[list(rows)]).square()
        total = (losses * torch.tensor([self.weights[row] for row in rows])).sum()
        return PassLoss(total, None if self.aux is None else model.weight.sum() * self.aux)


class Slope(torch.nn.Module):
    """A weight w."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([0.5]))

    def forward(self, xs: torch.Tensor) -> torch.Tensor:
        return self.weight * xs


def make(tmp_path: Path, **changes: Any) -> tuple[Slope, Update]:
    model = Slope()
    arguments = LaserArguments(str(tmp_path), warmup_ratio=0.0, max_grad_norm=1e9, **changes)
    return model, Update(Accelerator(cpu=True), model, arguments, 0.1, 10)  # type: ignore[arg-type]


@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation_steps": 2}, {"max_tokens_per_pass": 4}])
def test_the_weighted_mean_of_rows(tmp_path: Path, changes: dict[str, Any]) -> None:
    model, update = make(tmp_path, **changes)
    rows = Lines([1, 2, 3], aux=0.25)
    values = update.run(rows, [0, 1, 2], "here")
    xs, weights = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 3.0])
    mean = float((weights * ((0.5 - 2) * xs).square()).sum() / 6)
    assert values["contrastive_loss"] == pytest.approx(mean, rel=1e-6)
    assert values["aux_loss"] == pytest.approx(0.125) and values["loss"] == pytest.approx(mean + 0.5 * 0.125, rel=1e-6)
    gradient = float((weights * 2 * (0.5 - 2) * xs.square()).sum() / 6) + 0.5 * 0.25
    assert values["grad_norm"] == pytest.approx(abs(gradient), rel=1e-5)
    assert float(model.weight) == pytest.approx(0.6)  # AdamW's first step is as long as the rate
    assert values["tokens"] == 9 and values["learning_rate"] == pytest.approx(0.1)
    assert sorted(row for share in rows.passes for row in share) == [0, 1, 2]
    assert len(rows.passes) == (1 if not changes else 2 if "gradient_accumulation_steps" in changes else 3)


def test_nothing_is_updated_by_what_is_not_finite(tmp_path: Path) -> None:
    model, update = make(tmp_path)
    rows = Lines([1, 1])
    rows.xs[1] = float("nan")
    with pytest.raises(NonFiniteLossError, match="training stopped at here: loss nan .* x 0.0; the contrastive"):
        update.run(rows, [0, 1], "here")
    assert float(model.weight) == 0.5
    rows = Lines([1], aux=float("inf"))
    with pytest.raises(NonFiniteLossError, match="the load-balancing loss is not finite"):
        update.run(rows, [0], "here")


@pytest.fixture
def encoder(tiny_base: Callable[[], BaseModel], few: Interactions) -> HistoryEncoder:
    known = Precomputed(torch.randn(10, 8, generator=torch.Generator().manual_seed(0)))
    return assemble(tiny_base(), BiTuningConfig(num_experts=3), few.items, known, "no_instruction")


def test_rows_of_a_stage(encoder: HistoryEncoder, few: Interactions, tmp_path: Path) -> None:
    samples = LeaveOneOut(few.histories).training_samples("every_cut", 0, 0)[:6]
    table = ItemTable.from_embeddings(torch.randn(10, 32, generator=torch.Generator().manual_seed(1)))
    rows = StageRows(encoder, samples, table, LaserArguments(str(tmp_path), temperature=0.1), together=False)
    assert rows.lengths == [len(encoder.collator.prompts.encode(sample.history)) for sample in samples]
    assert rows.num_virtual_tokens == 9 and rows.aux_loss_coef == 0.01 and rows.users is None
    found = rows.loss(encoder.model, [4, 1], is_idle=False)
    output, _ = encoder.forward([samples[4].history, samples[1].history])
    targets = torch.tensor([samples[4].target, samples[1].target])
    expected = 2 * catalog_contrastive_loss(output["pooler_output"], table.embeddings, targets, 0.1)
    torch.testing.assert_close(found.total, expected)
    torch.testing.assert_close(found.aux, output.aux_loss)
    assert found.expert_rows is not None and found.expert_rows.sum() == 2 and len(found.expert_rows) == 3


def test_an_idle_process_counts_in_no_balance(encoder: HistoryEncoder, few: Interactions, tmp_path: Path) -> None:
    samples = LeaveOneOut(few.histories).training_samples("every_cut", 0, 0)[:2]
    table = ItemTable.from_embeddings(torch.randn(10, 32))
    rows = StageRows(encoder, samples, table, LaserArguments(str(tmp_path)), together=True)
    found = rows.loss(encoder.model, [0], is_idle=True)
    assert found.aux is not None and float(found.aux) == 0
    assert found.expert_rows is not None and found.expert_rows.sum() == 0
    assert rows.users == [sample.user for sample in samples]
