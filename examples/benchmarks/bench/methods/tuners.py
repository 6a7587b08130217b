"""Tuners: every way to tune the language model that is compared, as models of one interface."""

from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PromptEncoderConfig,
    PromptTuningConfig,
    PromptTuningInit,
    get_peft_model,
    get_peft_model_state_dict,
)
from torch import nn

from peft_bituning.artifacts import to_json, weights_hash
from peft_bituning.assembly import attach_adapter
from peft_bituning.base_models import BaseModel
from peft_bituning.errors import ConfigurationError
from peft_bituning.recommenders import IDRecommender
from peft_bituning.training.arguments import LaserArguments
from peft_bituning.training.stage_result import Weights
from peft_bituning.training.stages import ADAPTER
from peft_bituning.tuners.bituning import BiTuningConfig
from peft_bituning.tuners.bituning.config import PAPER_SIZES
from peft_bituning.tuners.ilora import ILoRAConfig
from peft_bituning.tuners.rows.backbone import find_backbone, token_embeddings
from peft_bituning.tuners.rows.embedding_model import EmbeddingModel
from peft_bituning.tuners.vocabulary import embedding_scale

from ..pooling import PooledModel

FULL = "full"
POOLED = ("pooling", "center_embeddings")  # settings of `PooledModel`


@dataclass(frozen=True)
class Tuner:
    """One way to tune a language model."""

    config_class: type[PeftConfig] | None  # of its adapter; None trains every weight
    defaults: dict[str, Any]  # settings in place of the class's own
    reads_recommender: bool = False  # whether it reads the states of a frozen ID recommender


