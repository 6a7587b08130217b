"""Registration with PEFT, the one door to its internals: makes a tuner of this package known."""

from typing import Any

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method


def register_tuner(name: str, config_cls: type, model_cls: type) -> None:
    """Add the method `name` to PEFT, as a real member of `PeftType`; a second time changes nothing.

    Args:
        name: lower-case name of the method; its parameters carry the prefix `<name>_`.
        config_cls: the `PeftConfig` of the method.
        model_cls: the `BaseTuner` of the method.

    Raises:
        RuntimeError: PEFT already maps the name to a class that is not ours.
    """
    upper = name.upper()
    if upper not in PeftType.__members__:
        _add_member(upper)
    known: Any = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType(upper))
    if known is None:
        register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls, prefix=f"{name}_")
    elif (known.__module__, known.__qualname__) != (config_cls.__module__, config_cls.__qualname__):
        raise RuntimeError(
            f"PEFT already knows a method {upper}, from {known.__module__}.{known.__qualname__}; "
            f"{config_cls.__module__} cannot register its own. Uninstall one of the two packages."
        )


def _add_member(upper: str) -> None:
    """Give the string enumeration one more member; PEFT compares members, not strings."""
    member = str.__new__(PeftType, upper)
    member._name_ = upper
    member._value_ = upper
    PeftType._member_map_[upper] = member
    PeftType._value2member_map_[upper] = member
    PeftType._member_names_.append(upper)
    type.__setattr__(PeftType, upper, member)
