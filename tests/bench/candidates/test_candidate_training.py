"""The loop: weights of rows, the epoch that is kept, and runs that go on."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from bench.candidates import CandidatePrompts, CandidateTraining, TitleAnswers
from bench.candidates.candidate_training import KeptEpoch, TaskRows
from peft import LoraConfig, get_peft_model

from peft_bituning.base_models import BaseModel
from peft_bituning.data import LeaveOneOut
from peft_bituning.errors import CheckpointError, NonFiniteLossError
from peft_bituning.training.checkpoint import CheckpointStore


@pytest.fixture
def make_training(
    make_prompts: Callable[..., CandidatePrompts],
    make_base: Callable[[], BaseModel],
    make_arguments: Callable[..., Any],
    split: LeaveOneOut,
    tmp_path: Any,
) -> Callable[..., CandidateTraining]:
    """Return a maker of trainings of LoRA, with dropout, by title."""

    def make(folder: str = "run", metrics: Any = None, dropout: float = 0.1, **changes: Any) -> CandidateTraining:
        arguments = make_arguments(resume=True, **changes)
        torch.manual_seed(0)
        config = LoraConfig(r=2, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(make_base().model, config)
        accelerator = Accelerator()
        prompts = make_prompts("titles")
        task = TitleAnswers(model, prompts, split, arguments, 0, accelerator.device, eos_token_id=2, num_candidates=4)
        values = iter(metrics or [0.0] * 9)
        task.validate = lambda description: (next(values), {"said": description})  # type: ignore[method-assign]
        store = CheckpointStore(tmp_path / folder, 1)
        return CandidateTraining(accelerator, task, arguments, store, {"who": "test"})

    return make


def losses(training: CandidateTraining) -> list[float]:
    return [record["loss"] for record in training.state.log_history]


def test_it_learns_and_keeps_the_best_epoch(make_training: Callable[..., CandidateTraining]) -> None:
    training = make_training(metrics=[0.1, 0.4, 0.2], dropout=0.0)
    after: list[Any] = []
    save = training._save
    training._save = lambda: (after.append(training._weights()), save())[1]  # type: ignore[method-assign]
    kept = training.run()
    assert (kept.epoch, kept.valid) == (2, {"said": "validating epoch 2"})
    assert [epoch["valid"]["said"] for epoch in training.state.epochs] == [f"validating epoch {n}" for n in (1, 2, 3)]
    assert [epoch["rows"] for epoch in training.state.epochs] == [6, 6, 6] and training.state.global_step == 6
    rates = [record["learning_rate"] for record in training.state.log_history]
    assert rates[0] == 5e-3 and rates == sorted(rates, reverse=True) and rates[-1] > 0  # one cosine over all epochs
    assert max(losses(training)[-2:]) < min(losses(training)[:2])
    parameters = dict(training.model.named_parameters())
    for name, value in after[3].items():  # two updates an epoch, a checkpoint after each
        torch.testing.assert_close(parameters[name], value)
        torch.testing.assert_close(kept.weights[name], value)
    assert any(not torch.equal(value, after[5][name]) for name, value in after[3].items())


def test_patience(make_training: Callable[..., CandidateTraining]) -> None:
    training = make_training(metrics=[0.3, 0.2, 0.9], early_stopping_patience=1)
    assert training.run().epoch == 1 and len(training.state.epochs) == 2


def test_passes_make_no_difference(make_training: Callable[..., CandidateTraining]) -> None:
    """An answer's tokens weigh the same wherever they fall; answers are of two lengths here."""
    one = make_training("one", dropout=0.0, stage2_epochs=0)
    assert len({one.task.weight(row) for row in one.task.rows(0)}) > 1
    one.run()
    for name, changes in (
        ("steps", {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}),
        ("tokens", {"per_device_train_batch_size": 3, "max_tokens_per_pass": 200}),
    ):
        other = make_training(name, dropout=0.0, stage2_epochs=0, **changes)
        assert len(other._start_update()._passes(TaskRows(other.task, 0), [0, 1, 2])[0]) > 1
        other.run()
        assert losses(other) == pytest.approx(losses(one), rel=1e-4)


def test_a_stopped_run_goes_on(
    make_training: Callable[..., CandidateTraining], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After any checkpoint, within an epoch and between two: the same losses, dropout and all, the same weights."""
    whole = make_training("whole", metrics=[0.1, 0.4, 0.2])
    expected = whole.run()
    for stop in (1, 2, 4):
        name = f"stopped {stop}"
        stopped = make_training(name, metrics=[0.1, 0.4, 0.2])
        save, calls = stopped._save, iter(range(1, 9))

        def saved(save: Callable[[], None] = save, calls: Any = calls, stop: int = stop) -> None:
            save()
            if next(calls) == stop:
                raise KeyboardInterrupt

        monkeypatch.setattr(stopped, "_save", saved)
        with pytest.raises(KeyboardInterrupt):
            stopped.run()
        resumed = make_training(name, metrics=[0.1, 0.4, 0.2][len(stopped.state.epochs) :])
        assert not resumed.is_resumed
        resumed.read_checkpoint()
        assert resumed.is_resumed
        kept = resumed.run()
        assert losses(resumed) == pytest.approx(losses(whole), abs=1e-6) and len(losses(whole)) == 6
        assert (kept.epoch, kept.valid) == (expected.epoch, expected.valid)
        for key, value in expected.weights.items():
            torch.testing.assert_close(kept.weights[key], value, atol=1e-6, rtol=1e-5)


def test_checkpoints_of_another_run(make_training: Callable[..., CandidateTraining]) -> None:
    make_training().run()
    other = make_training(learning_rate=1e-3)
    with pytest.raises(CheckpointError, match="arguments.learning_rate was 0.005 and is 0.001"):
        other.read_checkpoint()
    finished = make_training()
    finished.read_checkpoint()
    assert isinstance(finished.run(), KeptEpoch) and finished.state.global_step == 6  # trains no more


def test_a_loss_that_is_not_finite(make_training: Callable[..., CandidateTraining]) -> None:
    training = make_training()
    with torch.no_grad():
        next(iter(training.trained.values())).fill_(float("inf"))
    with pytest.raises(NonFiniteLossError, match="training stopped at epoch 1, update 1: loss nan"):
        training.run()
