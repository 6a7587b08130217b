"""The adapter tuner: what PEFT asks of a method whose adapters stand in one layer beside the model's own."""

from abc import abstractmethod
from contextlib import nullcontext
from typing import Any, ClassVar

from accelerate import init_empty_weights
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ConfigurationError, UnsupportedOperationError
from .adapter_file import adapter_keys, check_fit, without_adapter_name
from .adapter_layer import AdapterLayer
from .rows.backbone import find_backbone, token_embeddings
from .rows.center import EmbeddingCenter


class AdapterTuner(BaseTuner):
    """A frozen language model with adapters of which one at a time is active.

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
        _keep_differentiable(model)
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


def _keep_differentiable(model: nn.Module) -> None:
    """Keep bitsandbytes' 4-bit layers on a CPU from packing their weights for inference.

    On CPUs with AVX-512 bf16 a first evaluation without gradients rewrites their weights for a kernel that has no
    backward pass: later gradients would be zero without an error. Weights that were packed before are unpacked.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            module.state_dict()  # bitsandbytes unpacks the weights in place before it saves them
