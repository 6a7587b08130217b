"""The folder of a saved recommender, read strictly: nothing missing, nothing over, nothing of another shape."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..errors import ArtifactError

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read the `config.json` of a saved recommender; an ArtifactError says that it is missing or no JSON object."""
    file = Path(folder) / CONFIG_FILE
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(f"{file} cannot be read ({error}); name the folder a recommender was saved to") from error
    except ValueError as error:
        raise ArtifactError(f"{file} is not JSON ({error}); it is truncated or damaged, copy it again") from error
    if not isinstance(config, dict):
        raise ArtifactError(f"{file} must hold a JSON object, got {type(config).__name__}")
    return config


def load_folder(model_class: Any, folder: Path) -> Any:
    """Build an `ItemSequenceModel` out of its folder, in evaluation mode; an ArtifactError says what is wrong."""
    config = read_config(folder)
    if config.get("model_type") != model_class.recommender_type:
        raise ArtifactError(
            f"{folder} holds a recommender of model_type {config.get('model_type')!r}, {model_class.__name__} loads "
            f"{model_class.recommender_type!r}; use load_recommender"
        )
    try:
        model = model_class(model_class.config_class.from_dict(config))
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{folder}: the config does not describe a {model_class.__name__}: {error}") from error
    fill_weights(model, folder)
    return model.eval()


def fill_weights(model: nn.Module, folder: Path) -> None:
    """Copy the saved weights into a model; an ArtifactError says which tensors do not fit it."""
    file = folder / WEIGHTS_FILE
    try:
        saved = load_file(file)
    except FileNotFoundError as error:
        raise ArtifactError(f"{file} is missing; the folder is incomplete, save the recommender again") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(f"{file} cannot be read ({error}); it is truncated or damaged, copy it again") from error
    expected = model.state_dict()
    check_names(file, expected.keys() - saved.keys(), saved.keys() - expected.keys())
    for name, tensor in expected.items():
        if saved[name].shape != tensor.shape or saved[name].dtype != tensor.dtype:
            raise ArtifactError(
                f"{file}: tensor {name!r} must be {list(tensor.shape)} {tensor.dtype} by {CONFIG_FILE}, "
                f"got {list(saved[name].shape)} {saved[name].dtype}"
            )
    model.load_state_dict(saved)


def check_names(source: object, missing: Collection[str], unexpected: Collection[str]) -> None:
    """Raise an ArtifactError where a saved model lacks tensors or has some too many."""
    if missing or unexpected:
        raise ArtifactError(
            f"{source} does not fit the recommender its {CONFIG_FILE} describes: "
            f"missing tensors {sorted(missing)}, unexpected tensors {sorted(unexpected)}"
        )
