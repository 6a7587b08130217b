"""The frozen ID recommender of a run: loaded, or trained once and kept for a resumed run."""

import logging
import os
import shutil
from pathlib import Path

from accelerate import Accelerator

from ..data import LeaveOneOut
from ..errors import ConfigurationError
from ..recommenders import (
    IDRecommender,
    build_recommender,
    default_fit_arguments,
    fit_recommender,
    load_recommender,
)
from .arguments import RECOMMENDERS, LaserArguments

logger = logging.getLogger(__name__)


def provide_recommender(
    accelerator: Accelerator, arguments: LaserArguments, folder: Path, num_items: int, split: LeaveOneOut
) -> IDRecommender | None:
    """Load the recommender that the arguments name, or train one; every process gets the same weights.

    Args:
        accelerator: the main process trains, the others wait.
        arguments: `recommender` names a kind, a saved folder, or `none`.
        folder: where a trained one is kept; a resumed run takes it from there.
        num_items: I.
        split: training sequences, and validation users for early stopping.

    Returns:
        The recommender on the CPU, or None.

    Raises:
        ConfigurationError: neither a known kind nor a folder.
    """
    name = arguments.recommender
    if name == "none":
        return None
    if name not in RECOMMENDERS:
        if not Path(name).is_dir():
            raise ConfigurationError(
                f"recommender must be {', '.join(RECOMMENDERS)}, none, or the folder of a saved one, got {name!r}"
            )
        return load_recommender(name)
    if accelerator.is_main_process and not (arguments.resume and folder.is_dir()):
        model = build_recommender(name, num_items, seed=arguments.seed).to(accelerator.device)
        settings = default_fit_arguments(name)
        if arguments.recommender_epochs is not None:
            settings["epochs"] = arguments.recommender_epochs
        report = fit_recommender(
            model,
            split.train_sequences,
            split.samples("valid"),
            seed=arguments.seed,
            progress=not arguments.disable_tqdm,
            **settings,
        )
        logger.info("%s: best epoch %d, validation NDCG@10 %.4f", name, report.best_epoch, report.best_ndcg or 0.0)
        _save_whole(model.to("cpu"), folder)
    accelerator.wait_for_everyone()
    return load_recommender(folder)


def _save_whole(recommender: IDRecommender, folder: Path) -> None:
    """Save a recommender so that a kill leaves the whole folder or none."""
    temporary = folder.with_name(f"tmp-{folder.name}")
    recommender.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(temporary, folder)
