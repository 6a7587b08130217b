"""The embedding tuner: turns each row of text into one embedding, and leads the way to `generate`."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from peft import TaskType, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from ..errors import InputError, UnsupportedOperationError
from .adapter_tuner import AdapterTuner
from .rows.backbone import embed_text, find_backbone
from .rows.center import EmbeddingCenter
from .rows.embedding_model import BiTuningOutput, Weights

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


class EmbeddingTuner(AdapterTuner):
    """A frozen language model with adapters of which one at a time embeds rows, or continues their text.

    A tuner says how in `_embed` and `_continue`; it is an `EmbeddingModel`, and so is the `PeftModel` around it.

    Its arguments are those of `AdapterTuner`.
    """

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
