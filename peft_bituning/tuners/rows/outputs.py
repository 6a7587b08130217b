"""The output of a model that embeds rows."""

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class BiTuningOutput(ModelOutput):
    """The output of `BiTuningModel.forward`.

    Args:
        loss: language-model loss over the text, a scalar; under `CAUSAL_LM` with `labels` only.
        logits: scores over the vocabulary at the text positions [B, T, V]; under `CAUSAL_LM` with `labels` only.
        last_hidden_state: states of the text tokens in the caller's layout [B, T, D], zero at padding.
        pooler_output: the user or item embedding [B, D].
        router_logits: the router's scores `m(u)` (Eq. 5) [B, N, K], zero at padding; None without a router.
        aux_loss: the load-balancing loss (Eq. 9), unweighted, a scalar; None without a router.
        hidden_states: states of every layer over the packed rows `[prefix | text | suffix | padding]`, on demand.
        attentions: attention weights over the packed rows, on demand.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    router_logits: Tensor | None = None
    aux_loss: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
