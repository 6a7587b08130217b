"""Encoding item titles: ours, textbook transformers with the same virtual tokens, sentence-transformers without any."""

import random
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, cast

import setting
import torch
from peft import PeftModel
from timing import Row, in_turns, print_table, relative
from torch import Tensor
from train_step import SMALL

from peft_bituning import BiTuningModel
from peft_bituning.catalog import HistoryEncoder
from peft_bituning.data import PromptEncoder
from peft_bituning.data.collator import HistoryCollator
from peft_bituning.matmul import fast_cpu_matmul
from peft_bituning.recommenders import Precomputed

BATCH = 16
TEXTBOOK = "textbook transformers, static prefix"


class Titles:
    """The ways to encode titles in an order that says nothing of their length.

    Args:
        items: how many.
    """

    def __init__(self, items: int) -> None:
        data, base = setting.interactions(), setting.language_model()
        self.prompts = PromptEncoder(setting.template(), base.tokenizer, data.items)
        self.collator = HistoryCollator(self.prompts, base.tokenizer.pad_token_id or 0, 1)
        self.known = len(data.items)
        self.items = random.Random(0).sample(range(self.known), items)
        self.weights = sum(value.numel() for name, value in base.model.named_parameters() if ".layers." in name)
        self.recommender = Precomputed(torch.randn(self.known, 64, generator=torch.Generator().manual_seed(0)))
        self.found: dict[str, Tensor] = {}

    def ours(self, name: str, kernel: str = "eager", shares: bool = True) -> Callable[[], None]:
        """Return a way through `HistoryEncoder`; static, M-Former and the probed matmul are read from its name."""
        has_experts = "M-Former" in name
        settings: dict[str, Any] = SMALL if has_experts else {"prefix_encoder": "static"}
        model = setting.tuned(kernel, **settings).eval()
        cast(BiTuningModel, model.base_model).share_start = shares
        encoder = HistoryEncoder(
            model, self.collator, self.recommender if has_experts else None, torch.device("cpu"), batch_size=BATCH
        )

        def way() -> None:
            with fast_cpu_matmul("probed" in name):
                self.found[name] = encoder.encode([[item] for item in self.items], "item")

        return way

    def textbook(self) -> Callable[[], None]:
        """Return logits and all, padded to the longest of each batch as it comes."""
        model = setting.tuned("sdpa", prefix_encoder="static").eval()
        return lambda: self.found.update({TEXTBOOK: self._by_hand(model)})

    @torch.no_grad()
    def _by_hand(self, model: PeftModel) -> Tensor:
        base, found = cast(Any, model.get_base_model()), []
        prefix = cast(Any, model.base_model).prefix_encoder.embeddings
        suffix = base.virtual_tokens.bituning_suffix["default"].weight
        for start in range(0, len(self.items), BATCH):
            batch = self.collator([[item] for item in self.items[start : start + BATCH]], "item")
            lengths = batch.attention_mask.sum(1)
            tokens = base.get_input_embeddings()(batch.input_ids)
            rows = [
                torch.cat([prefix, row[:length], suffix, row.new_zeros(len(row) - int(length), row.shape[1])])
                for row, length in zip(tokens, lengths, strict=True)
            ]
            last = setting.PREFIX + lengths
            mask = (torch.arange(rows[0].shape[0]) <= last.unsqueeze(1)).long()
            states = base(inputs_embeds=torch.stack(rows), attention_mask=mask, output_hidden_states=True)
            found.append(states.hidden_states[-1][torch.arange(len(last)), last])
        return torch.cat(found)

    def sentence_transformer(self) -> Callable[[], object] | None:
        """Return `encode` of sentence-transformers over the same backbone, where it is installed."""
        try:
            from sentence_transformers import SentenceTransformer
            from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
        except ImportError:
            return None
        base = setting.language_model()
        with tempfile.TemporaryDirectory() as folder:
            cast(Any, base.model).model.save_pretrained(folder)
            base.tokenizer.save_pretrained(folder)
            transformer = Transformer(folder)
        transformer.tokenizer.pad_token = transformer.tokenizer.pad_token or transformer.tokenizer.eos_token
        pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="lasttoken")
        model = SentenceTransformer(modules=[transformer, pooling], device="cpu")
        texts = [self.prompts.text([item], "item") for item in self.items]
        return lambda: model.encode(texts, batch_size=BATCH, show_progress_bar=False)

    def tokens(self) -> Sequence[int]:
        """Return each title's tokens, the instruction among them."""
        return [self.collator.length([item], "item") for item in self.items]

    def least_flops(self, shares: bool) -> float:
        """Return 2 N operations a token that has to be run; with a static prefix what all items start with once."""
        shared = self.collator.length([], "item")
        own = sum(length - shared + 1 for length in self.tokens())
        return 2.0 * self.weights * (own + (shared + setting.PREFIX) * (1 if shares else len(self.items)))


def run(limit: float, items: int, rounds: int, steps: bool) -> None:
    """Print one table.

    Args:
        limit: the machine's matmul rate, FLOP/s.
        items: titles to encode.
        rounds: how often each way is timed.
        steps: also time what lies between textbook and ours.
    """
    task = Titles(items)
    exact: dict[str, Tensor] = {}
    for part in ("static", "M-Former"):
        task.ours(f"whole rows, {part}", shares=False)()
        exact[part] = task.found[f"whole rows, {part}"]
    names = ["ours, static", "ours, static, probed matmul", "ours, M-Former, probed matmul"]
    ways: dict[str, Callable[[], object]] = {TEXTBOOK: task.textbook(), **{name: task.ours(name) for name in names}}
    if steps:
        extra = ("whole rows, static", "whole rows, static, probed matmul", "ours, M-Former")
        ways |= {name: task.ours(name, shares=False) for name in extra}
    peer = task.sentence_transformer()
    if peer is not None:
        ways["sentence-transformers, no virtual tokens"] = peer
    seconds = in_turns(ways, rounds)
    rows = []
    for name, taken in seconds.items():
        part = "M-Former" if "M-Former" in name else "static"
        error = f"embeddings {relative(task.found[name], exact[part])}" if name in task.found else ""
        flops = None if name not in task.found else task.least_flops(part == "static")
        rows.append(Row(name, taken, flops, error))
    title = (
        f"encode: {items} titles of {sum(task.tokens()) / items:.0f} tokens with the instruction, {setting.PREFIX} "
        f"prefix tokens, {setting.name()}"
    )
    print_table(title, rows, limit)
