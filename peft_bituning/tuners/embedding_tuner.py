"""The tuner that turns each row of text into one embedding: inputs, refusals, files, the way to `generate`."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from accelerate import init_empty_weights
from peft import PeftConfig, TaskType, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ConfigurationError, InputError, UnsupportedOperationError
from .adapter_file import adapter_keys, check_fit, without_adapter_name
from .adapter_layer import AdapterLayer
from .rows.backbone import embed_text, find_backbone, keep_differentiable, token_embeddings
from .rows.center import EmbeddingCenter
from .rows.embedding_model import Weights
from .rows.outputs import BiTuningOutput

ROOT = "base_model."  # where a `PeftModel` keeps the tuner


class Text(NamedTuple):
    """The rows as the caller gave them: embeddings [B, T, D], which are real [B, T], and the ids [B, T], if given."""

    tokens: Tensor
    mask: Tensor
    input_ids: Tensor | None


class Collaborative(NamedTuple):
    """What a frozen recommender says of the rows: `C_u` [B, N, C], and which of its rows are real [B, N]."""

    embeds: Tensor | None
    mask: Tensor | None


class EmbeddingTuner(BaseTuner):
    """A frozen language model with adapters of which one at a time embeds rows, or continues their text.

    A tuner says how in `_embed` and `_continue`; it is an `EmbeddingModel`, and so is the `PeftModel` around it.

    Args:
        model: a causal language model of transformers, or its headless model.
        peft_config: the adapter's settings.
        adapter_name: its name.
        low_cpu_mem_usage: make the adapter's weights on the meta device.
        state_dict: not used; the adapter's structure comes from its settings.
    """

    model: PreTrainedModel
    method: ClassVar[str]  # its name in messages
    config_cls: ClassVar[type[PeftConfig]]
    layer_cls: ClassVar[type[AdapterLayer]]
    file_parts: ClassVar[tuple[str, ...]]  # what layers keep by adapter
    one_each: ClassVar[str]  # why no two adapters can be active
    no_weighting: ClassVar[str]  # why adapters cannot be added up
    # transformers' own `load_adapter` injects layers without this class around them: let it refuse.
    uses_shared_state = True

    @abstractmethod
    def _embed(
        self, name: str, text: Text, collaborative: Collaborative, labels: Tensor | None, **settings: Any
    ) -> BiTuningOutput:
        """Embed rows by the adapter of this name."""

    @abstractmethod
    def _continue(
        self, name: str, text: Text, collaborative: Collaborative, generate: Callable[..., Any], **kwargs: Any
    ) -> Any:
        """Continue rows by the adapter of this name and transformers' `generate`."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        collaborative_embeds: Tensor | None = None,
        collaborative_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **backbone_kwargs: Any,
    ) -> Any:
        """Encode each row into one embedding (paper Eq. 2).

        Args:
            input_ids: the text [B, T].
            attention_mask: which tokens are real [B, T], int or bool; None means all of them.
            inputs_embeds: token embeddings [B, T, D] in place of `input_ids`.
            collaborative_embeds: `C_u` [B, N, C] of a frozen recommender.
            collaborative_mask: which of its rows are real [B, N]; all zeros says that a row has none.
            labels: next tokens [B, T] with -100 at positions without loss; `CAUSAL_LM` only.
            output_hidden_states: also return the states of every layer.
            return_dict: False returns a tuple.
            backbone_kwargs: passed on to the language model.

        Returns:
            `BiTuningOutput`, or the tuner's own kind of it; where the adapter is disabled, the base model's output.

        Raises:
            InputError: inputs that are missing or do not fit each other.
            ContextLengthError: a row longer than the model's context.
        """
        if self._layer.disable_adapters:
            return self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                output_hidden_states=output_hidden_states,
                return_dict=return_dict,
                **({} if labels is None else {"labels": labels}),
                **backbone_kwargs,
            )
        name = self._active()
        task = self.peft_config[name].task_type
        if labels is not None and task != TaskType.CAUSAL_LM:
            raise InputError(
                f"labels need task_type=CAUSAL_LM, got {TaskType(task).value}; train embeddings with "
                "peft_bituning.losses.catalog_contrastive_loss on `pooler_output` instead"
            )
        text = Text(*embed_text(self.model, input_ids, attention_mask, inputs_embeds), input_ids)
        if labels is not None and labels.shape != text.mask.shape:
            raise InputError(f"labels must be [B, T] = {list(text.mask.shape)}, got {list(labels.shape)}")
        collaborative = Collaborative(collaborative_embeds, collaborative_mask)
        settings = {"output_hidden_states": output_hidden_states, **backbone_kwargs}
        result = self._embed(name, text, collaborative, labels, **settings)
        return result if return_dict in (None, True) else result.to_tuple()

    def generate(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        """Continue each row's text as the adapter has it; `CAUSAL_LM` only.

        Args:
            input_ids: the prompt [B, T], padding anywhere.
            kwargs: `attention_mask`, `inputs_embeds`, `collaborative_embeds` and `collaborative_mask` as in
                `forward`, and any argument of transformers' `generate`.

        Returns:
            What transformers' `generate` returns; the tuner's class says what of the prompt comes back. Where the
            adapter is disabled, the base model's own.

        Raises:
            UnsupportedOperationError: the task is not `CAUSAL_LM`, or the model has no language-model head.
            InputError: inputs that are missing or do not fit each other.
            ContextLengthError: a prompt longer than the model's context.
        """
        # The class's own: inside PEFT's context the instance's leads back here.
        generate = getattr(type(self.model), "generate", None)
        if generate is None:
            raise UnsupportedOperationError(
                f"generate needs a base model with a language-model head, got {type(self.model).__name__}; load one "
                "with AutoModelForCausalLM"
            )
        if self._layer.disable_adapters:
            return generate(self.model, input_ids, **kwargs)
        name = self._active()
        config = self.peft_config[name]
        if config.task_type != TaskType.CAUSAL_LM:
            raise UnsupportedOperationError(
                f"generate needs task_type=CAUSAL_LM, got {TaskType(config.task_type).value}; make the adapter with "
                f"{type(config).__name__}(task_type='CAUSAL_LM'), or call it inside `with model.disable_adapter():` "
                "for the base model's own text"
            )
        given = [kwargs.pop(key, None) for key in ("attention_mask", "inputs_embeds")]
        text = Text(*embed_text(self.model, input_ids, *given), input_ids)
        collaborative = Collaborative(*(kwargs.pop(f"collaborative_{key}", None) for key in Collaborative._fields))
        return self._continue(name, text, collaborative, partial(generate, self.model), **kwargs)

    # ------------------------------------------------------------------ an `EmbeddingModel`

    @property
    @abstractmethod
    def num_virtual_tokens(self) -> int:
        """P, the tokens that the active adapter puts before the text."""

    @property
    @abstractmethod
    def needs_collaborative(self) -> bool:
        """Whether the active adapter reads a frozen recommender."""

    @property
    def aux_loss_coef(self) -> float:
        """Weight of the load-balancing loss (paper: lambda); 0 where there is none."""
        return getattr(self.peft_config[self._active()], "router_aux_loss_coef", 0.0)

    @property
    def embedding_center(self) -> EmbeddingCenter | None:
        """What the embeddings of the active adapter are centered by; None where they are not."""
        return None

    def weights_out(self) -> Weights:
        """Copy the active adapter's weights to the CPU, named as in PEFT's files."""
        weights = get_peft_model_state_dict(self, adapter_name=self._active(), save_embedding_layers=False)
        return {f"{ROOT}{name}": value.detach().cpu().clone() for name, value in weights.items()}

    def weights_in(self, weights: Weights) -> None:
        """Put weights into the active adapter.

        Args:
            weights: by their names in PEFT's files.

        Raises:
            AdapterLoadError: they are not the adapter's.
        """
        own = {name.removeprefix(ROOT): value for name, value in weights.items()}
        set_peft_model_state_dict(self, own, adapter_name=self._active())

    @property
    def backbone(self) -> nn.Module:
        """The headless language model."""
        return find_backbone(self.model)

    @property
    def _layer(self) -> Any:
        return getattr(self.model, self.layer_cls.layer_name)

    def _active(self) -> str:
        names = self.active_adapters
        if len(names) != 1:
            raise UnsupportedOperationError(
                f"exactly one {self.method} adapter must be active, got {names}; {self.one_each}"
            )
        return names[0]

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Lead `generate` here while PEFT runs the model: `PeftModel.generate` calls the base model's directly."""
        if kwargs.get("adapter_names") is not None:
            raise UnsupportedOperationError(
                f"{self.method} cannot mix adapters within a batch (adapter_names); call set_adapter and run one batch "
                "an adapter"
            )
        if torch.compiler.is_compiling():
            yield
            return
        self.model.__dict__["generate"] = self.generate
        try:
            yield
        finally:
            self.model.__dict__.pop("generate", None)

    # ------------------------------------------------------------------ adapters

    @abstractmethod
    def _make_parts(self, model: PreTrainedModel, config: Any) -> tuple[nn.Module | None, ...]:
        """Draw a new adapter's parts, in the order of its layer's `adapter_layer_names`."""

    @abstractmethod
    def _adapt(self, model: PreTrainedModel, adapter_name: str, layer: Any, low_cpu_mem_usage: bool) -> None:
        """Change the model's own modules for a new adapter; the layer of the others is out of it meanwhile."""

    def inject_adapter(  # type: ignore[override]  # a transformers model, not any module
        self,
        model: PreTrainedModel,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Add an adapter to the model; called by PEFT.

        Args:
            model: the language model.
            adapter_name: the adapter's name.
            autocast_adapter_dtype: not used here; see `_cast_adapter_dtype`.
            low_cpu_mem_usage: make the weights on the meta device.
            state_dict: not used; the structure comes from the settings.

        Raises:
            ConfigurationError: a name or settings that do not fit the model.
            UnsupportedModelError: the model, or a layer that was named, cannot be tuned this way.
        """
        config = self.peft_config[adapter_name]
        if not isinstance(config, self.config_cls):
            wanted = self.config_cls.__name__
            raise ConfigurationError(
                f"peft_config must be {'an' if wanted[0] in 'AEIOU' else 'a'} {wanted}, got {type(config).__name__}"
            )
        find_backbone(model)
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            parts = self._make_parts(model, config)
        layer: Any = getattr(model, self.layer_cls.layer_name, None)
        if layer is None:
            layer = self.layer_cls(token_embeddings(model))
            layer.set_adapter([adapter_name])
        layer.check_name(adapter_name, model, parts[0])
        keep_differentiable(model)
        # PEFT matches `modules_to_save` by the end of names: the layer, with a `gate` or a `norm`, is out meanwhile.
        model._modules.pop(self.layer_cls.layer_name, None)
        try:
            self._adapt(model, adapter_name, layer, low_cpu_mem_usage)
            layer.add(adapter_name, *parts)
        finally:
            if layer.adapters:
                model.add_module(self.layer_cls.layer_name, layer)
        layer._move_adapter_to_device_of_base_layer(adapter_name)
        layer.set_requires_grad(adapter_name, adapter_name in self.active_adapters and not config.inference_mode)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Keep the adapter in float32, or in the base model's type where PEFT is told not to cast."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        dtype = token_embeddings(self.model).weight.dtype
        if not autocast_adapter_dtype and dtype.is_floating_point:
            for part in self._layer.parts(adapter_name):
                if not isinstance(part, EmbeddingCenter):  # computes in float32
                    part.to(dtype)

    # ------------------------------------------------------------------ files

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        short = without_adapter_name(key, cls.file_parts, adapter_name)
        return super()._remove_adapter_name_from_key(key, adapter_name) if short is None else short

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Map file keys to model keys and refuse what does not fit; PEFT itself would load with `strict=False`."""
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        tensors = model.state_dict()
        check_fit(adapter_name, remapped, tensors, adapter_keys(tensors, cls.file_parts, adapter_name))
        return remapped

    # ------------------------------------------------------------------ refusals

    def unload(self) -> nn.Module:
        """Take every adapter off and return the base model."""
        if hasattr(self.model, self.layer_cls.layer_name):
            delattr(self.model, self.layer_cls.layer_name)
        return super().unload()

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Refuse: the adapter is no change of the model's weights."""
        raise UnsupportedOperationError(self.layer_cls.no_merging)

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: the adapter is no change of the model's weights."""
        raise UnsupportedOperationError(self.layer_cls.no_merging)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: a weighted sum of adapters is no adapter."""
        raise UnsupportedOperationError(self.no_weighting)
