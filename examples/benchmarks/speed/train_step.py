"""One training step, forward and backward: ours, textbook transformers, PEFT's prompt tuning and LoRA."""

from collections.abc import Callable
from typing import Any, cast

import setting
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from timing import Row, in_turns, print_table, relative
from torch import Tensor

from peft_bituning import BiTuningModel
from peft_bituning.data import LeaveOneOut, PromptEncoder
from peft_bituning.data.collator import HistoryBatch, HistoryCollator
from peft_bituning.losses import catalog_contrastive_loss
from peft_bituning.matmul import fast_cpu_matmul
from peft_bituning.training.update_plan import split_by_tokens
from peft_bituning.tuners.rows.backbone import token_width

HISTORIES = (4, 4, 3)  # items of each user; every cut is a row
TEXTBOOK = "textbook transformers, static prefix"
WAYS = (
    TEXTBOOK,
    "PEFT prompt tuning",
    "PEFT LoRA, rank 8",
    "ours, static",
    "ours, static, probed matmul",
    "ours, M-Former, probed matmul",
)
STEPS = ("whole rows, static", "whole rows, static, probed matmul", "whole rows, M-Former", "ours, M-Former")
SMALL: dict[str, Any] = {
    "num_experts": 4,
    "encoder_hidden_size": 128,
    "encoder_num_layers": 2,
    "encoder_num_attention_heads": 4,
    "collaborative_dim": 64,
}


