"""What the tuners share that turn each row of text into one embedding: inputs, refusals, the way to `generate`."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from peft import TaskType
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import InputError, UnsupportedOperationError
from .backbone import embed_text, find_backbone
from .center import EmbeddingCenter
from .outputs import BiTuningOutput


class Text(NamedTuple):
    """The rows as the caller gave them.

    Args:
        tokens: embeddings [B, T, D].
        mask: which tokens are real [B, T].
        input_ids: their ids [B, T], if given.
    """

    tokens: Tensor
    mask: Tensor
    input_ids: Tensor | None


class Collaborative(NamedTuple):
    """What a frozen recommender says of the rows.

    Args:
        embeds: `C_u` [B, N, C].
        mask: which of its rows are real [B, N].
    """

    embeds: Tensor | None
    mask: Tensor | None


class EmbeddingTuner(BaseTuner):
    """A frozen language model with adapters of which one at a time embeds rows, or continues their text.

    A tuner says how in `_embed` and `_continue`.
    """

    model: PreTrainedModel
    method: ClassVar[str]  # its name in messages
    one_each: ClassVar[str]  # why no two adapters can be active
    # transformers' own `load_adapter` injects layers without this class around them: let it refuse.
    uses_shared_state = True

    @property
    @abstractmethod
    def _layer(self) -> Any:
        """The module beside the model's own that holds the adapters."""

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
    def embedding_center(self) -> EmbeddingCenter | None:
        """What the embeddings of the active adapter are centered by; None where they are not."""
        return None

    @property
    def backbone(self) -> nn.Module:
        """The headless language model."""
        return find_backbone(self.model)

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
