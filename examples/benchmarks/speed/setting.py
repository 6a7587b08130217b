"""The language model and the items that benchmarks run on: the quickstart's, or random ones where those are missing."""

import copy
import os
import random
from functools import cache

import torch
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peft_bituning import BiTuningConfig
from peft_bituning.assembly import read_template
from peft_bituning.base_models import BaseModel, load_base_model
from peft_bituning.data import Interactions, ItemCatalog, PromptTemplate, load_interactions
from peft_bituning.errors import ConfigurationError, DataError

PREFIX = 32
SAVED = "SPEED_BASE_MODEL"  # environment variable: a folder with the language model, unpacked once for many processes
DATASET = "SPEED_DATASET"  # environment variable: what `load_interactions` reads in place of MovieLens-100K
ATTRIBUTES = "SPEED_ATTRIBUTES"  # environment variable: the columns printed beside a title, one a line


@cache
def _loaded() -> tuple[str, BaseModel]:
    try:
        return "SmolLM2-135M", load_base_model(os.environ.get(SAVED, "smollm2-135m"))
    except ConfigurationError:
        pass
    alphabet = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=4,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="a", eos_token="a")
    return "a random Llama of 4 layers", BaseModel(model, wrapped, "random", is_local=True)


def language_model(kernel: str = "sdpa") -> BaseModel:
    """Return a copy of the language model with an attention kernel of transformers."""
    base = _loaded()[1]
    model = copy.deepcopy(base.model)
    model.set_attn_implementation(kernel)
    return BaseModel(model, base.tokenizer, base.name, is_local=base.is_local)


def save(folder: str) -> None:
    """Write the language model where other processes find it by `SAVED`; transformers saves no GGUF model itself."""
    base = _loaded()[1]
    config = copy.deepcopy(base.model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(base.model)(config)
    plain.load_state_dict(base.model.state_dict())
    plain.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)


def name() -> str:
    """Return what the language model is called in titles."""
    return _loaded()[0]


def tuned(kernel: str = "eager", **settings: object) -> PeftModel:
    """Return a copy of the language model with a fresh adapter, the same one for the same settings."""
    torch.manual_seed(0)
    config = BiTuningConfig.paper(num_virtual_tokens=PREFIX, **settings)  # type: ignore[arg-type]
    return get_peft_model(language_model(kernel).model, config)


def template() -> PromptTemplate:
    """Return the paper's prompt, with the chosen attributes."""
    chosen = os.environ.get(ATTRIBUTES)
    return read_template("paper", chosen.splitlines() if chosen else None)


@cache
def interactions() -> Interactions:
    """Return the chosen data; by default MovieLens-100K, or made-up histories of as many films where it is missing."""
    if chosen := os.environ.get(DATASET):
        return load_interactions(chosen)
    try:
        return load_interactions("ml-100k")
    except (ConfigurationError, DataError):
        pass
    generator = random.Random(0)
    words = ["".join(generator.choices("aeinorst", k=generator.randint(2, 8))) for _ in range(500)]
    catalog = ItemCatalog.from_records(
        {"item_id": str(n), "title": " ".join(generator.choices(words, k=generator.randint(1, 6)))} for n in range(1682)
    )
    histories = tuple(tuple(generator.choices(range(1682), k=20)) for _ in range(943))
    return Interactions(catalog, tuple(str(user) for user in range(943)), histories)
