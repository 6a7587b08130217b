"""The frozen ID recommender of a run: loaded, or trained once and kept for a resumed run."""

import json
import logging
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..artifacts import differences, whole_folder
from ..data import Interactions, LeaveOneOut
from ..errors import CheckpointError, ConfigurationError
from ..recommenders import IDRecommender, build_recommender, default_fit_arguments, fit_recommender, load_recommender
from .arguments import ID_RECOMMENDERS, LaserArguments

logger = logging.getLogger(__name__)

ORIGIN_FILE = "origin.json"


def provide_id_recommender(
    accelerator: Accelerator,
    arguments: LaserArguments,
    folder: Path,
    data: Interactions,
    split: LeaveOneOut,
    given: IDRecommender | None = None,
) -> IDRecommender | None:
    """Take the given ID recommender, load the one that the arguments name, or train one.

    Args:
        accelerator: the main process trains, the others wait.
        arguments: `id_recommender` names a kind, a saved folder, or `none`.
        folder: where a trained one is kept; a resumed run takes it from there.
        data: what it is trained on.
        split: training sequences, and validation users for early stopping.
        given: a trained one; None goes by the arguments.

    Returns:
        The recommender, in every process with the same weights; None where the arguments say so.

    Raises:
        ConfigurationError: neither a known kind nor a folder, or a recommender of another catalog.
        CheckpointError: the run to resume trained it on other data or by other settings.
    """
    name = arguments.id_recommender
    if given is None and name == "none":
        return None
    if given is None and name not in ID_RECOMMENDERS:
        if not Path(name).is_dir():
            raise ConfigurationError(
                f"id_recommender must be {', '.join(ID_RECOMMENDERS)}, none, or the folder of a saved one, got {name!r}"
            )
        given = load_recommender(name)
    if given is None:
        return _trained(accelerator, arguments, folder, data, split)
    if given.num_items != len(data.items):
        raise ConfigurationError(
            f"the ID recommender must know the catalog's {len(data.items)} items, got one of {given.num_items}; "
            "train it on the same catalog, in the same order"
        )
    return given


def _trained(
    accelerator: Accelerator, arguments: LaserArguments, folder: Path, data: Interactions, split: LeaveOneOut
) -> IDRecommender:
    name = arguments.id_recommender
    origin = {
        "id_recommender": name,
        "id_recommender_epochs": arguments.id_recommender_epochs,
        "hold_out_items": arguments.hold_out_items,
        "seed": arguments.seed,
        "data": data.content_hash,
    }
    kept = arguments.resume and folder.is_dir()
    if kept:
        _check_origin(folder, origin)
    accelerator.wait_for_everyone()  # all have looked before the main process writes
    if accelerator.is_main_process and not kept:
        model = build_recommender(
            name, len(data.items), seed=arguments.seed, untrained_items=sorted(split.held_out_items) or None
        ).to(accelerator.device)
        settings = default_fit_arguments(name)
        if arguments.id_recommender_epochs is not None:
            settings["epochs"] = arguments.id_recommender_epochs
        fit_recommender(
            model,
            split.train_sequences,
            split.samples("valid"),
            seed=arguments.seed,
            progress=not arguments.disable_tqdm,
            **settings,
        )
        with whole_folder(folder) as temporary:
            model.to("cpu").save_pretrained(temporary)
            (temporary / ORIGIN_FILE).write_text(json.dumps(origin))
    accelerator.wait_for_everyone()
    return load_recommender(folder)


def _check_origin(folder: Path, origin: dict[str, Any]) -> None:
    saved = {"hold_out_items": 0.0, **json.loads((folder / ORIGIN_FILE).read_text())}
    different = differences(saved, origin)
    if different:
        raise CheckpointError(
            f"the ID recommender of the run to resume was trained otherwise: {'; '.join(different)}; resume with the "
            "same settings, or start again with --overwrite_output_dir"
        )
