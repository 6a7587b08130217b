"""What an epoch costs, counted instead of timed: token slots, operations, passes, the language-model head."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from peft_bituning import BiTuningConfig
from peft_bituning.base_models import BaseModel
from peft_bituning.catalog import HistoryEncoder, ItemTable
from peft_bituning.data import PRESETS, ItemCatalog, LeaveOneOut, PromptEncoder
from peft_bituning.data.collator import HistoryCollator
from peft_bituning.training import LaserArguments
from peft_bituning.training.stage_rows import StageRows
from peft_bituning.training.update import Update
from peft_bituning.training.update_plan import plan_updates

ITEMS, PREFIX, ROWS = 40, 4, 8


class Epoch:
    """An epoch of real updates over made-up histories: most short, some long; it counts what the model is given."""

    def __init__(self, base: BaseModel, folder: Path, users: int = 60, **changes: Any) -> None:
        generator = random.Random(1)
        catalog = ItemCatalog.from_records(
            {"item_id": f"i{n}", "title": " ".join(["thing"] * generator.randint(2, 6)), "brand": f"b{n}"}
            for n in range(ITEMS)
        )
        histories = [
            [generator.randrange(ITEMS) for _ in range(4 + min(8, int(generator.expovariate(1 / 3))))]
            for _ in range(users)
        ]
        torch.manual_seed(0)
        config = BiTuningConfig(prefix_encoder="static", num_virtual_tokens=PREFIX)
        self.model = get_peft_model(base.model, config)
        self.prompts = PromptEncoder(PRESETS["paper"], base.tokenizer, catalog)
        collator = HistoryCollator(self.prompts, 0, 1)
        encoder = HistoryEncoder(self.model, collator, None, torch.device("cpu"))
        self.samples = LeaveOneOut(histories).training_samples("every_cut", 0, 0)
        arguments = LaserArguments.paper(str(folder), **changes)
        self.update = Update(Accelerator(cpu=True), self.model, arguments, 0.0, 99)
        table = ItemTable.from_embeddings(torch.randn(ITEMS, base.model.config.hidden_size))
        self.rows = StageRows(encoder, self.samples, table, arguments, together=True)
        self.updates = plan_updates(self.rows.lengths, ROWS, 0, 0, self.rows.users)
        self.slots: list[int] = []
        base.model.model.layers[0].register_forward_pre_hook(
            lambda _m, inputs: self.slots.append(inputs[0].shape[0] * inputs[0].shape[1])
        )
        self.heads: list[int] = []
        base.model.lm_head.register_forward_hook(lambda *_: self.heads.append(1))

    def run(self) -> list[float]:
        """Make every update and return the losses."""
        return [self.update.run(self.rows, update, "here")["loss"] for update in self.updates]

    def needed(self) -> int:
        """Return the tokens of the epoch that differ: prefix and instruction once an update, each user's items once."""
        opening, total = len(self.prompts.encode([])), 0
        for update in self.updates:
            newest: dict[int, tuple[int, ...]] = {}
            for row in update:
                sample = self.samples[row]
                newest[sample.user] = max(newest.get(sample.user, ()), sample.history, key=len)
            total += PREFIX + opening + len(update)
            total += sum(len(self.prompts.encode(history)) - opening for history in newest.values())
        return total


@pytest.fixture
def epoch(tiny_base: Callable[[], BaseModel], tmp_path: Path) -> Callable[..., Epoch]:
    """Return a maker of epochs."""
    return lambda **changes: Epoch(tiny_base(), tmp_path, **changes)


def test_slots_and_passes(epoch: Callable[..., Epoch]) -> None:
    """The start runs once an update, each user once behind it, with little padding; no logits are made."""
    tried = epoch(users=400)
    tried.run()
    trial = [2 * 33, 2, 31 + 1]  # the model is tried for 4-D masks once
    assert [tried.slots.count(slots) for slots in trial] >= [1, 1, 1]
    slots = sum(tried.slots) - sum(trial)
    assert slots / tried.needed() <= 1.05
    rows = sum(len(tried.prompts.encode(sample.history)) + PREFIX + 1 for sample in tried.samples)
    assert slots < 0.4 * rows
    assert tried.heads == []


def test_operations(epoch: Callable[..., Epoch]) -> None:
    """Frozen weights cost 2N operations a token forward and 2N backward; the rest is attention."""
    tried = epoch()
    tried.run()  # the trial of 4-D masks is over
    tried.slots.clear()
    with FlopCounterMode(display=False) as counter:
        tried.run()
    weights = sum(
        value.numel() for name, value in tried.model.named_parameters() if ".layers." in name and value.ndim == 2
    )
    assert counter.get_total_flops() <= 1.2 * 4 * weights * tried.needed()


def test_a_budget_changes_passes_not_losses(epoch: Callable[..., Epoch]) -> None:
    whole, cut = epoch(), epoch(max_tokens_per_pass=150)
    expected, found = whole.run(), cut.run()
    assert found == pytest.approx(expected, abs=1e-5)
    assert max(cut.slots) < max(whole.slots)
    assert len(cut.slots) > len(whole.slots)
