"""The shared start of a batch, prefix and instruction, run through the language model once."""

import logging
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from .backbone import device_of, find_backbone, takes_argument, token_embeddings
from .common_start import CommonStart, empty_cache
from .forward_pass import reads_token_ids
from .layout import RowLayout
from .nested_rows import Nesting

MIN_SAVED = 64  # tokens; a second pass over the layers costs about as much
WHOLE = "every row computes its own prefix and instruction"
PROBE_TOLERANCE = 1e-4  # or four rounding steps of a half-precision type
PROBE_TEXT, PROBE_START, PROBE_GUEST = 32, 2, 5  # tokens
_probed: WeakKeyDictionary[PreTrainedModel, dict[str, str | None]] = WeakKeyDictionary()


def why_not(model: PreTrainedModel) -> str | None:
    """Say why a model runs whole rows though they start alike; None where their start is run once."""
    name, backbone = type(model).__name__, find_backbone(model)
    if reads_token_ids(model):
        return f"{name} needs token ids beside embeddings"
    if not takes_argument(backbone.forward, "past_key_values"):
        return f"{name} takes no keys and values"
    layers = getattr(empty_cache(model), "layers", [])
    if not layers or any(type(layer) is not DynamicLayer for layer in layers):
        return f"{name} has layers that are not full attention"
    if model.training and getattr(backbone, "gradient_checkpointing", False):
        return "gradient checkpointing keeps no keys and values"
    embeddings = token_embeddings(model)
    if hasattr(embeddings, "unshard") or hasattr(embeddings.weight, "ds_id"):
        return "the weights are sharded, and every process must make as many passes"
    return None


def why_no_slots(model: PreTrainedModel) -> str | None:
    """Say why a model for which `why_not` has no reason cannot run the suffixes of several cuts in one row.

    The first time it is tried on a short text; None where it honours 4-D masks and position ids.
    """
    kernel = str(getattr(model.config, "_attn_implementation", None))
    known = _probed.setdefault(model, {})
    if kernel not in known:
        known[kernel] = _probe_slots(model, kernel)
    return known[kernel]


def _probe_slots(model: PreTrainedModel, kernel: str) -> str | None:
    name, backbone = type(model).__name__, find_backbone(model)
    if kernel not in ("eager", "sdpa"):
        return f"attention by {kernel} takes no 4-D masks"
    if not takes_argument(backbone.forward, "position_ids"):
        return f"{name} takes no position ids"
    embeddings = token_embeddings(model)
    text = [number % embeddings.num_embeddings for number in range(PROBE_TEXT)]
    texts = [text, text[:PROBE_GUEST]]
    mask = torch.tensor([[1] * len(row) + [0] * (PROBE_TEXT - len(row)) for row in texts], device=device_of(embeddings))
    layout = RowLayout.from_mask(mask, 0, True)
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    try:
        with torch.no_grad():
            tokens = embeddings(torch.tensor([text, text], device=mask.device))
            rows, mask = layout.pack(None, tokens, tokens[:1, -1:]), layout.attention_mask
            whole = _run(model, rows, mask, None, 0)
            nested = _run(model, rows, mask, Nesting.of(layout, texts), PROBE_START)
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
        return f"{name} takes no 4-D masks ({type(error).__name__})"
    finally:
        for module, mode in modes:
            module.training = mode
    if whole is None or nested is None:
        return f"{name} keeps no keys and values for some layers"
    gone_wrong = layout.last_states(nested - whole)[1].float().norm() / layout.last_states(whole)[1].float().norm()
    if float(gone_wrong) <= max(PROBE_TOLERANCE, 4 * torch.finfo(rows.dtype).eps):
        return None
    return f"{name} does not honour 4-D masks with position ids (error {float(gone_wrong):.0e})"


def run_shared(
    model: PreTrainedModel, layout: RowLayout, rows: Tensor, mask: Tensor, input_ids: Tensor
) -> Tensor | None:
    """Run packed rows with what they share once: their common start, and the texts that are the start of others.

    Causal attention makes the states of a token the same whatever follows, so nothing changes but float rounding;
    gradients flow through the keys and values.

    Args:
        model: the language model.
        layout: of a batch whose prefix is the same in every row.
        rows: packed rows [B, W, D].
        mask: which of their tokens are real [B, W].
        input_ids: the text [B, T] in the caller's layout.

    Returns:
        The last hidden states [B, W, D]; None where rows have to be run whole: fewer than 64 tokens would be saved,
        it cannot be done (`why_not`), or torch.compile traces the single pass.
    """
    count, width = mask.shape
    if torch.compiler.is_compiling() or (count - 1) * width < MIN_SAVED:
        return None
    if (reason := why_not(model)) is not None:
        return _tell(f"{WHOLE}: {reason}")
    ids = layout.pack_text(input_ids, fill=-1)
    nesting = _nest(model, layout, ids, width)
    same = (ids == ids[:1]).all(0) & (ids[0] >= 0)  # [T]
    shared = min(layout.num_prefix + int(same.long().cumprod(0).sum()), width - 1)
    hosts = count if nesting is None else nesting.num_hosts
    if (hosts - 1) * shared < MIN_SAVED:
        shared = 0
    if nesting is None and not shared:
        return None
    states = _run(model, rows, mask, nesting, shared)
    if states is None:
        _tell(f"{WHOLE}: {type(model).__name__} keeps no keys and values for some layers")
    return states


def _run(model: PreTrainedModel, rows: Tensor, mask: Tensor, nesting: Nesting | None, shared: int) -> Tensor | None:
    """Run the first `shared` columns once, the rest of every host; None where the model keeps no keys and values."""
    backbone, hosts = find_backbone(model), len(rows) if nesting is None else nesting.num_hosts
    settings: dict[str, Any] = {"use_cache": False, "return_dict": True}
    states: list[Tensor] = []
    if shared:
        start = CommonStart.of(model, rows[:1, :shared], hosts)
        if start is None:
            return None
        shared = start.rows.shape[1]
        settings = {"use_cache": True, "return_dict": True, "past_key_values": start.cache(model, hosts)}
        states.append(start.states.expand(hosts, -1, -1))
    inputs = {"inputs_embeds": rows[:, shared:], "attention_mask": mask}
    if nesting is not None:
        inputs = {"attention_mask": mask[nesting.hosts], **nesting.inputs(rows, shared)}
    states.append(backbone(**inputs, **settings).last_hidden_state)
    together = torch.cat(states, dim=1)
    return together if nesting is None else nesting.spread(together)


def _nest(model: PreTrainedModel, layout: RowLayout, ids: Tensor, width: int) -> Nesting | None:
    """Nest the rows of a batch where that saves tokens and the model can take it."""
    texts = [row[:length] for row, length in zip(ids.tolist(), layout.lengths.tolist(), strict=True)]
    nesting = Nesting.of(layout, texts)
    saved = (len(texts) - nesting.num_hosts) * width - nesting.num_hosts * nesting.num_slots
    if saved < MIN_SAVED:
        return None
    if nesting.num_slots and (reason := why_no_slots(model)) is not None:
        return _tell(f"cuts of one history run as rows of their own: {reason}")
    return nesting


@cache
def _tell(reason: str) -> None:
    logging.getLogger(__name__).info(reason)
