"""Exceptions that say what is wrong, what was got, and what to do next."""


class BiTuningError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigurationError(BiTuningError, ValueError):
    """A setting is out of its range or does not fit another one."""


class UnsupportedModelError(BiTuningError, TypeError):
    """The base model is of a kind that cannot be tuned this way."""


class UnsupportedOperationError(BiTuningError, NotImplementedError):
    """PEFT offers the operation, but it has no meaning for this method."""


class InputError(BiTuningError, ValueError):
    """A tensor given to the model has the wrong shape, type or content."""


class ContextLengthError(InputError):
    """A row is longer than the base model's context."""


class DataError(BiTuningError, ValueError):
    """Purchase histories or items cannot be read as given."""


class UnknownItemError(BiTuningError, KeyError):
    """An item id is not in the catalog."""

    def __str__(self) -> str:
        """Return the message itself; `KeyError` would print its repr."""
        return str(self.args[0]) if self.args else ""


class AdapterLoadError(BiTuningError, RuntimeError):
    """Saved adapter tensors do not fit the model they are loaded into."""


class ArtifactError(BiTuningError, RuntimeError):
    """A saved folder is incomplete, changed, or belongs to something else."""


class CheckpointError(ArtifactError):
    """A training checkpoint cannot be used to resume this run."""


class NonFiniteLossError(BiTuningError, FloatingPointError):
    """Training met a loss that is not a finite number."""
