"""The method as PEFT sees it."""

import importlib
import json
import subprocess
import sys
from dataclasses import dataclass

import pytest
from peft import PeftConfig, PeftType
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

import peft_bituning
from peft_bituning import BiTuningConfig, BiTuningModel
from peft_bituning.tuners.registration import register_tuner


def test_it_is_a_real_member() -> None:
    member = PeftType("BITUNING")
    assert member is PeftType["BITUNING"] is PeftType.BITUNING  # type: ignore[attr-defined]
    assert isinstance(member, PeftType) and member == "BITUNING" and member.value == member.name == "BITUNING"
    assert member in list(PeftType)
    assert json.dumps({"peft_type": member}) == '{"peft_type": "BITUNING"}'
    assert len({each.value for each in PeftType}) == len(PeftType)


def test_peft_maps_it_to_our_classes() -> None:
    member = PeftType("BITUNING")
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is BiTuningConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is BiTuningModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == "bituning_"


def test_registering_again_changes_nothing() -> None:
    members = list(PeftType)
    register_tuner("bituning", BiTuningConfig, BiTuningModel)
    importlib.reload(peft_bituning)
    importlib.reload(sys.modules["peft_bituning.tuners.bituning"])
    assert list(PeftType) == members
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType("BITUNING")] is BiTuningConfig


@pytest.mark.parametrize("name", ["bituning", "lora"])
def test_a_class_of_another_package_is_refused(name: str) -> None:
    @dataclass
    class OtherConfig(PeftConfig):
        pass

    known = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name.upper())]
    with pytest.raises(RuntimeError, match=f"PEFT already knows a method {name.upper()}, from {known.__module__}"):
        register_tuner(name, OtherConfig, BiTuningModel)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name.upper())] is known


def test_importing_the_package_registers_and_stays_light() -> None:
    """A fresh interpreter: nothing of data, training or serving is loaded until asked for."""
    code = (
        "import sys, peft_bituning; from peft import PeftType; PeftType('BITUNING');"
        "heavy = {'datasets', 'pandas', 'evaluate', 'matplotlib'} & set(sys.modules);"
        "rooms = {name for name in sys.modules if name.startswith('peft_bituning.')"
        " and name.split('.')[1] not in ('errors', 'registration', 'losses', 'tuners')};"
        "print(sorted(heavy), sorted(rooms))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "[]"]
