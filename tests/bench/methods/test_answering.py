"""LoRA and iLoRA by the protocol of random candidates."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.methods import Trial
from bench.methods.answering import run_answers

from peft_bituning.base_models import BaseModel
from peft_bituning.data import Interactions, LeaveOneOut
from peft_bituning.errors import ConfigurationError
from peft_bituning.training import LaserArguments


@pytest.fixture
def make_trial(few: Interactions, tiny_base: Callable[[], BaseModel], tmp_path: Path) -> Callable[..., Trial]:
    """Return a maker of trials over few users; all share a folder."""

    def make(method: str, **settings: Any) -> Trial:
        arguments = LaserArguments(
            output_dir=str(tmp_path / method),
            stage1_epochs=1,
            stage2_epochs=0,
            max_samples_per_epoch=4,
            max_validation_users=2,
            per_device_train_batch_size=4,
            recommender="sasrec",
            recommender_epochs=1,
            disable_tqdm=True,
        )
        split, cpu = LeaveOneOut(few.histories), torch.device("cpu")
        return Trial(method, settings, few, split, tiny_base, arguments, tmp_path / "shared", cpu)

    return make


def test_both_methods_answer_the_same_questions(make_trial: Callable[..., Trial]) -> None:
    results = {method: run_answers(make_trial(method), 4, max_test_users=5) for method in ("ilora", "lora")}
    for method, result in results.items():
        assert [answer.user for answer in result.report.answers] == [0, 1, 2, 3, 4]
        assert result.report.metrics()["users"] == 5 and result.valid["users"] == 2
        assert result.trained["rows"] == 4 and result.trained["updates"] == 1
        assert all(result.phases[phase]["seconds"] > 0 for phase in ("training", "answering"))
        assert (result.details["frozen_recommender"] is None) == (method == "lora")
        assert result.details["adapter"]["task_type"] == "CAUSAL_LM"
    gate = results["ilora"].trainable_parameters - results["lora"].trainable_parameters
    assert gate == 64 * 4 + 64  # a gate over 4 experts and its state of new users
    assert results["ilora"].trained["tokens"] == results["lora"].trained["tokens"]  # the same rows
    targets = [[answer.target for answer in result.report.answers] for result in results.values()]
    assert targets[0] == targets[1]


def test_refusals(make_trial: Callable[..., Trial], tiny_base: Callable[[], BaseModel]) -> None:
    with pytest.raises(ConfigurationError, match="method must be one of ilora, lora, got 'full'"):
        run_answers(make_trial("full"))
    base = tiny_base()
    base.tokenizer.eos_token = None
    trial = make_trial("lora")
    object.__setattr__(trial, "load_base", lambda: base)
    with pytest.raises(ConfigurationError, match="must have an end-of-text token, which ends an answer, got none from"):
        run_answers(trial)
