"""Kinds of distributed runs that `fit` refuses; tests/training/test_two_processes.py runs those that it takes."""

from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType

from peft_bituning.errors import ConfigurationError
from peft_bituning.training.sharding import check_launcher


@pytest.mark.parametrize(
    ("kind", "version", "efficient", "message"),
    [
        ("DEEPSPEED", 0, False, "got DEEPSPEED; take examples/configs/accelerate/fsdp2.yaml, or transformers.Trainer"),
        ("FSDP", 1, False, "fsdp_version must be 2, got 1"),
        ("FSDP", 2, True, "fsdp_cpu_ram_efficient_loading must be false, got true"),
    ],
)
def test_refused(kind: str, version: int, efficient: bool, message: str) -> None:
    accelerator = SimpleNamespace(
        distributed_type=DistributedType[kind],
        is_fsdp2=version == 2,
        state=SimpleNamespace(fsdp_plugin=SimpleNamespace(cpu_ram_efficient_loading=efficient)),
    )
    with pytest.raises(ConfigurationError, match=message):
        check_launcher(accelerator)  # type: ignore[arg-type]


def test_a_pytorch_that_would_shard_the_adapter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_bituning.training.sharding.is_torch_version", lambda *_: True)
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP, is_fsdp2=True)
    with pytest.raises(ConfigurationError, match="torch must be >= 2.7 for FSDP2, got .*; update it, or use DDP"):
        check_launcher(accelerator)  # type: ignore[arg-type]
