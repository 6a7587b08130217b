"""An adapter's settings: how they are declared and checked."""

from dataclasses import field
from typing import Any

from peft import PeftConfig, TaskType

from ..errors import ConfigurationError

TASK_TYPES = (TaskType.FEATURE_EXTRACTION, TaskType.CAUSAL_LM)


def setting(default: Any, text: str) -> Any:
    """Declare a field of a settings class, with the help text that PEFT's command lines show."""
    return field(default=default, metadata={"help": text})


def settle_task(config: PeftConfig) -> None:
    """Embed where no task is named: `PeftModel.forward` of no task silently returns the base model's output."""
    if config.task_type is None:
        config.task_type = TaskType.FEATURE_EXTRACTION
    check_one_of("task_type", config.task_type, tuple(task.value for task in TASK_TYPES))


def check_one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    """Check that a setting is one of the known names."""
    if value not in known:
        raise ConfigurationError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def check_positive_integer(name: str, value: object) -> None:
    """Check that a setting is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"{name} must be an integer >= 1, got {value!r}")


def check_share(name: str, value: object) -> None:
    """Check that a setting is in [0, 1)."""
    if isinstance(value, bool) or not (isinstance(value, int | float) and 0 <= value < 1):
        raise ConfigurationError(f"{name} must be in [0, 1), got {value!r}")
