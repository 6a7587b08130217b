"""Answers by title: what is trained, what is written, and how it is counted."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from bench.candidates import AnswerReport, CandidatePrompts, TitleAnswers
from bench.candidates.answers import Answer, read_answer
from peft import LoraConfig, PeftModel, get_peft_model

from peft_bituning import ILoRAConfig
from peft_bituning.base_models import BaseModel
from peft_bituning.data import LeaveOneOut
from peft_bituning.recommenders import Precomputed

EOS = 2
Make = Callable[..., TitleAnswers]


@pytest.fixture
def make_task(
    make_prompts: Callable[..., CandidatePrompts],
    make_base: Callable[[], BaseModel],
    make_arguments: Callable[..., Any],
    split: LeaveOneOut,
) -> Make:
    """Return a maker of tasks for LoRA or iLoRA whose weights are not those of the start."""

    def make(method: str = "lora", **changes: Any) -> TitleAnswers:
        known = Precomputed(torch.randn(10, 6, generator=torch.Generator().manual_seed(0)))
        config: Any = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        if method == "ilora":
            config = ILoRAConfig(r=4, num_experts=2, lora_dropout=0.0, collaborative_dim=6, task_type="CAUSAL_LM")
        torch.manual_seed(0)
        model: PeftModel = get_peft_model(make_base().model, config)
        for name, value in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(value, std=0.1)
        return TitleAnswers(
            model,
            make_prompts("titles"),
            split,
            make_arguments(**changes),
            0,
            torch.device("cpu"),
            eos_token_id=EOS,
            num_candidates=4,
            recommender=known if method == "ilora" else None,
        )

    return make


def test_labels_hold_the_answer_alone(make_task: Make) -> None:
    task = make_task("ilora")
    rows = task.rows(0)[:3]
    inputs = task.training_inputs(rows)
    assert set(inputs) == {"input_ids", "attention_mask", "labels", "collaborative_embeds", "collaborative_mask"}
    assert inputs["collaborative_mask"].sum(1).tolist() == [len(row.history) for row in rows]
    for row, ids, mask, labels in zip(
        rows, inputs["input_ids"], inputs["attention_mask"], inputs["labels"], strict=True
    ):
        counted = labels != -100
        assert counted.sum() == task.weight(row) and bool((ids[counted] == labels[counted]).all())
        title = task.prompts.items.attributes[row.target]["title"]
        assert task.prompts.tokenizer.decode(labels[counted]) == f" {title}</s>"
        prompt = ids[mask.bool() & ~counted]
        assert prompt.tolist() == task.prompts.prompt(row.history, row.items)
        places = counted.nonzero()[:, 0].tolist()
        assert places == list(range(len(prompt), len(prompt) + task.weight(row)))  # nothing after them but padding
        assert mask.sum() == task.length(row)


@pytest.mark.parametrize("method", ["lora", "ilora"])
def test_the_loss(method: str, make_task: Make) -> None:
    """The sum over answers of each token's negative log-probability, given all before it."""
    task = make_task(method)
    rows = task.rows(0)[:3]
    expected = 0.0
    for row in rows:
        inputs = task.training_inputs([row])
        with torch.no_grad():
            logits = task.model(**inputs).logits[0].double().numpy()
        first = task.length(row) - task.weight(row)
        for place in range(first, task.length(row)):
            scores = logits[place - 1]
            expected += np.log(np.exp(scores).sum()) - scores[int(inputs["input_ids"][0, place])]
    assert task.loss(task.model, rows).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("method", ["lora", "ilora"])
def test_answers_are_greedy(method: str, make_task: Make) -> None:
    """In a batch as alone, a token at a time over the whole text."""
    task = make_task(method)
    sets = task.candidates(task.split.samples("test"))[:5]
    found = task.answer(sets).answers
    for each, answer in zip(sets, found, strict=True):
        ids = task.prompts.prompt(each.history, each.items)
        start = len(ids)
        extra = task._collaborative([each])
        while len(ids) < start + task.prompts.longest_title + 1 and ids[-1] != EOS:
            row = torch.tensor([ids])
            with torch.no_grad():
                ids = [*ids, int(task.model(row, labels=row, **extra).logits[0, -1].argmax())]
        text = task.prompts.tokenizer.decode(ids[start:], skip_special_tokens=True)
        assert (answer.text, answer.chosen) == read_answer(text, task.prompts.names, each.items)
        assert (answer.user, answer.target) == (each.user, each.target)


def test_reading_an_answer() -> None:
    names = ["alien", "aliens", "blade runner", "heat"]
    assert read_answer(" Aliens\n- Heat", names, (1, 3)) == ("Aliens", 1)
    assert read_answer('"BLADE  runner"', names, (2, 3)) == ('"BLADE  runner"', 2)
    assert read_answer("Aliens", names, (0, 3)) == ("Aliens", None)  # a film, but no candidate
    assert read_answer("Alien or Heat", names, (0, 3)) == ("Alien or Heat", None)
    assert read_answer("", names, (0, 3)) == ("", None)


def test_the_counts() -> None:
    """Eight users: three right, five valid."""
    answers = [Answer(user, "", chosen, 7) for user, chosen in enumerate([7, 7, 7, 3, 4, None, None, None])]
    report = AnswerReport(tuple(answers))
    metrics = report.metrics()
    assert metrics == {
        "users": 8,
        "hit_ratio@1": 3 / 8,
        "hit_ratio@1_se": pytest.approx(np.sqrt(3 / 8 * 5 / 8 / 8)),
        "valid_ratio": 5 / 8,
        "valid_ratio_se": pytest.approx(np.sqrt(5 / 8 * 3 / 8 / 8)),
        "hit_ratio@1_of_valid": 3 / 5,
        "hit_ratio@1_x_valid_ratio": 3 / 8 * 5 / 8,
    }
    assert metrics["hit_ratio@1_of_valid"] * metrics["valid_ratio"] == pytest.approx(metrics["hit_ratio@1"])
    assert report.to_list()[3] == {"user": 3, "text": "", "chosen": 3, "target": 7}
    assert AnswerReport((Answer(0, "", None, 7),)).metrics()["hit_ratio@1_of_valid"] == 0.0


def test_who_is_asked_what(make_task: Make) -> None:
    """Training draws other candidates every epoch; those of the users asked are the same for every seed."""
    task, other = make_task(max_samples_per_epoch=None), make_task(seed=1, max_samples_per_epoch=None)
    samples = task.split.samples("test")
    assert task.candidates(samples) == other.candidates(samples)
    assert all(each.place is not None and len(each.items) == 4 for each in task.candidates(samples))
    first, second = ({(row.user, row.history): row.items for row in task.rows(epoch)} for epoch in (0, 1))
    assert set(first) == set(second) and first != second
    assert len(make_task().rows(0)) == 6
    other.candidate_seed = 5
    assert task.candidates(samples) != other.candidates(samples)
    metric, valid = task.validate("")
    assert metric == valid["hit_ratio@1"] and valid["users"] == 13
