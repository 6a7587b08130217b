"""The settings of an iLoRA adapter."""

from dataclasses import dataclass, field, fields

from peft import LoraConfig, PeftType, TaskType

from ...errors import ConfigurationError

POOLINGS = ("last", "mean", "suffix")
GATE_POOLINGS = ("last", "mean")
TASK_TYPES = (TaskType.FEATURE_EXTRACTION, TaskType.CAUSAL_LM)
INITIALISATIONS = (True, False, "gaussian")
# Kinds of LoRA whose product `B A` is not the plain one that gates scale, or that has no layer of its own.
OTHER_KINDS = (
    "use_dora",
    "use_bdlora",
    "use_qalora",
    "arrow_config",
    "alora_invocation_tokens",
    "velora_config",
    "monteclora_config",
    "kasa_config",
    "lora_bias",
    "target_parameters",
    "layer_replication",
)


@dataclass
class ILoRAConfig(LoraConfig):
    """Settings of an iLoRA adapter: those of PEFT's `LoraConfig`, with the paper's defaults, and the gate's.

    Args:
        r: rank of all experts together, a multiple of `num_experts`.
        lora_alpha: alpha; an expert's scale is `alpha / (r / K)`.
        lora_dropout: dropout on the input of `lora_A`.
        target_modules: the linear layers to adapt; `all-linear` is all of them but the language-model head.
        num_experts: K, the number of experts.
        collaborative_dim: C, the width of the collaborative embeddings.
        gate_pooling: which state of a frozen recommender the gate reads: the `last` real one, or their `mean`.
        collaborative_dropout: share of training rows that are treated as having no collaborative information.
        pooling: which state is the embedding: `last` text token, `mean` of the text, or a trainable `suffix`.

    Raises:
        ConfigurationError: a value out of range, or a kind of LoRA that cannot be gated.
    """

    r: int = field(default=8, metadata={"help": "Rank of all experts together."})
    lora_alpha: int = field(default=32, metadata={"help": "Alpha; an expert's scale is alpha / (r / num_experts)."})
    lora_dropout: float = field(default=0.1, metadata={"help": "Dropout on the input of lora_A."})
    target_modules: list[str] | str | None = field(
        default="all-linear",
        metadata={"help": "Names, or a regular expression, of the linear layers to adapt; all-linear is every one."},
    )
    num_experts: int = field(default=4, metadata={"help": "K, the number of experts."})
    collaborative_dim: int | None = field(
        default=None, metadata={"help": "C, the width of the collaborative embeddings."}
    )
    gate_pooling: str = field(
        default="last", metadata={"help": "Which state of the recommender the gate reads: last or mean."}
    )
    collaborative_dropout: float = field(
        default=0.0, metadata={"help": "Share of training rows treated as without collaborative information."}
    )
    pooling: str = field(default="last", metadata={"help": "Which state is the embedding: last, mean or suffix."})

    def __post_init__(self) -> None:
        """Set PEFT's own fields and check every range."""
        self._check_kind()
        super().__post_init__()
        self.peft_type = PeftType.ILORA  # type: ignore[attr-defined]
        if self.task_type is None:
            # PeftModel.forward of no task silently returns the base model's output.
            self.task_type = TaskType.FEATURE_EXTRACTION
        self._check_one_of("task_type", self.task_type, tuple(task.value for task in TASK_TYPES))
        self._check_one_of("pooling", self.pooling, POOLINGS)
        self._check_one_of("gate_pooling", self.gate_pooling, GATE_POOLINGS)
        self._check_positive_integer("num_experts", self.num_experts)
        if self.collaborative_dim is not None:
            self._check_positive_integer("collaborative_dim", self.collaborative_dim)
        ranks = {"r": self.r, **{f"rank_pattern[{key!r}]": rank for key, rank in (self.rank_pattern or {}).items()}}
        for name, rank in ranks.items():
            self._check_positive_integer(name, rank)
            if rank % self.num_experts:
                raise ConfigurationError(
                    f"{name} must be a multiple of num_experts ({self.num_experts}), got {rank!r}; every expert has "
                    "the same share of the rank"
                )
        for name in ("lora_dropout", "collaborative_dropout"):
            value = getattr(self, name)
            if isinstance(value, bool) or not (isinstance(value, int | float) and 0 <= value < 1):
                raise ConfigurationError(f"{name} must be in [0, 1), got {value!r}")
        if isinstance(self.lora_alpha, bool) or not (isinstance(self.lora_alpha, int | float) and self.lora_alpha > 0):
            raise ConfigurationError(f"lora_alpha must be > 0, got {self.lora_alpha!r}")

    def _check_kind(self) -> None:
        """Refuse what LoRA offers and gates do not fit."""
        for name in OTHER_KINDS:
            value = getattr(self, name)
            if value:
                default = next(each.default for each in fields(self) if each.name == name)
                raise ConfigurationError(
                    f"{name} must be {default} in ILoRAConfig, got {value!r}; leave it out: gates weigh the experts of "
                    "plain LoRA on linear layers"
                )
        if self.init_lora_weights not in INITIALISATIONS:
            raise ConfigurationError(
                f"init_lora_weights must be True, False or 'gaussian', got {self.init_lora_weights!r}; the others "
                "count on `B A` as a whole, which unequal gates change"
            )
        if self.bias != "none":
            raise ConfigurationError(
                f"bias must be 'none', got {self.bias!r}; iLoRA trains its experts and its gate alone"
            )

    def _check_one_of(self, name: str, value: object, known: tuple[str, ...]) -> None:
        if value not in known:
            raise ConfigurationError(f"{name} must be one of {', '.join(known)}, got {value!r}")

    def _check_positive_integer(self, name: str, value: object) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigurationError(f"{name} must be an integer >= 1, got {value!r}")
