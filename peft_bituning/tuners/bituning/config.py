"""The settings of a Bi-Tuning adapter."""

from dataclasses import dataclass, field

from peft import PeftConfig, PeftType, TaskType

from ...errors import ConfigurationError

POOLINGS = ("suffix", "eos", "mean", "last")
ROUTER_GRADIENTS = ("straight_through", "switch", "none")
TASK_TYPES = (TaskType.FEATURE_EXTRACTION, TaskType.CAUSAL_LM)


@dataclass
class BiTuningConfig(PeftConfig):
    """Settings of a Bi-Tuning adapter; the defaults are the paper's (Appendix B).

    Args:
        num_virtual_tokens: P, the number of prefix tokens (paper: L).
        prefix_encoder: what makes the prefix: `mformer`, `linear`, `static`, `none`, or a registered name.
        collaborative_dim: C, the width of the collaborative embeddings; needed by `mformer` and `linear`.
        num_experts: K, the number of query experts.
        encoder_hidden_size: H, the width of the M-Former.
        encoder_num_layers: blocks of the M-Former (paper: Z).
        encoder_num_attention_heads: attention heads of a block.
        encoder_intermediate_size: width of the feed-forward layers; None is 4 H.
        encoder_cross_attention_frequency: every how many blocks attend to the collaborative embeddings.
        encoder_dropout: dropout inside the M-Former.
        router_gradient: how the recommendation loss reaches the router through the top-1 choice.
        router_aux_loss_coef: weight of the load-balancing loss (paper: lambda).
        collaborative_dropout: share of training rows that are treated as having no collaborative information.
        pooling: which state is the embedding: `suffix`, `eos`, `mean` or `last`.
        center_embeddings: take the mean of the items' unit embeddings off every unit embedding; training sets that
            vector.
        prefix_token_ids: vocabulary ids of the text whose embeddings the prefix starts from, repeated or cut to P;
            None draws the prefix at random.
        suffix_token_id: vocabulary id of the token whose embedding the suffix starts from; None draws it at random.
        init_weights: draw virtual tokens at the scale of the model's own token embeddings; False draws them with
            a standard deviation of 0.02 whatever the model.
        modules_to_save: modules of the base model to train and save in full beside the adapter.

    Raises:
        ConfigurationError: a value out of range.
    """

    num_virtual_tokens: int = field(default=32, metadata={"help": "P, the number of prefix tokens."})
    prefix_encoder: str = field(
        default="mformer",
        metadata={"help": "What makes the prefix: mformer, linear, static, none, or a registered name."},
    )
    collaborative_dim: int | None = field(
        default=None, metadata={"help": "C, the width of the collaborative embeddings."}
    )
    num_experts: int = field(default=8, metadata={"help": "K, the number of query experts."})
    encoder_hidden_size: int = field(default=768, metadata={"help": "H, the width of the M-Former."})
    encoder_num_layers: int = field(default=12, metadata={"help": "Blocks of the M-Former."})
    encoder_num_attention_heads: int = field(default=12, metadata={"help": "Attention heads of the M-Former."})
    encoder_intermediate_size: int | None = field(
        default=None, metadata={"help": "Width of the M-Former's feed-forward layers; None is 4 H."}
    )
    encoder_cross_attention_frequency: int = field(
        default=2, metadata={"help": "Every how many blocks attend to the collaborative embeddings."}
    )
    encoder_dropout: float = field(default=0.0, metadata={"help": "Dropout inside the M-Former."})
    router_gradient: str = field(
        default="straight_through",
        metadata={"help": "How the router learns from the recommendation loss: straight_through, switch or none."},
    )
    router_aux_loss_coef: float = field(default=0.01, metadata={"help": "Weight of the load-balancing loss."})
    collaborative_dropout: float = field(
        default=0.0, metadata={"help": "Share of training rows treated as without collaborative information."}
    )
    pooling: str = field(
        default="suffix", metadata={"help": "Which state is the embedding: suffix, eos, mean or last."}
    )
    center_embeddings: bool = field(
        default=False,
        metadata={"help": "Take the mean of the items' unit embeddings off every unit embedding."},
    )
    prefix_token_ids: list[int] | None = field(
        default=None, metadata={"help": "Vocabulary ids the prefix starts from; None draws it at random."}
    )
    suffix_token_id: int | None = field(
        default=None, metadata={"help": "Vocabulary id the suffix starts from; None draws it at random."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "Draw virtual tokens at the scale of the model's own token embeddings."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules of the base model to train and save in full beside the adapter."}
    )

    def __post_init__(self) -> None:
        """Set PEFT's own fields and check every range."""
        super().__post_init__()
        self.peft_type = PeftType.BITUNING  # type: ignore[attr-defined]
        if self.task_type is None:
            # PeftModel.forward of no task silently returns the base model's output.
            self.task_type = TaskType.FEATURE_EXTRACTION
        self._check_one_of("task_type", self.task_type, tuple(task.value for task in TASK_TYPES))
        self._check_one_of("pooling", self.pooling, POOLINGS)
        self._check_one_of("router_gradient", self.router_gradient, ROUTER_GRADIENTS)
        for name in (
            "num_virtual_tokens",
            "num_experts",
            "encoder_hidden_size",
            "encoder_num_layers",
            "encoder_num_attention_heads",
            "encoder_cross_attention_frequency",
        ):
            self._check_positive_integer(name)
        for name in ("collaborative_dim", "encoder_intermediate_size"):
            if getattr(self, name) is not None:
                self._check_positive_integer(name)
        if self.encoder_hidden_size % self.encoder_num_attention_heads:
            raise ConfigurationError(
                f"encoder_hidden_size must be a multiple of encoder_num_attention_heads "
                f"({self.encoder_num_attention_heads}), got {self.encoder_hidden_size!r}"
            )
        for name in ("encoder_dropout", "collaborative_dropout"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and 0 <= value < 1):
                raise ConfigurationError(f"{name} must be in [0, 1), got {value!r}")
        if not (isinstance(self.router_aux_loss_coef, int | float) and self.router_aux_loss_coef >= 0):
            raise ConfigurationError(f"router_aux_loss_coef must be >= 0, got {self.router_aux_loss_coef!r}")
        self._check_token_ids()
        for name in ("init_weights", "center_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigurationError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if not (isinstance(self.prefix_encoder, str) and self.prefix_encoder):
            raise ConfigurationError(
                f"prefix_encoder must be the name of a registered encoder, got {self.prefix_encoder!r}"
            )

    def _check_token_ids(self) -> None:
        ids = self.prefix_token_ids
        if ids is not None and not (isinstance(ids, list) and ids and all(map(_is_token_id, ids))):
            raise ConfigurationError(f"prefix_token_ids must be vocabulary ids, at least one, or None, got {ids!r}")
        if ids is not None and self.prefix_encoder == "none":
            raise ConfigurationError(f"prefix_token_ids must be None for prefix_encoder='none', got {ids!r}")
        if self.suffix_token_id is not None and not _is_token_id(self.suffix_token_id):
            raise ConfigurationError(f"suffix_token_id must be a vocabulary id or None, got {self.suffix_token_id!r}")
        if self.suffix_token_id is not None and self.pooling != "suffix":
            raise ConfigurationError(
                f"suffix_token_id must be None for pooling={self.pooling!r}, got {self.suffix_token_id!r}"
            )

    def _check_one_of(self, name: str, value: object, known: tuple[str, ...]) -> None:
        if value not in known:
            raise ConfigurationError(f"{name} must be one of {', '.join(known)}, got {value!r}")

    def _check_positive_integer(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigurationError(f"{name} must be an integer >= 1, got {value!r}")


def _is_token_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
