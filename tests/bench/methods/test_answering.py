"""LoRA and iLoRA by the protocol of random candidates."""

from collections.abc import Callable

import pytest
from bench.methods import Trial
from bench.methods.answering import run_answers

from peft_bituning.base_models import BaseModel
from peft_bituning.errors import ConfigurationError


def test_both_methods_answer_the_same_questions(make_trial: Callable[..., Trial]) -> None:
    short = {"stage1_epochs": 1, "stage2_epochs": 0, "max_samples_per_epoch": 4, "max_validation_users": 2}
    trials = [make_trial(method, **short, per_device_train_batch_size=4) for method in ("ilora", "lora")]
    results = {trial.method: run_answers(trial, 4, max_test_users=5) for trial in trials}
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
