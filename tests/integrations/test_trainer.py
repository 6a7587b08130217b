"""transformers' Trainer makes the loop's updates."""

import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from peft_bituning.catalog import HistoryEncoder, ItemTable
from peft_bituning.data import LeaveOneOut, Sample
from peft_bituning.integrations.trainer import CatalogLoss, SampleCollator
from peft_bituning.losses import catalog_contrastive_loss, load_balancing_loss
from peft_bituning.training import LaserArguments
from peft_bituning.training.stage_rows import StageRows
from peft_bituning.training.update import Update
from peft_bituning.training.update_plan import share_of

pytestmark = pytest.mark.timeout(900)  # processes of their own

SCRIPT = Path(__file__).with_name("trainer_processes.py")
ROOT = Path(__file__).parents[2]
NO_DEEPSPEED = importlib.util.find_spec("deepspeed") is None
RATE, ROWS, ACCUMULATION = 1e-2, 4, 2


class Rows(Dataset):
    """Samples as a dataset."""

    def __init__(self, samples: list[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, row: int) -> Sample:
        return self.samples[row]


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Any:
    """Forget the accelerator of other tests: Trainer's settings would not be taken."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def samples(trained) -> list[Sample]:
    """Return 11 rows, so that the third update has three."""
    return LeaveOneOut(trained.data.histories).training_samples("every_cut", 0, 0)[:11]


def start(trained, tiny_base, headless: bool = False) -> tuple[PeftModel, HistoryEncoder, ItemTable]:
    torch.manual_seed(0)
    base = tiny_base().model
    config = copy.deepcopy(trained.recommender.model.peft_config["default"])
    config.inference_mode, config.router_aux_loss_coef = False, 0.3
    model = get_peft_model(base.model if headless else base, config)
    kept = trained.recommender.encoder
    encoder = HistoryEncoder(model, kept.collator, kept.id_recommender, torch.device("cpu"))
    table = ItemTable.from_embeddings(encoder.encode_items(len(trained.data.items)))
    return model.train(), encoder, table


def weights(model: PeftModel) -> dict[str, torch.Tensor]:
    found = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    return {name.split("virtual_tokens.")[1]: value for name, value in found.items() if "key.bias" not in name}


def train(model: PeftModel, encoder: HistoryEncoder, loss: CatalogLoss, rows: list[Sample], folder: Path) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        remove_unused_columns=False,
        per_device_train_batch_size=ROWS // ACCUMULATION,
        gradient_accumulation_steps=ACCUMULATION,
        num_train_epochs=1,
        learning_rate=RATE,
        lr_scheduler_type="cosine",
        weight_decay=0.0,
        max_grad_norm=1.0,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, SampleCollator(encoder), Rows(rows), compute_loss_func=loss)
    trainer.train()
    return trainer


@pytest.mark.parametrize("headless", [False, True])
def test_the_loops_updates(trained, tiny_base, samples: list[Sample], headless: bool, tmp_path: Path) -> None:
    arguments = LaserArguments.paper(
        str(tmp_path),
        learning_rate=RATE,
        weight_decay=0.0,
        warmup_ratio=0.0,
        gradient_accumulation_steps=ACCUMULATION,
        max_grad_norm=1.0,
    )
    model, encoder, table = start(trained, tiny_base, headless)
    step = Update(Accelerator(cpu=True), model, arguments, RATE, 3)
    rows = StageRows(encoder, samples, table, arguments, together=False)
    updates = [list(range(first, min(first + ROWS, 11))) for first in range(0, 11, ROWS)]
    losses = [step.run(rows, update, "here")["loss"] for update in updates]
    expected = weights(model)

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    order = [row for update in updates for share in share_of(update, 0, 1, ACCUMULATION) for row in share]
    again, encoder, table = start(trained, tiny_base, headless)
    before = weights(again)
    loss = CatalogLoss(table, arguments.temperature, 0.3)
    trainer = train(again, encoder, loss, [samples[row] for row in order], tmp_path)
    found = weights(again)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(losses, abs=1e-4)
    assert found.keys() == expected.keys()
    assert max(float((found[name] - before[name]).abs().max()) for name in found) > 1e-2
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=0, msg=name)


def test_the_loss_by_itself(trained, tiny_base, samples: list[Sample]) -> None:
    model, encoder, table = start(trained, tiny_base)
    batch = SampleCollator(encoder)(samples[:3])
    labels = batch.pop("labels")
    assert labels.tolist() == [[-100, sample.target] for sample in samples[:3]]
    output = model(**batch)
    contrastive = catalog_contrastive_loss(output.pooler_output, table.embeddings, labels[:, 1], 0.1)
    balance = load_balancing_loss(output.router_logits, batch["collaborative_mask"])
    expected = contrastive + 0.3 * balance
    torch.testing.assert_close(CatalogLoss(table, 0.1, 0.3)(output, labels), expected)
    torch.testing.assert_close(CatalogLoss(table, 0.1, 0.3)(output, labels, 6), expected / 2)
    torch.testing.assert_close(CatalogLoss(table, 0.1, 0.3, chunk_size=5)(output, labels), expected)


@pytest.fixture(scope="module")
def folders(trained, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Train on one process and on two, four rows an update."""
    root = tmp_path_factory.mktemp("trainer")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "DS_ACCELERATOR": "cpu"}
    started = []
    for kind in ("one", "ddp", "fsdp2", "zero3"):
        if kind == "zero3" and NO_DEEPSPEED:
            continue
        settings = ["--num_processes", "1", "--cpu"]
        if kind != "one":
            settings = ["--config_file", f"examples/configs/accelerate/{kind}.yaml", "--main_process_port", "0"]
        rows = ROWS if kind == "one" else ROWS // 2
        places = [str(path) for path in (trained.folder, trained.base_folder, root / kind)]
        command = [sys.executable, "-m", "accelerate.commands.launch", *settings, str(SCRIPT), *places, str(rows)]
        log = (root / f"{kind}.log").open("w")
        own = environment | ({} if kind == "zero3" else {"ACCELERATE_USE_CPU": "1"})
        started.append((kind, subprocess.Popen(command, env=own, stdout=log, stderr=log, cwd=ROOT)))
    for kind, process in started:
        assert process.wait(timeout=840) == 0, (root / f"{kind}.log").read_text()[-3000:]
    return {kind: root / kind for kind, _ in started}


@pytest.mark.parametrize(
    "kind", ["ddp", "fsdp2", pytest.param("zero3", marks=pytest.mark.skipif(NO_DEEPSPEED, reason="needs deepspeed"))]
)
def test_two_processes(folders: dict[str, Path], kind: str) -> None:
    """Launched with the configurations that are shipped; the adapter is saved whole."""
    one, two = (json.loads((folders[each] / "losses.json").read_text()) for each in ("one", kind))
    assert len(one) == 3 and one == pytest.approx(two, abs=1e-4)
    sharded = json.loads((folders[kind] / "sharded.json").read_text())
    assert any("q_proj" in name for name in sharded) == (kind != "ddp")
    one, two = (load_file(folders[each] / "adapter_model.safetensors") for each in ("one", kind))
    assert one.keys() == two.keys()
    for name in one:
        if "key.bias" not in name:  # whose gradient is rounding alone
            torch.testing.assert_close(one[name], two[name], atol=1e-3, rtol=0, msg=name)
