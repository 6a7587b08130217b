"""Made-up shops and small real tokenizers."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from peft_bituning.data import PRESETS, ItemCatalog

WORDS = "brass copper steel blue red lamp kettle rope drill glove Acme Bolt Corvo tools kitchen garden year title (:,)."


@pytest.fixture
def catalog() -> ItemCatalog:
    """Return four items: all attributes, no brand, no title, markup to decode."""
    return ItemCatalog.from_records(
        [
            {"item_id": "007", "title": "Brass lamp", "brand": "Acme", "category": "garden"},
            {"item_id": "8", "title": "Steel  kettle", "category": "kitchen"},
            {"item_id": "x", "brand": "Bolt", "category": "tools"},
            {"item_id": "y", "title": "Rope &amp; drill", "brand": "Corvo"},
        ]
    )


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer that puts nothing before a text, as GPT-2 and Qwen do."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    _train(core)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<pad>")


@pytest.fixture(scope="session")
def marked_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that marks word starts and adds BOS and EOS, as SentencePiece models of Llama do."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.Split(Regex(r"\n"), "isolated")]
    )
    core.decoder = decoders.Metaspace(prepend_scheme="always")
    _train(core)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", core.token_to_id("<s>")), ("</s>", core.token_to_id("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


@pytest.fixture
def write_folder(tmp_path: Path) -> Callable[..., Path]:
    """Return a writer of `items.jsonl` and `interactions.csv`, which gives the folder."""

    def write(items: list[object], table: str | bytes) -> Path:
        lines = [item if isinstance(item, str) else json.dumps(item) for item in items]
        (tmp_path / "items.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        (tmp_path / "interactions.csv").write_bytes(table if isinstance(table, bytes) else table.encode())
        return tmp_path

    return write


def _train(core: Tokenizer) -> None:
    texts = [WORDS * 3, *(template.instruction for template in PRESETS.values()), "\n>> 1234567890. \n"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=["<pad>", "<s>", "</s>", "<unk>"],
            initial_alphabet=[*alphabet, "\n", "▁", "&", "<", "/"],
            show_progress=False,
        ),
    )
