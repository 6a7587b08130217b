"""The settings of a training run."""

from dataclasses import dataclass, field, fields
from typing import Any

import torch

from ..catalog.encoder import ITEM_COLLABORATIVE, HistorySettings
from ..data.samples import LeaveOneOut, Sample
from ..errors import ConfigurationError

CUTS = ("every_cut", "random_cut", "last_cut")
ID_RECOMMENDERS = ("bert4rec", "sasrec")
PRECISIONS = (None, "no", "bf16", "fp16")
#: settings of before, by their present names
RENAMED = {"recommender": "id_recommender", "recommender_epochs": "id_recommender_epochs"}
#: settings that are gone, with the reason
RETIRED = {
    "prefix_lr_ratio": "measured as useless",
    "suffix_lr_ratio": "measured as useless",
    "group_cuts": "it follows from the prefix",
}
#: what `LaserArguments.paper` sets
PAPER: dict[str, Any] = {
    "stage1_epochs": 15,
    "stage2_epochs": 5,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-4,
    "stage2_learning_rate": 1e-4,
    "temperature": 0.05,
    "max_history": None,
    "max_item_tokens": None,
    "template": "paper",
    "attributes": None,
    "prefix_text": None,
    "suffix_text": None,
    "id_recommender": "bert4rec",
    "max_collaborative_states": None,
    "item_collaborative": "history",
}
_FREE = {"output_dir", "resume", "overwrite_output_dir", "log_with", "disable_tqdm", "save_steps", "save_total_limit"}