TUNERS = {
    "laser": Tuner(BiTuningConfig, {"prefix_encoder": "mformer"}, reads_recommender=True),
    "bituning-linear": Tuner(BiTuningConfig, {"prefix_encoder": "linear"}, reads_recommender=True),
    "bituning-static": Tuner(BiTuningConfig, {"prefix_encoder": "static"}),
    "bituning-none": Tuner(BiTuningConfig, {"prefix_encoder": "none"}),
    "ilora": Tuner(ILoRAConfig, {}, reads_recommender=True),
    "lora": Tuner(LoraConfig, {"r": 8, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": "all-linear"}),
    "prompt-tuning": Tuner(PromptTuningConfig, {"num_virtual_tokens": 32}),
    "p-tuning": Tuner(PromptEncoderConfig, {"num_virtual_tokens": 32}),
    FULL: Tuner(None, {}),
}


def build_tuned(
    method: str,
    base: BaseModel,
    settings: dict[str, Any],
    recommender: IDRecommender | None,
    arguments: LaserArguments,
) -> EmbeddingModel:
    """Put a fresh adapter of any method on the language model; the same seed gives the same weights.

    Args:
        method: one of `TUNERS`.
        base: the frozen language model; full fine-tuning thaws it.
        settings: fields of the method's config in place of its defaults; `pooling` and `center_embeddings` for every
            method but `ilora`, which has no center.
        recommender: the frozen ID recommender, for methods that read one.
        arguments: give the seed and the text that virtual tokens start from.

    Returns:
        A model with the forward interface of `BiTuningModel`, its trainable weights requiring gradients.

    Raises:
        ConfigurationError: an unknown method or setting, or settings that do not fit the model.
    """
    if method not in TUNERS:
        raise ConfigurationError(f"method must be one of {', '.join(TUNERS)}, got {method!r}")
    tuner = TUNERS[method]
    sizes = PAPER_SIZES if tuner.config_class is BiTuningConfig else {}
    settings = {**sizes, **tuner.defaults, **settings}
    if tuner.config_class in (BiTuningConfig, ILoRAConfig):
        config = _make_config(method, cast(type[PeftConfig], tuner.config_class), settings)
        return attach_adapter(base, config, recommender, arguments.seed, arguments.prefix_text, arguments.suffix_text)
    pooled = {name: settings.pop(name) for name in POOLED if name in settings}
    if tuner.config_class is None:
        _refuse(method, settings)
        if base.model.dtype != torch.float32:
            raise ConfigurationError(
                f"the base model must be in float32 for full fine-tuning, got {base.model.dtype}; half precision "
                "loses small updates: load it in float32 and set mixed_precision"
            )
        find_backbone(base.model).requires_grad_(True)  # an untied language-model head has nothing to learn here
        return PooledModel(base.model, **pooled)
    config = _make_config(method, tuner.config_class, {"task_type": "FEATURE_EXTRACTION", **settings})
    torch.manual_seed(arguments.seed)
    model = get_peft_model(base.model, config)
    if isinstance(config, PromptTuningConfig):
        _start_prompt(cast(PeftModel, model), base, arguments)
    return PooledModel(cast(PeftModel, model), **pooled)


def merge_lora(base: BaseModel, settings: dict[str, Any], weights: Weights, arguments: LaserArguments) -> BaseModel:
    """Merge the weights of a row of LoRA that encode users into the language model, as the row found it.

    Returns:
        The merged model, frozen, under a name of its own.
    """
    model = cast(PooledModel, build_tuned("lora", base, settings, None, arguments))
    model.weights_in(weights)
    merged = cast(PeftModel, model.model).merge_and_unload().requires_grad_(False)
    return replace(base, model=merged, name=f"{base.name}+lora-{weights_hash(weights)[:12]}", is_local=True)


def adapter_config(model: EmbeddingModel) -> dict[str, Any] | None:
    """Return the settings of the trained adapter as JSON values; None where there is none."""
    peft_model = model.model if isinstance(model, PooledModel) else model
    return to_json(peft_model.peft_config[ADAPTER].to_dict()) if isinstance(peft_model, PeftModel) else None


def num_trainable(model: EmbeddingModel) -> int:
    """Count the weights that require gradients."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def adapter_bytes(model: EmbeddingModel) -> int:
    """Return the bytes of the tensors that a saved adapter holds; of all trained weights where there is none."""
    peft_model = model.model if isinstance(model, PooledModel) else model
    if isinstance(peft_model, PeftModel):
        tensors = get_peft_model_state_dict(peft_model, adapter_name=ADAPTER, save_embedding_layers=False)
    else:
        tensors = model.weights_out()
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _make_config(method: str, config_class: type[PeftConfig], settings: dict[str, Any]) -> PeftConfig:
    known = {each.name for each in fields(config_class) if each.init}
    _refuse(method, {name: value for name, value in settings.items() if name not in known})
    return config_class(**settings)


def _refuse(method: str, unknown: dict[str, Any]) -> None:
    if unknown:
        raise ConfigurationError(
            f"settings of {method} must be fields of its adapter's config, got {', '.join(sorted(unknown))}"
        )


def _start_prompt(model: PeftModel, base: BaseModel, arguments: LaserArguments) -> None:
    """Start the prompt where Bi-Tuning's prefix starts: from the text's tokens, repeated, or small and at random.

    PEFT draws it from N(0, 1), many times the length of a token's embedding.
    """
    table = cast(nn.Embedding, token_embeddings(base.model)).weight.detach()
    prompt = cast(nn.Parameter, model.prompt_encoder[ADAPTER].get_parameter("embedding.weight"))
    with torch.no_grad():
        if arguments.prefix_text is None:
            if model.active_peft_config.prompt_tuning_init == PromptTuningInit.RANDOM:
                prompt.mul_(embedding_scale(base.model))
            return
        ids = base.tokenizer(arguments.prefix_text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ConfigurationError(f"prefix_text must hold at least one token, got {arguments.prefix_text!r}")
        repeated = [ids[place % len(ids)] for place in range(len(prompt))]
        prompt.copy_(table[torch.tensor(repeated, device=table.device)])
