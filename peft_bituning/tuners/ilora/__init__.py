"""iLoRA: LoRA whose rank is split over experts that a gate weighs for each row (Kong et al. 2024)."""

from ..registration import register_tuner
from .config import ILoRAConfig
from .model import ILoRAModel, ILoRAOutput

register_tuner("ilora", config_cls=ILoRAConfig, model_cls=ILoRAModel)

__all__ = ["ILoRAConfig", "ILoRAModel", "ILoRAOutput"]
