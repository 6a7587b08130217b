"""The settings of a Bi-Tuning adapter."""

from dataclasses import dataclass
from typing import Any

from peft import PeftConfig, PeftType

from ...errors import ConfigurationError
from ..settings import check_one_of, check_positive_integer, check_share, setting, settle_task

POOLINGS = ("suffix", "eos", "mean", "last")
ROUTER_GRADIENTS = ("straight_through", "switch", "none")
PAPER_WIDTH = 4096  # D of the paper's language model
PAPER_SIZES = {
    "num_virtual_tokens": 32,
    "num_experts": 8,
    "encoder_hidden_size": 768,
    "encoder_num_layers": 12,
    "encoder_num_attention_heads": 12,
}


def sizes_for(width: int) -> dict[str, int]:
    """Return the sizes of prefix and M-Former for a language model of width D: the paper's, in proportion to D.

    With s = min(1, D / 4096): H = 768 s in steps of 64, at least 128; 12 s blocks in steps of 2, at least 2; a head per
    64 of H, at least 4; K = 8 s in steps of 2, at least 4; P = 32 s in steps of 4, at least 8. At D = 576 these are the
    sizes that were measured, at D = 4096 the paper's.

    Args:
        width: D.

    Returns:
        The five sizes by the names of `BiTuningConfig`.
    """
    scale = min(1.0, width / PAPER_WIDTH)
    hidden = max(128, 64 * round(12 * scale))
    return {
        "num_virtual_tokens": max(8, 4 * round(8 * scale)),
        "num_experts": max(4, 2 * round(4 * scale)),
        "encoder_hidden_size": hidden,
        "encoder_num_layers": max(2, 2 * round(6 * scale)),
        "encoder_num_attention_heads": max(4, hidden // 64),
    }


@dataclass
class BiTuningConfig(PeftConfig):
    """Settings of a Bi-Tuning adapter; sizes that are None follow from the language model's width, see `sizes_for`.

    `BiTuningConfig.paper()` has the paper's (Appendix B).

    Args:
        num_virtual_tokens: P, the number of prefix tokens (paper: L).
        prefix_encoder: what makes the prefix: `mformer`, `linear`, `static`, `none`, or a registered name.
        collaborative_dim: C, the width of the collaborative embeddings; needed by `mformer` and `linear`.
        num_experts: K, the number of query experts.
        encoder_hidden_size: H, the width of the M-Former; the class beneath calls C so, as P-tuning's spelling is kept.
        encoder_num_layers: blocks of the M-Former (paper: Z).
        encoder_num_attention_heads: attention heads per block.
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

    # None until the language model's width is known, as PEFT's own settings of virtual tokens are typed
    num_virtual_tokens: int = setting(None, "P, the number of prefix tokens.")
    prefix_encoder: str = setting("mformer", "What makes the prefix: mformer, linear, static, none, or your own.")
    collaborative_dim: int | None = setting(None, "C, the width of the collaborative embeddings.")
    num_experts: int = setting(None, "K, the number of query experts.")
    encoder_hidden_size: int = setting(None, "H, the width of the M-Former.")
    encoder_num_layers: int = setting(None, "Blocks of the M-Former.")
    encoder_num_attention_heads: int = setting(None, "Attention heads of the M-Former.")
    encoder_intermediate_size: int | None = setting(None, "Width of the M-Former's feed-forward layers; None is 4 H.")
    encoder_cross_attention_frequency: int = setting(2, "Every how many blocks attend to the collaborative embeddings.")
    encoder_dropout: float = setting(0.0, "Dropout inside the M-Former.")
    router_gradient: str = setting(
        "straight_through", "How the router learns from the recommendation loss: straight_through, switch or none."
    )
    router_aux_loss_coef: float = setting(0.01, "Weight of the load-balancing loss.")
    collaborative_dropout: float = setting(0.0, "Share of training rows treated as without collaborative information.")
    pooling: str = setting("suffix", "Which state is the embedding: suffix, eos, mean or last.")
    center_embeddings: bool = setting(False, "Take the mean of the items' unit embeddings off every unit embedding.")
    prefix_token_ids: list[int] | None = setting(
        None, "Vocabulary ids the prefix starts from; None draws it at random."
    )
    suffix_token_id: int | None = setting(None, "Vocabulary id the suffix starts from; None draws it at random.")
    init_weights: bool = setting(True, "Draw virtual tokens at the scale of the model's own token embeddings.")
    modules_to_save: list[str] | None = setting(
        None, "Modules of the base model to train and save in full beside the adapter."
    )

    def __post_init__(self) -> None:
        """Set PEFT's own fields and check every range."""
        super().__post_init__()
        self.peft_type = PeftType.BITUNING  # type: ignore[attr-defined]
        settle_task(self)
        check_one_of("pooling", self.pooling, POOLINGS)
        check_one_of("router_gradient", self.router_gradient, ROUTER_GRADIENTS)
        for name in (*PAPER_SIZES, "collaborative_dim", "encoder_intermediate_size"):
            if getattr(self, name) is not None:
                check_positive_integer(name, getattr(self, name))
        check_positive_integer("encoder_cross_attention_frequency", self.encoder_cross_attention_frequency)
        self._check_heads()
        check_share("encoder_dropout", self.encoder_dropout)
        check_share("collaborative_dropout", self.collaborative_dropout)
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

    @classmethod
    def paper(cls, **changes: Any) -> "BiTuningConfig":
        """Return the paper's sizes (Appendix B): P = 32, K = 8, H = 768, 12 blocks, 12 heads.

        Args:
            changes: fields to set otherwise.
        """
        return cls(**{**PAPER_SIZES, **changes})

    def fill_sizes(self, width: int) -> None:
        """Give sizes that are None their values for a language model of width D, see `sizes_for`.

        Args:
            width: D.

        Raises:
            ConfigurationError: sizes that were given do not fit those that follow.
        """
        for name, value in sizes_for(width).items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        self._check_heads()

    def _check_heads(self) -> None:
        hidden, heads = self.encoder_hidden_size, self.encoder_num_attention_heads
        if hidden is not None and heads is not None and hidden % heads:
            raise ConfigurationError(
                f"encoder_hidden_size must be a multiple of encoder_num_attention_heads ({heads}), got {hidden!r}"
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


def _is_token_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