def _setting(default: Any, text: str) -> Any:
    """Make a field with the help that the command line shows."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class LaserArguments:
    """Settings of the two-stage training; names follow `transformers.TrainingArguments` where it has them.

    The defaults are what did best at an equal budget (docs/results.md); `LaserArguments.paper(output_dir)` gives the
    paper's (Appendix B).

    Raises:
        ConfigurationError: a value out of range.
    """

    output_dir: str = _setting("output", "Folder for the adapter, results and checkpoints.")
    seed: int = _setting(0, "Seed of every random draw.")
    stage1_epochs: int = _setting(5, "Epochs of stage 1, each with a fresh item table; 0 leaves the untrained one.")
    stage2_epochs: int = _setting(3, "Epochs of stage 2, on the best item table.")
    early_stopping_patience: int = _setting(3, "Epochs without a better validation NDCG after which a stage ends.")
    per_device_train_batch_size: int = _setting(16, "Training rows per process and step.")
    per_device_eval_batch_size: int = _setting(32, "Rows per process and encoding step.")
    max_tokens_per_pass: int | None = _setting(
        None,
        "Token slots of a training pass at most, virtual tokens and padding among them: a step's rows take as many "
        "passes as that needs; None is one.",
    )
    gradient_accumulation_steps: int = _setting(1, "Steps per optimizer update.")
    learning_rate: float = _setting(3e-4, "Peak learning rate of stage 1.")
    stage2_learning_rate: float | None = _setting(3e-4, "Peak learning rate of stage 2; None is a third of stage 1's.")
    weight_decay: float = _setting(0.0, "AdamW's weight decay.")
    max_grad_norm: float = _setting(1.0, "Gradient norm above which it is scaled down.")
    warmup_ratio: float = _setting(0.05, "Share of a stage's updates that warm up.")
    temperature: float = _setting(0.03, "Temperature of the contrastive loss (Eq. 8).")
    loss_chunk_size: int | None = _setting(
        None, "Items per chunk of the contrastive loss; None: at once up to 1e8 similarities."
    )
    cuts: str = _setting("every_cut", "Training rows per user: every_cut, random_cut or last_cut.")
    max_samples_per_epoch: int | None = _setting(
        None, "Training rows per epoch at most, drawn anew each epoch; None is all."
    )
    max_validation_users: int | None = _setting(
        None, "Validation users at most, a seeded draw; None is all. Test uses all."
    )
    max_history: int | None = _setting(2, "Items in a prompt at most; None is no limit.")
    max_item_tokens: int | None = _setting(48, "Tokens per item at most; None is no limit.")
    max_length: int = _setting(1024, "Tokens per prompt at most (T).")
    template: str = _setting("no_instruction", "Prompt template: a preset, or a JSON file.")
    attributes: list[str] | None = _setting(
        ["none"],
        "Item attributes to print beside the title; `none` for none, `template` for the template's own choice.",
    )
    prefix_text: str | None = _setting(
        "You are an intelligent recommendation assistant.",
        "Text whose embeddings the prefix, if there is one, starts from; None draws it at random.",
    )
    suffix_text: str | None = _setting(
        "\n", "Text whose last token the suffix, if there is one, starts from; None draws it at random."
    )
    id_recommender: str = _setting("sasrec", "Frozen ID recommender: sasrec, bert4rec, none, or a saved folder.")
    id_recommender_epochs: int | None = _setting(None, "Its epochs at most; None is its own.")
    text_model: str | None = _setting(
        "tf-idf",
        "What the hybrid reads of the items' texts: tf-idf, minilm, language-model[:LAYER], a sentence-transformers "
        "model, or none.",
    )
    hold_out_items: float = _setting(
        0.0, "Share of items taken out of all training and validation events, to be reported apart as new ones."
    )
    max_collaborative_states: int | None = _setting(
        1, "Newest items of a history whose collaborative embeddings the prefix reads; None is all."
    )
    item_collaborative: str = _setting(
        "embedding",
        "What the prefix reads of an item: embedding, the vector that the recommender scores it by; or history, the "
        "recommender's state after that item alone, as in the paper.",
    )
    mixed_precision: str | None = _setting(None, "no, bf16 or fp16; None leaves it to accelerate's configuration.")
    fast_cpu_matmul: bool = _setting(False, "Probe for a faster float32 matrix product on CPUs and use it.")
    logging_steps: int = _setting(10, "Updates per logged loss.")
    save_steps: int = _setting(200, "Updates per checkpoint; epochs end with one too.")
    save_total_limit: int = _setting(2, "Checkpoints to keep.")
    resume: bool = _setting(False, "Go on from the last complete checkpoint; a finished run is loaded.")
    overwrite_output_dir: bool = _setting(False, "Drop the run, finished or not, in output_dir.")
    log_with: str | None = _setting(None, "Tracker of accelerate: tensorboard, wandb, ...")
    disable_tqdm: bool = _setting(False, "No progress bars.")

    def __post_init__(self) -> None:
        """Check every range."""
        lowest = {"stage1_epochs": 0, "stage2_epochs": 0, "seed": 0}
        for name, kind in self.__annotations__.items():  # `HfArgumentParser` changes the types of fields
            if kind in (int, int | None):
                self._check_integer(name, lowest.get(name, 1), kind is not int)
        if self.stage1_epochs + self.stage2_epochs == 0:
            raise ConfigurationError("stage1_epochs + stage2_epochs must be >= 1, got 0 and 0")
        for name in ("learning_rate", "stage2_learning_rate", "temperature", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigurationError(f"{name} must be > 0, got {value!r}")
        if not 0 <= self.warmup_ratio < 1:
            raise ConfigurationError(f"warmup_ratio must be in [0, 1), got {self.warmup_ratio!r}")
        if not 0 <= self.hold_out_items < 1:
            raise ConfigurationError(f"hold_out_items must be in [0, 1), got {self.hold_out_items!r}")
        if self.weight_decay < 0:
            raise ConfigurationError(f"weight_decay must be >= 0, got {self.weight_decay!r}")
        for name, known in (
            ("cuts", CUTS),
            ("item_collaborative", ITEM_COLLABORATIVE),
            ("mixed_precision", PRECISIONS),
        ):
            if getattr(self, name) not in known:
                raise ConfigurationError(
                    f"{name} must be one of {', '.join(map(str, known))}, got {getattr(self, name)!r}"
                )
        if self.resume and self.overwrite_output_dir:
            raise ConfigurationError("resume and overwrite_output_dir must not both be set, got True and True")

    @classmethod
    def paper(cls, output_dir: str, **changes: Any) -> "LaserArguments":
        """Return the paper's settings (Sections 3.1.1 and 4.1.2, Appendix B).

        Args:
            output_dir: folder for the adapter, results and checkpoints.
            changes: fields to set otherwise.

        Returns:
            15 and 5 epochs, batch 4, learning rate 1e-4, temperature 0.05, the paper's template with whole histories,
            and all states of a BERT4Rec, an item's being that of a history of it alone.
        """
        return cls(output_dir=output_dir, **{**PAPER, **changes})

    @property
    def history(self) -> HistorySettings:
        """How much of a history is read."""
        return HistorySettings(
            self.max_length,
            self.max_history,
            self.max_item_tokens,
            max_collaborative_states=self.max_collaborative_states,
            item_collaborative=self.item_collaborative,
        )

    def validation_samples(self, split: LeaveOneOut) -> list[Sample]:
        """Return the users to validate on, all of them or a seeded draw of `max_validation_users`."""
        samples, limit = split.samples("valid"), self.max_validation_users
        if limit is None or limit >= len(samples):
            return samples
        generator = torch.Generator().manual_seed(self.seed)
        chosen = torch.randperm(len(samples), generator=generator)[:limit].sort().values
        return [samples[index] for index in chosen.tolist()]

    def trajectory(self) -> dict[str, Any]:
        """Return the settings that decide the course of training: those a resumed run must share."""
        free = _FREE | {"per_device_eval_batch_size"}
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name not in free}

    def _check_integer(self, name: str, lowest: int, optional: bool) -> None:
        value = getattr(self, name)
        if optional and value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
            raise ConfigurationError(f"{name} must be an integer >= {lowest}, got {value!r}")