class Steps:
    """The ways to make a step on eight rows, the cuts of three users."""

    def __init__(self) -> None:
        data, base = setting.interactions(), setting.language_model()
        prompts = PromptEncoder(setting.template(), base.tokenizer, data.items)
        self.collator = HistoryCollator(prompts, base.tokenizer.pad_token_id or 0, 10)
        long = (history for history in data.histories if len(history) >= max(HISTORIES))
        users = [history[:items] for items, history in zip(HISTORIES, long, strict=False)]
        samples = LeaveOneOut([[*user, 0, 0] for user in users]).training_samples("every_cut", 0, 0)
        self.histories = [sample.history for sample in samples]
        self.targets = torch.tensor([sample.target for sample in samples])
        self.batch = self.collator(self.histories)
        torch.manual_seed(0)
        self.table = F.normalize(torch.randn(len(data.items), token_width(base.model)), dim=-1)
        self.collaborative = torch.randn(len(samples), 10, 64)
        self.weights = sum(value.numel() for name, value in base.model.named_parameters() if ".layers." in name)
        self.opening = len(prompts.encode([]))
        self.gradients: dict[str, Tensor] = {}

    def build(self, name: str) -> Callable[[], None]:
        """Return one of `WAYS` or `STEPS`; calling it makes a step and keeps its gradient."""
        if name.startswith("PEFT"):
            peer: PromptTuningConfig | LoraConfig = LoraConfig(task_type="FEATURE_EXTRACTION", r=8)
            if "prompt tuning" in name:
                peer = PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=setting.PREFIX)
            rival = get_peft_model(setting.language_model().model.model, peer).train()
            return self._step(name, rival, [(_last_state(rival, self.batch), self.targets)])
        settings = SMALL if "M-Former" in name else {"prefix_encoder": "static"}
        kernel = "sdpa" if name == TEXTBOOK else "eager"
        model = setting.tuned(kernel, **settings).train()
        if name == TEXTBOOK:
            return self._step(name, model, [(_textbook(model, self.batch), self.targets)])
        cast(BiTuningModel, model.base_model).share_start = not name.startswith("whole")
        passes = [list(range(len(self.histories)))]
        if "ours, M-Former" in name:  # as the training loop: shortest first, in passes of half the padded slots
            lengths = {row: self.collator.length(self.histories[row]) for row in passes[0]}
            rows = sorted(passes[0], key=lambda row: lengths[row])
            passes = split_by_tokens(rows, lengths, max(lengths.values()) * len(rows) // 2)
        return self._step(name, model, [self._pass(model, rows) for rows in passes], "probed" in name)

    def _pass(self, model: PeftModel, rows: list[int]) -> tuple[Callable[[], Tensor], Tensor]:
        batch = self.collator([self.histories[row] for row in rows])
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if cast(BiTuningModel, model.base_model).prefix_encoder.needs_collaborative:
            embeds = self.collaborative[rows][:, : batch.item_mask.shape[1]]
            inputs |= {"collaborative_embeds": embeds, "collaborative_mask": batch.item_mask}
        return lambda: model(**inputs).pooler_output, self.targets[rows]

    def _step(
        self, name: str, model: PeftModel, passes: list[tuple[Callable[[], Tensor], Tensor]], fast: bool = False
    ) -> Callable[[], None]:
        own = [value for value in model.parameters() if value.requires_grad]

        def way() -> None:
            model.zero_grad()
            with fast_cpu_matmul(fast):
                for embed, targets in passes:
                    losses = catalog_contrastive_loss(
                        embed(), self.table, targets, is_normalized=True, reduction="none"
                    )
                    (losses.sum() / len(self.targets)).backward()
            self.gradients[name] = torch.cat([value.grad.flatten() for value in own if value.grad is not None])

        return way

    def least_flops(self, shares: bool) -> float:
        """Return 4 N operations a token that has to be run, N weights; with a static prefix shared ones count once."""
        lengths = [self.collator.length(history) - self.opening for history in self.histories]
        if not shares:
            return 4.0 * self.weights * (sum(lengths) + len(lengths) * (setting.PREFIX + self.opening + 1))
        longest: dict[int, int] = {}
        for history, length in zip(self.histories, lengths, strict=True):
            longest[history[0]] = max(longest.get(history[0], 0), length)
        return 4.0 * self.weights * (setting.PREFIX + self.opening + sum(longest.values()) + len(lengths))


def run(limit: float, rounds: int, steps: bool) -> None:
    """Print one table.

    Args:
        limit: the machine's matmul rate, FLOP/s.
        rounds: how often each way is timed.
        steps: also time what lies between textbook and ours.
    """
    task = Steps()
    for name in ("whole rows, static", "whole rows, M-Former"):
        task.build(name)()
    exact = {part: task.gradients[f"whole rows, {part}"] for part in ("static", "M-Former")}
    seconds = in_turns({name: task.build(name) for name in WAYS + (STEPS if steps else ())}, rounds)
    rows = []
    for name, taken in seconds.items():
        part = "M-Former" if "M-Former" in name else "static"
        error = "" if name.startswith("PEFT") else f"gradient {relative(task.gradients[name], exact[part])}"
        rows.append(Row(name, taken, task.least_flops(part == "static"), error))
    shape = list(task.batch.input_ids.shape)
    title = (
        f"train step: {shape[0]} rows of up to {shape[1]} tokens, the cuts of {len(HISTORIES)} users, {setting.PREFIX} "
        f"prefix tokens, {len(task.table):,} items, {setting.name()}"
    )
    print_table(title, rows, limit)


def _textbook(model: PeftModel, batch: HistoryBatch) -> Callable[[], Tensor]:
    """Embeddings put together by hand, the whole causal LM with its logits, the state of the last real column."""
    base = cast(Any, model.get_base_model())
    prefix = cast(Any, model.base_model).prefix_encoder.embeddings
    suffix = base.virtual_tokens.bituning_suffix["default"].weight
    lengths = batch.attention_mask.sum(1)

    def embed() -> Tensor:
        tokens = base.get_input_embeddings()(batch.input_ids)
        rows = [
            torch.cat([prefix, row[:length], suffix, row.new_zeros(len(row) - int(length), row.shape[1])])
            for row, length in zip(tokens, lengths, strict=True)
        ]
        last = setting.PREFIX + lengths
        mask = (torch.arange(rows[0].shape[0]) <= last.unsqueeze(1)).long()
        states = base(
            inputs_embeds=torch.stack(rows), attention_mask=mask, output_hidden_states=True, use_cache=False
        ).hidden_states[-1]
        return states[torch.arange(len(states)), last]

    return embed


def _last_state(model: PeftModel, batch: HistoryBatch) -> Callable[[], Tensor]:
    columns = batch.attention_mask.sum(1) - 1

    def embed() -> Tensor:
        states = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        states = states[:, -batch.input_ids.shape[1] :]
        return states[torch.arange(len(states)), columns]

    return embed
