"""The settings of an iLoRA adapter."""

from dataclasses import dataclass

from peft import LoraConfig, PeftType

from ...errors import ConfigurationError
from ..settings import check_one_of, check_positive_integer, check_share, setting, settle_task

POOLINGS = ("last", "mean", "suffix")
GATE_POOLINGS = ("last", "mean")
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

    r: int = setting(8, "Rank of all experts together.")
    lora_alpha: int = setting(32, "Alpha; an expert's scale is alpha / (r / num_experts).")
    lora_dropout: float = setting(0.1, "Dropout on the input of lora_A.")
    target_modules: list[str] | str | None = setting(
        "all-linear", "Names, or a regular expression, of the linear layers to adapt; all-linear is every one."
    )
    num_experts: int = setting(4, "K, the number of experts.")
    collaborative_dim: int | None = setting(None, "C, the width of the collaborative embeddings.")
    gate_pooling: str = setting("last", "Which state of the recommender the gate reads: last or mean.")
    collaborative_dropout: float = setting(0.0, "Share of training rows treated as without collaborative information.")
    pooling: str = setting("last", "Which state is the embedding: last, mean or suffix.")

    def __post_init__(self) -> None:
        """Set PEFT's own fields and check every range."""
        self._check_kind()
        super().__post_init__()
        self.peft_type = PeftType.ILORA  # type: ignore[attr-defined]
        settle_task(self)
        check_one_of("pooling", self.pooling, POOLINGS)
        check_one_of("gate_pooling", self.gate_pooling, GATE_POOLINGS)
        check_positive_integer("num_experts", self.num_experts)
        if self.collaborative_dim is not None:
            check_positive_integer("collaborative_dim", self.collaborative_dim)
        ranks = {"r": self.r, **{f"rank_pattern[{key!r}]": rank for key, rank in (self.rank_pattern or {}).items()}}
        for name, rank in ranks.items():
            check_positive_integer(name, rank)
            if rank % self.num_experts:
                raise ConfigurationError(
                    f"{name} must be a multiple of num_experts ({self.num_experts}), got {rank!r}; every expert has "
                    "the same share of the rank"
                )
        check_share("lora_dropout", self.lora_dropout)
        check_share("collaborative_dropout", self.collaborative_dropout)
        if isinstance(self.lora_alpha, bool) or not (isinstance(self.lora_alpha, int | float) and self.lora_alpha > 0):
            raise ConfigurationError(f"lora_alpha must be > 0, got {self.lora_alpha!r}")

    def _check_kind(self) -> None:
        """Refuse what LoRA offers and gates do not fit."""
        for name in OTHER_KINDS:
            if value := getattr(self, name):
                raise ConfigurationError(
                    f"{name} must be {getattr(LoraConfig, name)} in ILoRAConfig, got {value!r}; leave it out: gates "
                    "weigh the experts of plain LoRA on linear layers"
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
