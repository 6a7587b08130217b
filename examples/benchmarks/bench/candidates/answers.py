"""Answers written by a language model that is shown the candidates' titles, and their share that is right."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from peft_bituning.data.samples import Sample
from peft_bituning.recommenders import IDRecommender, pad_histories

from .batches import fill_rows, pad_rows
from .prompts import normalised
from .sets import CandidateSet, draw_candidates
from .task import CandidateTask

IGNORED = -100


@dataclass(frozen=True)
class Answer:
    """What was written for one user."""

    user: int  # index of the user
    text: str  # the first line that was written
    chosen: int | None  # catalog index of the candidate that it names; None where it names none
    target: int  # catalog index of the item that was next


@dataclass(frozen=True)
class AnswerReport:
    """The answers of all users, in their order."""

    answers: tuple[Answer, ...]

    def metrics(self) -> dict[str, float]:
        """Return the shares that are right and that are valid.

        Returns:
            `users` U; `valid_ratio`, answers that name a candidate / U; `hit_ratio@1`, right answers / U;
            `hit_ratio@1_of_valid`, right answers / valid ones, 0 without any; `hit_ratio@1_x_valid_ratio`; and for the
            first two their standard errors over users, `_se`.
        """
        users = len(self.answers)
        valid = sum(each.chosen is not None for each in self.answers)
        right = sum(each.chosen == each.target for each in self.answers)
        hits, share = right / users, valid / users
        return {
            "users": users,
            "hit_ratio@1": hits,
            "hit_ratio@1_se": (hits * (1 - hits) / users) ** 0.5,
            "valid_ratio": share,
            "valid_ratio_se": (share * (1 - share) / users) ** 0.5,
            "hit_ratio@1_of_valid": right / valid if valid else 0.0,
            "hit_ratio@1_x_valid_ratio": hits * share,
        }

    def to_list(self) -> list[dict[str, Any]]:
        """Return the answers as JSON values."""
        return [asdict(each) for each in self.answers]


def read_answer(text: str, names: Sequence[str], items: Sequence[int]) -> tuple[str, int | None]:
    """Find the candidate that a text names.

    Args:
        text: what the language model wrote.
        names: every item's name [I], as `CandidatePrompts.names` gives them.
        items: the candidates.

    Returns:
        The text's first line, and the candidate whose whole name it is, or None.
    """
    line = text.strip().partition("\n")[0].strip()
    written = normalised(line)
    return line, next((item for item in items if names[item] == written), None)


@dataclass(eq=False)
class TitleAnswers(CandidateTask):
    """The choice between a target and random unseen items, by writing its title; and the training for it.

    The loss is the language model's own, over the answer alone: the title's tokens and the one that ends it.
    """

    model: PeftModel  # of task `CAUSAL_LM`, LoRA or iLoRA
    eos_token_id: int = field(kw_only=True)  # ends an answer
    num_candidates: int = field(kw_only=True)  # in a prompt
    recommender: IDRecommender | None = field(default=None, kw_only=True)  # what iLoRA's gate reads
    candidate_seed: int = field(default=0, kw_only=True)  # decides those of validation and test users, for all seeds

    # ------------------------------------------------------------------ training

    def _epoch_rows(self, epoch: int) -> list[CandidateSet]:
        """Take cuts of training histories, with other candidates every epoch."""
        arguments = self.arguments
        samples = self.split.training_samples(arguments.cuts, arguments.seed, epoch)  # type: ignore[arg-type]
        return self.candidates(samples[: arguments.max_samples_per_epoch], f"{arguments.seed}/{epoch}")

    def candidates(self, samples: Sequence[Sample], seed: str | None = None) -> list[CandidateSet]:
        """Draw candidates beside the targets of samples; by `candidate_seed` where no other is given."""
        seed = f"evaluated/{self.candidate_seed}" if seed is None else seed
        return draw_candidates(samples, self.prompts.names, self.num_candidates, seed)

    def length(self, row: CandidateSet) -> int:
        """Return the tokens of a row's prompt and answer."""
        return len(self.prompts.prompt(row.history, row.items)) + self.weight(row)

    def weight(self, row: CandidateSet) -> int:
        """Return the tokens of a row's answer: an update's loss is the mean over them."""
        return len(self.prompts.title(row.target)) + 1

    def training_inputs(self, rows: Sequence[CandidateSet]) -> dict[str, Tensor]:
        """Make the model's inputs of a pass over B rows.

        Returns:
            `input_ids`, `attention_mask`, `labels` [B, T], the labels -100 but at the answer, and for iLoRA
                `collaborative_embeds` [B, N, C] and `collaborative_mask` [B, N].
        """
        ids, labels = [], []
        for row in rows:
            prompt = self.prompts.prompt(row.history, row.items)
            answer = [*self.prompts.title(row.target), self.eos_token_id]
            ids.append(prompt + answer)
            labels.append([IGNORED] * len(prompt) + answer)
        inputs = pad_rows(ids, self.pad_token_id, self.device)
        return {**inputs, "labels": fill_rows(labels, IGNORED).to(self.device), **self._collaborative(rows)}

    def loss(self, model: nn.Module, rows: Sequence[CandidateSet]) -> Tensor:
        """Sum the next-token losses of the answers of B rows; the model is as accelerate prepared it."""
        return model(**self.training_inputs(rows))["loss"] * sum(map(self.weight, rows))

    def validate(self, description: str) -> tuple[float, dict[str, Any]]:
        """Answer for the validation users; epochs are chosen by the share of right answers."""
        samples = self.arguments.validation_samples(self.split)
        metrics = self.answer(self.candidates(samples), description).metrics()
        return metrics["hit_ratio@1"], metrics

    # ------------------------------------------------------------------ answers

    @torch.no_grad()
    def answer(self, sets: Sequence[CandidateSet], description: str = "answering") -> AnswerReport:
        """Let the model write, greedily, one answer per set and in their order."""
        prompts = [self.prompts.prompt(each.history, each.items) for each in sets]

        def run(numbers: list[int]) -> list[Answer]:
            texts = self._write([prompts[number] for number in numbers], [sets[number] for number in numbers])
            answers = []
            for number, text in zip(numbers, texts, strict=True):
                each = sets[number]
                line, chosen = read_answer(text, self.prompts.names, each.items)
                answers.append(Answer(each.user, line, chosen, each.target))
            return answers

        return AnswerReport(tuple(self._run(run, list(map(len, prompts)), description)))

    def _write(self, prompts: Sequence[Sequence[int]], rows: Sequence[CandidateSet]) -> list[str]:
        inputs = pad_rows(prompts, self.pad_token_id, self.device, left=True)
        written = self.model.generate(
            **inputs,
            **self._collaborative(rows),
            do_sample=False,
            num_beams=1,
            max_new_tokens=self.prompts.longest_title + 1,
            eos_token_id=self.eos_token_id,
            pad_token_id=self.pad_token_id,
        )
        new = written[:, inputs["input_ids"].shape[1] :]
        return self.prompts.tokenizer.batch_decode(new, skip_special_tokens=True)

    def _collaborative(self, rows: Sequence[CandidateSet]) -> dict[str, Tensor]:
        if self.recommender is None:
            return {}
        indices, mask = pad_histories([row.history for row in rows], self.recommender.max_length)
        indices, mask = indices.to(self.device), mask.to(self.device)
        return {
            "collaborative_embeds": self.recommender.encode(indices, mask),
            "collaborative_mask": self.recommender.encoded_mask(indices, mask),
        }
