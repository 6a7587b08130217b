"""The forecast of a run: how much of the model is trained, and how long that takes on this machine."""

import logging
import time

from .report import count_parameters
from .stages import TwoStageTraining

logger = logging.getLogger(__name__)

LARGE_SHARE = 0.1  # of the language model's weights
LONG = 2 * 3600  # seconds
PROBED = 16  # users
BACKWARD = 2  # passes over frozen layers that the gradient of their inputs costs, in forward passes


def say_what_is_ahead(training: TwoStageTraining) -> None:
    """Say before training starts what is unusual about a run: short histories, texts alike, many weights, hours.

    All processes must call it; the main one speaks.

    Args:
        training: the training, its model prepared, so that a pass takes what it will take.
    """
    encoder, split = training.encoder, training.split
    is_main = training.accelerator.is_main_process
    if not (is_main or hasattr(encoder.model, "unshard")):  # FSDP2: a forward pass gathers weights from all processes
        return
    seconds = estimated_seconds(training) / training.accelerator.num_processes
    if not is_main:
        return
    if split.users_not_evaluated:
        logger.info("%d users with fewer than three events train only", split.users_not_evaluated)
    if twins := encoder.collator.prompts.twin_count:
        logger.info("%d items share their text with another and cannot be told apart by it", twins)
    trainable, total = count_parameters(encoder.model)
    share = trainable / max(1, total - trainable)
    if share > LARGE_SHARE:
        logger.warning(
            "the adapter trains %s weights, %.0f %% of the language model's %s; sizes of BiTuningConfig that are not "
            "given follow the language model's width",
            f"{trainable:,}",
            100 * share,
            f"{total - trainable:,}",
        )
    if seconds > LONG:
        logger.warning(
            "training takes about %.1f hours on this machine, by one batch; fewer rows (--max_samples_per_epoch, "
            "--max_validation_users) or epochs take less",
            seconds / 3600,
        )


def estimated_seconds(training: TwoStageTraining) -> float:
    """Estimate how long both stages take in one process, by the tokens of all epochs and the time of one batch.

    `seconds = (tokens encoded + 3 tokens trained) x seconds per token`, virtual tokens among them; early stopping
    and what rows share are not counted.
    """
    encoder, arguments = training.encoder, training.arguments
    virtual = encoder.model.num_virtual_tokens + 1
    users = [sample.history for sample in training.validation]
    rows = [sample.history for sample in training.epoch_samples(0)]
    items = [[item] for item in range(training.num_items)]
    tokens = {
        name: sum(encoder.collator.length(history, kind) + virtual for history in histories)
        for name, kind, histories in (("users", "user", users), ("rows", "user", rows), ("items", "item", items))
    }
    probe = users[:PROBED]
    encoder.encode(probe)  # nothing of the first pass's own work is counted
    started = time.perf_counter()
    encoder.encode(probe)
    per_token = (time.perf_counter() - started) / sum(encoder.collator.length(each) + virtual for each in probe)
    epochs = arguments.stage1_epochs + arguments.stage2_epochs
    encoded = arguments.stage1_epochs * tokens["items"] + epochs * tokens["users"]
    return per_token * (encoded + (1 + BACKWARD) * epochs * tokens["rows"])
