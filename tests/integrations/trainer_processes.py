"""Train with transformers' Trainer: `accelerate launch ... trainer_processes.py TRAINED BASE_MODEL OUTPUT ROWS`."""

import copy
import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from peft import get_peft_model
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments

from peft_bituning import LaserRecommender
from peft_bituning.catalog import HistoryEncoder, ItemTable
from peft_bituning.data import LeaveOneOut
from peft_bituning.integrations.trainer import CatalogLoss, SampleCollator


def main(trained: Path, base_model: Path, folder: Path, rows: int) -> None:
    """Train a fresh adapter for three updates and save it."""
    torch.set_num_threads(1)
    recommender = LaserRecommender.from_pretrained(trained, base_model=base_model, device="cpu")
    config = copy.deepcopy(recommender.model.peft_config["default"])
    config.inference_mode = False
    base = recommender.model.unload()
    torch.manual_seed(0)
    model = get_peft_model(base, config)
    encoder = HistoryEncoder(
        model, recommender.encoder.collator, recommender.encoder.id_recommender, torch.device("cpu")
    )
    table = ItemTable.from_embeddings(encoder.encode_items(len(recommender.items)))
    count = len(recommender.items)
    histories = [[(user * 5 + step) % count for step in range(4 + user % 4)] for user in range(12)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        remove_unused_columns=False,
        per_device_train_batch_size=rows,
        num_train_epochs=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not os.environ.get("ACCELERATE_USE_DEEPSPEED"),
    )
    # accelerate shards weights on accelerators alone: let a CPU pass for one.
    if os.environ.get("ACCELERATE_USE_FSDP"):
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    if os.environ.get("ACCELERATE_USE_DEEPSPEED"):
        rank = int(os.environ["RANK"])
        PartialState._shared_state.update(num_processes=2, process_index=rank, local_process_index=rank)
    samples = LeaveOneOut(histories).samples("valid")
    trainer = Trainer(model, arguments, SampleCollator(encoder), samples, compute_loss_func=CatalogLoss(table))
    trainer.train()
    trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        (folder / "losses.json").write_text(json.dumps(losses))
        sharded = [
            name for name, value in model.named_parameters() if isinstance(value, DTensor) or hasattr(value, "ds_id")
        ]
        (folder / "sharded.json").write_text(json.dumps(sharded))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
