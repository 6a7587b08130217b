"""Settings of a run: ranges, messages, the paper's preset."""

from typing import Any

import pytest

from peft_bituning.errors import ConfigurationError
from peft_bituning.training import LaserArguments

WRONG: list[tuple[str, Any, str]] = [
    ("stage1_epochs", -1, "an integer >= 0"),
    ("stage2_epochs", -1, "an integer >= 0"),
    ("seed", -1, "an integer >= 0"),
    ("per_device_train_batch_size", 0, "an integer >= 1"),
    ("per_device_train_batch_size", True, "an integer >= 1"),
    ("per_device_eval_batch_size", 2.5, "an integer >= 1"),
    ("gradient_accumulation_steps", 0, "an integer >= 1"),
    ("logging_steps", 0, "an integer >= 1"),
    ("save_steps", 0, "an integer >= 1"),
    ("save_total_limit", 0, "an integer >= 1"),
    ("early_stopping_patience", 0, "an integer >= 1"),
    ("max_length", 0, "an integer >= 1"),
    ("max_samples_per_epoch", 0, "an integer >= 1"),
    ("max_validation_users", 0, "an integer >= 1"),
    ("max_history", 0, "an integer >= 1"),
    ("max_item_tokens", 0, "an integer >= 1"),
    ("loss_chunk_size", 0, "an integer >= 1"),
    ("id_recommender_epochs", 0, "an integer >= 1"),
    ("learning_rate", 0.0, "> 0"),
    ("learning_rate", float("nan"), "> 0"),
    ("stage2_learning_rate", -1e-3, "> 0"),
    ("temperature", 0, "> 0"),
    ("max_grad_norm", 0.0, "> 0"),
    ("warmup_ratio", 1.0, r"in \[0, 1\)"),
    ("weight_decay", -0.1, ">= 0"),
    ("cuts", "first_cut", "one of every_cut, random_cut, last_cut"),
    ("item_collaborative", "state", "one of history, embedding"),
    ("mixed_precision", "int8", "one of None, no, bf16, fp16"),
]


@pytest.mark.parametrize(("name", "value", "rule"), WRONG)
def test_out_of_range(name: str, value: Any, rule: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name} must be {rule}, got {value!r}"):
        LaserArguments(**{name: value})


def test_an_epoch_at_least() -> None:
    with pytest.raises(ConfigurationError, match="stage1_epochs \\+ stage2_epochs must be >= 1, got 0"):
        LaserArguments(stage1_epochs=0, stage2_epochs=0)


def test_resume_or_overwrite() -> None:
    with pytest.raises(ConfigurationError, match="resume and overwrite_output_dir must not both be set"):
        LaserArguments(resume=True, overwrite_output_dir=True)


def test_stage_2_can_be_left_out() -> None:
    assert LaserArguments(stage2_epochs=0).stage2_epochs == 0


def test_paper() -> None:
    arguments = LaserArguments.paper("out", seed=3)
    assert (arguments.stage1_epochs, arguments.stage2_epochs) == (15, 5)
    assert (arguments.per_device_train_batch_size, arguments.learning_rate) == (4, 1e-4)
    assert arguments.stage2_learning_rate == 1e-4
    assert (arguments.temperature, arguments.id_recommender) == (0.05, "bert4rec")
    assert (arguments.output_dir, arguments.seed) == ("out", 3)
    assert LaserArguments.paper("out", learning_rate=1.0).learning_rate == 1.0


def test_what_a_resumed_run_may_change() -> None:
    free = LaserArguments(resume=True, save_steps=7, save_total_limit=9, disable_tqdm=True, output_dir="elsewhere")
    assert free.trajectory() == LaserArguments().trajectory()
    for change in ({"learning_rate": 0.5}, {"seed": 1}, {"stage2_epochs": 1}, {"gradient_accumulation_steps": 2}):
        assert LaserArguments(**change).trajectory() != LaserArguments().trajectory()  # type: ignore[arg-type]


def test_every_field_is_explained() -> None:
    fields = LaserArguments.__dataclass_fields__.values()
    assert all(field.metadata["help"].endswith((".", "...")) for field in fields)
