"""A language model, purchase histories and a trained recommender, all of them tiny and real."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub: tests need no network
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: two workers of two threads wait for one another

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peft_bituning import BiTuningConfig
from peft_bituning.base_models import BaseModel
from peft_bituning.data import PRESETS, Interactions, ItemCatalog
from peft_bituning.serving import LaserRecommender
from peft_bituning.training import LaserArguments, fit

BASE_NAME = "tiny-llama"
_ITEMS = [
    ("007", "Brass lamp", "Acme", "garden"),
    ("8", "Steel kettle", "Bolt", "kitchen"),
    ("b2", "Copper pan", "Acme", "kitchen"),
    ("b3", "Blue rope", "Corvo", "tools"),
    ("b4", "Red drill", "Bolt", "tools"),
    ("b5", "Work glove", "Corvo", "garden"),
    ("b6", "Long ladder", "Acme", "tools"),
    ("b7", "Green hose", "Delta", "garden"),
    ("b8", "Tea cup", "Delta", "kitchen"),
    ("b9", "Paper bag &amp; box", "Corvo", "kitchen"),
    ("c0", "Iron nail", "Bolt", "tools"),
    ("c1", "Wood glue", "Delta", "tools"),
]


@dataclass(frozen=True)
class Trained:
    """What a finished training run left.

    Args:
        recommender: the recommender as `fit` returned it.
        folder: its output folder; copy it before changing anything.
        base_folder: the base model's folder.
        data: the histories it was trained on.
    """

    recommender: LaserRecommender
    folder: Path
    base_folder: Path
    data: Interactions


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that writes docs/architectures.md."""
    parser.addoption("--architectures-table", metavar="PATH", help="write the table of architectures x checks here")


@pytest.fixture(autouse=True)
def as_many_threads_afterwards() -> Iterator[None]:
    """Take back the number of threads, which scripts set: it moves the last bits of everything that comes after."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Use one thread: tiny matrices gain nothing from more, and float sums stay in one order."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a random Llama (D = 32, 2 layers) and its tokenizer, as `base_model` takes it."""
    folder = tmp_path_factory.mktemp("base") / BASE_NAME
    _random_llama().save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_base(tiny_base_folder: Path) -> Callable[[], BaseModel]:
    """Return a factory of base models, each around its own copy of the same weights.

    Its `is_local` is set as for one loaded from `tiny_base_folder`.
    """

    def make() -> BaseModel:
        model = LlamaForCausalLM.from_pretrained(tiny_base_folder)
        model.name_or_path = model.config._name_or_path = BASE_NAME
        tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_base_folder)
        return BaseModel(model.eval().requires_grad_(False), tokenizer, BASE_NAME, is_local=True)

    return make


@pytest.fixture(scope="session")
def tiny_data() -> Interactions:
    """Return 30 users who walk around a ring of 12 items: the next item follows from the last."""
    catalog = ItemCatalog.from_records(
        {"item_id": item_id, "title": title, "brand": brand, "category": category}
        for item_id, title, brand, category in _ITEMS
    )
    histories = tuple(tuple((user * 5 + step) % len(_ITEMS) for step in range(4 + user % 4)) for user in range(30))
    return Interactions(catalog, tuple(f"user {user}" for user in range(30)), histories, source="a ring")


@pytest.fixture(scope="session")
def few() -> Interactions:
    """Return 13 users of five events over ten items."""
    catalog = ItemCatalog.from_records({"item_id": f"i{n}", "title": f"thing {n} of {n * n}"} for n in range(10))
    histories = tuple(tuple((user * 3 + step) % 10 for step in range(5)) for user in range(13))
    return Interactions(catalog, tuple(f"u{user}" for user in range(13)), histories)


@pytest.fixture(scope="session")
def tiny_config() -> BiTuningConfig:
    """Return the settings of a small M-Former adapter; copy it (`dataclasses.replace`) before changing anything."""
    return BiTuningConfig(
        num_virtual_tokens=2,
        num_experts=2,
        encoder_hidden_size=16,
        encoder_num_layers=2,
        encoder_num_attention_heads=2,
    )


@pytest.fixture(scope="session")
def tiny_arguments() -> Callable[..., LaserArguments]:
    """Return a factory of short training runs, `tiny_arguments(output_dir, **changes)`."""

    def make(output_dir: Path, **changes: object) -> LaserArguments:
        settings: dict[str, object] = {
            "stage1_epochs": 1,
            "stage2_epochs": 1,
            "cuts": "last_cut",
            "per_device_train_batch_size": 8,
            "learning_rate": 5e-3,
            "stage2_learning_rate": None,
            "id_recommender": "sasrec",
            "id_recommender_epochs": 2,
            "logging_steps": 1,
            "disable_tqdm": True,
        }
        return LaserArguments.paper(str(output_dir), **{**settings, **changes})  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def trained(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_base_folder: Path,
    tiny_data: Interactions,
    tiny_config: BiTuningConfig,
    tiny_arguments: Callable[..., LaserArguments],
) -> Trained:
    """Return what one epoch of each stage leaves; read it, do not change it."""
    folder = tmp_path_factory.mktemp("trained") / "output"
    recommender = fit(tiny_data, base_model=tiny_base_folder, config=tiny_config, arguments=tiny_arguments(folder))
    return Trained(recommender, folder, tiny_base_folder, tiny_data)


def _random_llama() -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=320,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=2,
                max_position_embeddings=512,
                initializer_range=0.3,  # so that a random model tells texts apart
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            )
        )


def _tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    texts = [PRESETS["paper"].instruction, *(" ".join(item[1:]) for item in _ITEMS)]
    core.train_from_iterator(
        texts * 2,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<pad>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
