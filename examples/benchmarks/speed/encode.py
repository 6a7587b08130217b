"""Encoding item titles: ours, whole rows, textbook transformers, sentence-transformers."""

import tempfile
from collections.abc import Callable, Sequence
from typing import cast

import torch
from peft import get_peft_model
from timing import Row, in_turns, print_table, relative
from torch import Tensor

from peft_bituning import BiTuningConfig, BiTuningModel
from peft_bituning.base_models import BaseModel, load_base_model
from peft_bituning.catalog import HistoryEncoder
from peft_bituning.data import PRESETS, Interactions, PromptEncoder, load_interactions
from peft_bituning.data.collator import HistoryCollator
from peft_bituning.matmul import fast_cpu_matmul

BATCH, PREFIX = 32, 32


def run(limit: float, items: int, rounds: int) -> None:
    """Print one table.

    Args:
        limit: the machine's matmul rate, FLOP/s.
        items: titles to encode.
        rounds: how often each way is timed.
    """
    data, base = load_interactions("ml-100k"), load_base_model("smollm2-135m")
    prompts = PromptEncoder(PRESETS["paper"], base.tokenizer, data.items)
    collator = HistoryCollator(prompts, base.tokenizer.pad_token_id or 0, 1)
    texts = [prompts.text([item], "item") for item in range(items)]
    torch.manual_seed(0)
    model = get_peft_model(base.model, BiTuningConfig(prefix_encoder="static", num_virtual_tokens=PREFIX)).eval()
    tuner = cast(BiTuningModel, model.base_model)
    encoder = HistoryEncoder(model, collator, None, torch.device("cpu"), BATCH)
    found: dict[str, Tensor] = {}

    def ours(name: str, share: bool, fast: bool) -> Callable[[], None]:
        def encode() -> None:
            tuner.share_start = share
            with fast_cpu_matmul(fast):
                found[name] = encoder.encode_items(items)

        return encode

    def textbook() -> None:
        with model.disable_adapter():
            _textbook(base, texts)

    ways: dict[str, Callable[[], object]] = {
        "ours: start once a batch, probed matmul": ours("ours: start once a batch, probed matmul", True, True),
        "start once a batch": ours("start once a batch", True, False),
        "whole rows, sorted by length": ours("whole rows, sorted by length", False, False),
        "textbook transformers, no virtual tokens": textbook,
    }
    peer = _sentence_transformer(base)
    if peer is not None:
        ways["sentence-transformers, no virtual tokens"] = lambda: peer(texts)
    seconds = in_turns(ways, rounds)
    exact = found["whole rows, sorted by length"]
    flops = _least_flops(base, data, prompts, items)
    rows = [
        Row(name, taken, flops, f"embeddings {relative(found[name], exact)}" if name in found else "")
        for name, taken in seconds.items()
    ]
    tokens = sum(len(prompts.encode([item], "item")) for item in range(items)) / items
    title = f"encode: {items} titles of {tokens:.0f} tokens with the instruction, {PREFIX} prefix tokens, SmolLM2-135M"
    print_table(title, rows, limit, "textbook transformers, no virtual tokens")


def _least_flops(base: BaseModel, data: Interactions, prompts: PromptEncoder, items: int) -> float:
    """2 N FLOP a token that no two items share, the suffix among them; N without embeddings."""
    weights = sum(value.numel() for name, value in base.model.named_parameters() if ".layers." in name)
    shared = len(prompts.encode([], "item"))
    tokens = sum(len(prompts.encode([item], "item")) - shared + 1 for item in range(items)) + shared + PREFIX
    return 2.0 * weights * tokens


@torch.no_grad()
def _textbook(base: BaseModel, texts: Sequence[str]) -> None:
    """Logits and all, padded to the longest of each batch as it comes, the last token's state."""
    tokenizer = base.tokenizer
    for start in range(0, len(texts), BATCH):
        batch = tokenizer(list(texts[start : start + BATCH]), return_tensors="pt", padding=True)
        states = base.model(**batch, output_hidden_states=True).hidden_states[-1]
        states[torch.arange(len(states)), batch["attention_mask"].sum(1) - 1]


def _sentence_transformer(base: BaseModel) -> Callable[[Sequence[str]], object] | None:
    try:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    except ImportError:
        return None
    with tempfile.TemporaryDirectory() as folder:
        fresh = load_base_model("smollm2-135m")
        fresh.model.model.save_pretrained(folder)
        fresh.tokenizer.save_pretrained(folder)
        transformer = Transformer(folder)
    transformer.tokenizer.pad_token = transformer.tokenizer.pad_token or transformer.tokenizer.eos_token
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="lasttoken")
    model = SentenceTransformer(modules=[transformer, pooling], device="cpu")
    return lambda texts: model.encode(list(texts), batch_size=BATCH, show_progress_bar=False)
