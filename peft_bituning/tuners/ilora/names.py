"""Names of modules and tensors, the same whether the base model has its head or not."""

from collections.abc import Iterable, Mapping
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..rows.backbone import find_backbone

ROOT = "base_model.model."


def under_this_base(model: nn.Module, loaded: Mapping[str, Tensor], own: Iterable[str]) -> dict[str, Tensor]:
    """Rename a file's tensors that come from a base model with a head for one without, and the other way round.

    Args:
        model: the model that holds the adapter.
        loaded: the file's tensors.
        own: the names that the adapter's tensors have in files of this model; only tensors that get one are renamed.
    """
    known = set(own)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    inner = f"{ROOT}{getattr(base, 'base_model_prefix', '')}."

    def rename(key: str) -> str:
        other = key.replace(inner, ROOT, 1) if key.startswith(inner) else key.replace(ROOT, inner, 1)
        return other if key not in known and other in known else key

    return {rename(key): value for key, value in loaded.items()}


def without_head(target_modules: Any, model: PreTrainedModel) -> Any:
    """Name target modules as in the headless model: PEFT goes by the end of names, so they fit a model with a head too.

    Names stay as they are where shorter ones would fit more modules, and so does a regular expression.
    """
    backbone, names = find_backbone(model), dict(model.named_modules())
    prefix = next(f"{name}." for name, module in names.items() if module is backbone)
    if isinstance(target_modules, str) or backbone is model:
        return target_modules
    shorter = {name.removeprefix(prefix) for name in target_modules}
    ends = tuple(f".{name}" for name in shorter - set(target_modules))
    if any(f".{name}".endswith(ends) for name in names if not name.startswith(prefix)):
        return target_modules
    return shorter
