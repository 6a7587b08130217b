"""A run that is finished already, known again by what it was made of."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig

from ..artifacts import differences, to_json
from ..base_models import BaseModel
from ..data import Interactions, PromptTemplate
from ..errors import CheckpointError
from ..recommenders import IDRecommender
from ..serving.recommender import LaserRecommender
from ..tuners.bituning import BiTuningConfig
from .arguments import LaserArguments
from .results import RESULTS_FILE, data_hash


def settings_of(arguments: LaserArguments) -> dict[str, Any]:
    """Return what decided a run, with names instead of paths: nothing of this machine goes into what is shared."""
    names = {name: Path(getattr(arguments, name)).name for name in ("recommender", "template")}
    return {**arguments.trajectory(), **names}


def load_finished(
    arguments: LaserArguments,
    data: Interactions,
    base: BaseModel,
    config: BiTuningConfig,
    recommender: IDRecommender | None = None,
    template: PromptTemplate | None = None,
    device: torch.device | None = None,
) -> LaserRecommender | None:
    """Load what a finished run left, where one of the same settings and data is asked to go on.

    Args:
        arguments: the run; its `output_dir` holds no checkpoint.
        data: the histories.
        base: the language model.
        config: the adapter's settings as they were given; what is None was filled in by the run.
        recommender: the frozen recommender, where one was given.
        template: the prompt, where one was given.
        device: where it will run.

    Returns:
        The recommender; None where the folder holds no finished run.

    Raises:
        CheckpointError: it holds one of other settings or data, or one whose results cannot be read.
    """
    folder = Path(arguments.output_dir)
    if not (folder / RESULTS_FILE).is_file():
        return None
    try:
        results = dict(json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{RESULTS_FILE} of the finished run in {folder} cannot be read ({error}); choose another folder, or train "
            "anew there without --resume"
        ) from error
    inherited = {each.name for each in fields(PeftConfig)}
    given = {name: value for name, value in to_json(config.to_dict()).items() if value is not None}
    asked: dict[str, Any] = {
        "settings": settings_of(arguments),
        "adapter": {name: value for name, value in given.items() if name not in inherited},
        "base_model": base.name,
        "data": data_hash(data),
    }
    found = {name: results.get(name) for name in asked}
    later = {each.name: each.default for each in fields(BiTuningConfig)}  # what a run made before a field had
    for part, missing in (("settings", {}), ("adapter", later)):
        found[part] = {name: (found[part] or {}).get(name, missing.get(name)) for name in asked[part]}
    different = differences(found, to_json(asked))
    finished = None if different else LaserRecommender.from_pretrained(folder, base, device)
    if finished is not None:
        if template is not None and finished.template != replace(template, fields=template.fields_for(data.items)):
            different.append("template is another one")
        read = finished.settings.recommender_hash
        if recommender is not None and read is not None and recommender.content_hash() != read:
            different.append("the frozen recommender is another one")
    if different:
        raise CheckpointError(
            f"the finished run in {folder} is another one: {'; '.join(different)}; choose another folder, or train "
            "anew there without --resume"
        )
    return finished
