"""One training step, forward and backward: ours, textbook transformers, PEFT's prompt tuning and LoRA."""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from timing import Row, in_turns, print_table, relative
from torch import Tensor

from peft_bituning import BiTuningConfig, BiTuningModel
from peft_bituning.base_models import load_base_model
from peft_bituning.data import PRESETS, LeaveOneOut, PromptEncoder, load_interactions
from peft_bituning.data.collator import HistoryBatch, HistoryCollator
from peft_bituning.losses import catalog_contrastive_loss
from peft_bituning.matmul import fast_cpu_matmul
from peft_bituning.tuners.bituning.backbone import token_width

PREFIX, ROWS = 32, 8
WAYS = (
    "textbook, static prefix",
    "whole rows, static",
    "start once a batch, static",
    "ours, static: + probed matmul",
    "whole rows, M-Former",
    "ours, M-Former: + probed matmul",
    "PEFT prompt tuning",
    "PEFT LoRA, rank 8",
)
SMALL: dict[str, Any] = {
    "num_experts": 4,
    "encoder_hidden_size": 128,
    "encoder_num_layers": 2,
    "encoder_num_attention_heads": 4,
    "collaborative_dim": 64,
}


class Steps:
    """The ways to make a step, on one batch.

    Args:
        seed: of the virtual tokens.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        data, base = load_interactions("ml-100k"), load_base_model("smollm2-135m")
        prompts = PromptEncoder(PRESETS["paper"], base.tokenizer, data.items, max_items=10)
        samples = LeaveOneOut(data.histories).training_samples("every_cut", 0, 0)[:ROWS]
        collator = HistoryCollator(prompts, base.tokenizer.pad_token_id or 0, 10)
        self.batch = collator([sample.history for sample in samples])
        self.targets = torch.tensor([sample.target for sample in samples])
        self.table = F.normalize(torch.randn(len(data.items), token_width(base.model)), dim=-1)
        self.text = {"input_ids": self.batch.input_ids, "attention_mask": self.batch.attention_mask}
        self.gradients: dict[str, Tensor] = {}

    def build(self, name: str) -> Callable[[], None]:
        """Return one of `WAYS`; calling it makes a step and keeps its gradient."""
        if name.startswith("PEFT"):
            peer: PromptTuningConfig | LoraConfig = LoraConfig(task_type="FEATURE_EXTRACTION", r=8)
            if "prompt tuning" in name:
                peer = PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=PREFIX)
            model = get_peft_model(load_base_model("smollm2-135m").model.model, peer).train()
            return self._step(name, model, _last_state(model, self.batch))
        torch.manual_seed(self.seed)
        settings = SMALL if "M-Former" in name else {"prefix_encoder": "static"}
        config = BiTuningConfig(num_virtual_tokens=PREFIX, **settings)
        model = get_peft_model(load_base_model("smollm2-135m").model, config).train()
        cast(BiTuningModel, model.base_model).share_start = not name.startswith("whole")
        if name.startswith("textbook"):
            return self._step(name, model, _textbook(model, self.batch))
        extra = {}
        if "M-Former" in name:
            extra = {"collaborative_embeds": torch.randn(ROWS, 10, 64), "collaborative_mask": torch.ones(ROWS, 10)}
        return self._step(name, model, lambda: model(**self.text, **extra).pooler_output, "probed" in name)

    def _step(self, name: str, model: PeftModel, embed: Callable[[], Tensor], fast: bool = False) -> Callable[[], None]:
        own = [value for value in model.parameters() if value.requires_grad]

        def way() -> None:
            with fast_cpu_matmul(fast):
                loss = catalog_contrastive_loss(embed(), self.table, self.targets, is_normalized=True)
                self.gradients[name] = torch.cat([each.flatten() for each in torch.autograd.grad(loss, own)])

        return way


def run(limit: float, rounds: int) -> None:
    """Print one table.

    Args:
        limit: the machine's matmul rate, FLOP/s.
        rounds: how often each way is timed.
    """
    steps = Steps()
    seconds = in_turns({name: steps.build(name) for name in WAYS}, rounds)
    exact = steps.gradients[WAYS[0]]
    rows = [
        Row(name, taken, None, f"gradient {relative(steps.gradients[name], exact)}" if "static" in name else "")
        for name, taken in seconds.items()
    ]
    shape = list(steps.batch.input_ids.shape)
    title = f"train step: rows and tokens {shape}, {PREFIX} prefix tokens, {len(steps.table):,} items, SmolLM2-135M"
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
        last = PREFIX + lengths
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
