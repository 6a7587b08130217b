"""The settings of a training run."""

from dataclasses import dataclass, field, fields
from typing import Any

from ..catalog.encoder import ITEM_COLLABORATIVE
from ..errors import ConfigurationError

CUTS = ("every_cut", "random_cut", "last_cut")
RECOMMENDERS = ("bert4rec", "sasrec")


@dataclass
class LaserArguments:
    """Settings of the two-stage training; names follow `transformers.TrainingArguments` where it has them.

    The defaults are ours; `LaserArguments.paper(output_dir)` gives the paper's (Appendix B).

    Raises:
        ConfigurationError: a value out of range.
    """

    output_dir: str = field(default="output", metadata={"help": "Folder for the adapter, results and checkpoints."})
    seed: int = field(default=0, metadata={"help": "Seed of every random draw."})
    stage1_epochs: int = field(
        default=15, metadata={"help": "Epochs of stage 1, each with a fresh item table; 0 leaves the untrained one."}
    )
    stage2_epochs: int = field(default=5, metadata={"help": "Epochs of stage 2, on the best item table."})
    early_stopping_patience: int = field(
        default=3, metadata={"help": "Epochs without a better validation NDCG after which a stage ends."}
    )
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Training rows a process and step."})
    per_device_eval_batch_size: int = field(default=32, metadata={"help": "Rows a process and encoding step."})
    max_tokens_per_pass: int | None = field(
        default=None,
        metadata={
            "help": "Token slots of a training pass at most, virtual tokens and padding among them: a step's rows take "
            "as many passes as that needs; None is one."
        },
    )
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Steps an optimizer update."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of stage 1."})
    stage2_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of stage 2; None is a third of stage 1's."}
    )
    prefix_lr_ratio: float = field(
        default=1.0,
        metadata={"help": "Learning rate of the prefix tokens, the M-Former's queries among them, over learning_rate."},
    )
    suffix_lr_ratio: float = field(
        default=1.0, metadata={"help": "Learning rate of the suffix token over learning_rate."}
    )
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW's weight decay."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradient norm above which it is scaled down."})
    warmup_ratio: float = field(default=0.05, metadata={"help": "Share of a stage's updates that warm up."})
    temperature: float = field(default=0.05, metadata={"help": "Temperature of the contrastive loss (Eq. 8)."})
    loss_chunk_size: int | None = field(
        default=None, metadata={"help": "Items a chunk of the contrastive loss; None: at once up to 1e8 similarities."}
    )
    cuts: str = field(
        default="every_cut", metadata={"help": "Training rows a user: every_cut, random_cut or last_cut."}
    )
    group_cuts: bool | None = field(
        default=None,
        metadata={
            "help": "Put a user's training rows into the same updates, so that they run in one pass where the prefix "
            "is the same for all; None: where it is."
        },
    )
    max_samples_per_epoch: int | None = field(
        default=None, metadata={"help": "Training rows an epoch at most, drawn anew each epoch; None is all."}
    )
    max_validation_users: int | None = field(
        default=None, metadata={"help": "Validation users at most, a seeded draw; None is all. Test uses all."}
    )
    max_history: int | None = field(default=None, metadata={"help": "Items in a prompt at most; None is no limit."})
    max_item_tokens: int | None = field(default=None, metadata={"help": "Tokens an item at most; None is no limit."})
    max_length: int = field(default=1024, metadata={"help": "Tokens a prompt at most (T)."})
    template: str = field(default="paper", metadata={"help": "Prompt template: a preset, or a JSON file."})
    attributes: list[str] | None = field(
        default=None,
        metadata={
            "help": "Item attributes to print beside the title, or `none`; not given, the template's own choice."
        },
    )
    prefix_text: str | None = field(
        default=None,
        metadata={"help": "Text whose embeddings the prefix, if there is one, starts from; None draws it at random."},
    )
    suffix_text: str | None = field(
        default=None,
        metadata={"help": "Text whose last token the suffix, if there is one, starts from; None draws it at random."},
    )
    recommender: str = field(
        default="bert4rec", metadata={"help": "Frozen ID recommender: bert4rec, sasrec, none, or a saved folder."}
    )
    max_collaborative_states: int | None = field(
        default=None,
        metadata={"help": "Newest items of a history whose collaborative embeddings the prefix reads; None is all."},
    )
    item_collaborative: str = field(
        default="history",
        metadata={
            "help": "What the prefix reads of an item: history, the recommender's state after that item alone, as in "
            "the paper; or embedding, the vector that the recommender scores it by."
        },
    )
    recommender_epochs: int | None = field(default=None, metadata={"help": "Its epochs at most; None is its own."})
    mixed_precision: str | None = field(
        default=None, metadata={"help": "no, bf16 or fp16; None leaves it to accelerate's configuration."}
    )
    fast_cpu_matmul: bool = field(
        default=False, metadata={"help": "Probe for a faster float32 matrix product on CPUs and use it."}
    )
    logging_steps: int = field(default=10, metadata={"help": "Updates a logged loss."})
    save_steps: int = field(default=200, metadata={"help": "Updates a checkpoint; epochs end with one too."})
    save_total_limit: int = field(default=2, metadata={"help": "Checkpoints to keep."})
    resume: bool = field(
        default=False, metadata={"help": "Go on from the last complete checkpoint; a finished run is loaded."}
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Drop an unfinished run in output_dir."})
    log_with: str | None = field(default=None, metadata={"help": "Tracker of accelerate: tensorboard, wandb, ..."})
    disable_tqdm: bool = field(default=False, metadata={"help": "No progress bars."})

    def __post_init__(self) -> None:
        """Check every range."""
        self._at_least(1, "per_device_train_batch_size", "per_device_eval_batch_size")
        self._at_least(1, "gradient_accumulation_steps", "logging_steps", "save_steps", "save_total_limit")
        self._at_least(1, "early_stopping_patience", "max_length")
        self._at_least(0, "stage1_epochs", "stage2_epochs", "seed")
        if self.stage1_epochs + self.stage2_epochs == 0:
            raise ConfigurationError("stage1_epochs + stage2_epochs must be >= 1, got 0 and 0")
        for name in ("max_samples_per_epoch", "max_validation_users", "max_history", "max_item_tokens"):
            if getattr(self, name) is not None:
                self._at_least(1, name)
        for name in ("loss_chunk_size", "recommender_epochs", "max_collaborative_states", "max_tokens_per_pass"):
            if getattr(self, name) is not None:
                self._at_least(1, name)
        for name in (
            "learning_rate",
            "stage2_learning_rate",
            "prefix_lr_ratio",
            "suffix_lr_ratio",
            "temperature",
            "max_grad_norm",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigurationError(f"{name} must be > 0, got {value!r}")
        if not 0 <= self.warmup_ratio < 1:
            raise ConfigurationError(f"warmup_ratio must be in [0, 1), got {self.warmup_ratio!r}")
        if self.weight_decay < 0:
            raise ConfigurationError(f"weight_decay must be >= 0, got {self.weight_decay!r}")
        if self.cuts not in CUTS:
            raise ConfigurationError(f"cuts must be one of {', '.join(CUTS)}, got {self.cuts!r}")
        if self.item_collaborative not in ITEM_COLLABORATIVE:
            raise ConfigurationError(
                f"item_collaborative must be one of {', '.join(ITEM_COLLABORATIVE)}, got {self.item_collaborative!r}"
            )
        if self.mixed_precision not in (None, "no", "bf16", "fp16"):
            raise ConfigurationError(f"mixed_precision must be no, bf16, fp16 or None, got {self.mixed_precision!r}")
        if self.resume and self.overwrite_output_dir:
            raise ConfigurationError("resume and overwrite_output_dir must not both be set, got True and True")

    @classmethod
    def paper(cls, output_dir: str, **changes: Any) -> "LaserArguments":
        """Return the paper's settings (Section 4.1.2 and Appendix B).

        Args:
            output_dir: folder for the adapter, results and checkpoints.
            changes: fields to set otherwise.

        Returns:
            15 and 5 epochs, batch 4, learning rate 1e-4, temperature 0.05, a BERT4Rec.
        """
        settings: dict[str, Any] = {
            "stage1_epochs": 15,
            "stage2_epochs": 5,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-4,
            "stage2_learning_rate": 1e-4,
            "temperature": 0.05,
            "recommender": "bert4rec",
        }
        return cls(output_dir=output_dir, **{**settings, **changes})

    def trajectory(self) -> dict[str, Any]:
        """Return the settings that decide the course of training: those a resumed run must share."""
        free = {"output_dir", "resume", "overwrite_output_dir", "log_with", "disable_tqdm", "save_steps"}
        free |= {"save_total_limit", "per_device_eval_batch_size"}
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name not in free}

    def _at_least(self, lowest: int, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise ConfigurationError(f"{name} must be an integer >= {lowest}, got {value!r}")
