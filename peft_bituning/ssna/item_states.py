"""The states of every item in a layers: one pass of the frozen language model, all that the side network sees of it."""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..artifacts import bytes_of, sha256_of, sha256_of_json
from ..base_models import BaseModel
from ..block_file import BlockFile
from ..data import ItemCatalog, PromptEncoder, PromptTemplate
from ..data.collator import HistoryCollator
from ..errors import ArtifactError, ConfigurationError, InputError, UnsupportedModelError
from ..recommenders.base import evaluation_mode
from ..tuners.rows.backbone import device_of, find_backbone, max_positions, token_embeddings

logger = logging.getLogger(__name__)

ITEM_TEXT = PromptTemplate("item_text", marker="")  #: An item's title and attributes, without instruction and marker.
POOLINGS = ("last", "mean")
STATES = "states"  # the block file and the tensor in it

_SAMPLED = 16  # values of every weight that the origin records


@dataclass(frozen=True, eq=False)
class ItemStates:
    """One vector per item and layer, layers from the lowest cached one to the top.

    Args:
        values: `[I, a, D]`, any float type; from `open` it is mapped into memory, not read into it.
        origin: What made the states: base model, template, pooling, items.

    Raises:
        InputError: The shape is not `[I, a, D]`, or the type is no float.
    """

    values: Tensor
    origin: dict[str, Any]

    def __post_init__(self) -> None:
        if self.values.ndim != 3 or 0 in self.values.shape:
            raise InputError(f"states must have shape [items, layers, width], got {list(self.values.shape)}")
        if not self.values.dtype.is_floating_point:
            raise InputError(f"states must be of a float type, got {self.values.dtype}")

    def __len__(self) -> int:
        """Return I."""
        return self.values.shape[0]

    @property
    def num_layers(self) -> int:
        """The number of layers, a."""
        return self.values.shape[1]

    @property
    def width(self) -> int:
        """The width of the language model, D."""
        return self.values.shape[2]

    @classmethod
    def open(cls, folder: str | Path, verify: bool = True) -> "ItemStates":
        """Open states that `cache_item_states` finished, memory-mapped; the language model is not needed.

        Args:
            folder: Where they were cached.
            verify: Read the file once and compare it with the checksums of its blocks.

        Raises:
            ArtifactError: There are none, they are not finished, or blocks are damaged.
        """
        place = Path(folder)
        file = BlockFile.find(place, STATES, STATES)
        if file is None:
            raise ArtifactError(f"{place.name} holds no cached states; make them with cache_item_states")
        values = file.values()
        if left := sorted(set(range(file.num_blocks)) - file.finished(verify=verify)):
            raise ArtifactError(
                f"{len(left)} of {file.num_blocks} blocks of the cached states in {place.name} are unfinished or "
                f"damaged, first {left[:5]}; call cache_item_states again, it makes these alone"
            )
        return cls(values, file.origin)


def cache_item_states(
    base: BaseModel,
    items: ItemCatalog,
    folder: str | Path,
    *,
    num_layers: int = 4,
    pooling: str = "last",
    template: PromptTemplate = ITEM_TEXT,
    dtype: str = "float32",
    batch_size: int = 16,
    block_size: int = 256,
    overwrite: bool = False,
    progress: bool = False,
) -> ItemStates:
    """Run every item's text through the frozen language model once and keep its top layers' states on the disk.

    Stopped at any moment, it goes on where it was: finished blocks are checked by their sha256 and kept, others are
    made again. A cache of another model, template, catalog, pooling or type is refused.

    Args:
        base: The language model and its tokenizer; it is not changed, and gets no gradient.
        items: The catalog.
        folder: Where the states are kept.
        num_layers: a, the top layers kept, the last of them behind the model's final norm; all where it has fewer.
        pooling: `last`: the state of an item's last token; `mean`: over its tokens.
        template: How an item is put into words, as a one-item history.
        dtype: Of the file: `float32`, `float16` or `bfloat16`.
        batch_size: Items per forward pass.
        block_size: Items between two writes; a cache that is resumed keeps the one it began with.
        overwrite: Replace a cache of another origin, or one that is damaged beyond its blocks.
        progress: Show a bar over the items.

    Returns:
        The states, memory-mapped. An item without a single token has states of zero.

    Raises:
        ConfigurationError: A setting is out of its range.
        ArtifactError: The folder holds states of another origin, or a damaged file.
        InputError: A state is not finite, or overflows the type.
        UnsupportedModelError: The model does not return one state per token and layer.
    """
    for name, value in (("num_layers", num_layers), ("batch_size", batch_size), ("block_size", block_size)):
        if value < 1:
            raise ConfigurationError(f"{name} must be at least 1, got {value!r}")
    if pooling not in POOLINGS:
        raise ConfigurationError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
    template = replace(template, fields=template.fields_for(items))
    prompts = PromptEncoder(template, base.tokenizer, items, max_positions(base.model))
    config = base.model.config.get_text_config()
    shape = (len(items), min(num_layers, config.num_hidden_layers), config.hidden_size)
    origin = _origin(base, prompts, pooling)
    file = _provide(BlockFile(Path(folder), STATES, STATES, origin, shape, dtype, block_size), overwrite)
    _fill(file, base.model, prompts, batch_size, progress)
    return ItemStates(file.values(), origin)


def _origin(base: BaseModel, prompts: PromptEncoder, pooling: str) -> dict[str, Any]:
    """Return what decides the states: the model, the template and the texts as tokens."""
    tokens = [prompts.encode([item], "item") for item in range(len(prompts.items))]
    origin = {
        "base_model": base.name,
        "is_local": base.is_local,
        "fingerprint": base.fingerprint(),
        "weights": sha256_of(_sampled(base.model)),
        "template": prompts.template.to_dict(),
        "pooling": pooling,
        "items": sha256_of_json([prompts.items.item_ids, tokens]),
    }
    return json.loads(json.dumps(origin))


def _sampled(model: nn.Module) -> Iterator[bytes | memoryview]:
    """Yield a few values of every weight, which tell tunings and types of one model apart."""
    for name, weight in model.named_parameters():
        yield f"\n{name} {list(weight.shape)} {weight.dtype}\n".encode()
        if not weight.is_meta and weight.numel():
            flat = weight.detach().reshape(-1)
            yield bytes_of(flat[:: max(1, len(flat) // _SAMPLED)][:_SAMPLED])


def _provide(wanted: BlockFile, overwrite: bool) -> BlockFile:
    """Find the file in its folder, or make it."""
    try:
        file = wanted.begun()
        if file is not None:
            file.check()
            return file
    except ArtifactError as error:
        if not overwrite:
            raise ArtifactError(f"{error}, or replace the cached states with overwrite=True") from error
    wanted.create()
    return wanted


@torch.no_grad()
def _fill(file: BlockFile, model: PreTrainedModel, prompts: PromptEncoder, batch_size: int, progress: bool) -> None:
    """Make the blocks that are not finished."""
    collator = HistoryCollator(prompts, pad_token_id=0, max_items=1)
    missing = sorted(set(range(file.num_blocks)) - file.finished())
    done = file.shape[0] - sum(len(file.rows(block)) for block in missing)
    bar = tqdm(total=file.shape[0], initial=done, desc="caching states", unit="item", disable=not progress)
    with evaluation_mode(model), bar:
        for block in missing:
            items = file.rows(block)
            ordered = sorted(items, key=lambda item: (collator.length([item], "item"), item))
            values = torch.zeros(len(items), *file.shape[1:], dtype=getattr(torch, file.dtype))
            for start in range(0, len(items), batch_size):
                batch = ordered[start : start + batch_size]
                values[torch.tensor(batch) - items.start] = _states(file, model, collator, batch).to(values)
                bar.update(len(batch))
            if bad := (~values.isfinite()).flatten(1).any(1).nonzero()[:, 0].tolist():
                names = [prompts.items.item_ids[items[row]] for row in bad[:5]]
                raise InputError(
                    f"states must be finite in {file.dtype}, got NaN or infinity for {len(bad)} items, first {names}; "
                    "cache them as bfloat16 or float32, and load the base model in bfloat16 or float32"
                )
            file.write(block, values)
    if prompts.counts["items_cut"]:
        logger.warning("the texts of some items were cut to the model's context of %s tokens", prompts.max_length)
    if prompts.twin_count:
        logger.warning("%d items share their text with another one and cannot be told apart", prompts.twin_count)


def _states(file: BlockFile, model: PreTrainedModel, collator: HistoryCollator, items: list[int]) -> Tensor:
    """Return the pooled states [B, a, D] of a batch of items on the CPU."""
    backbone, device = find_backbone(model), device_of(token_embeddings(model))
    batch = collator([[item] for item in items], "item").to(device)
    output = backbone(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True, use_cache=False
    )
    _, num_layers, width = file.shape
    layers = output.hidden_states[-num_layers:]
    expected = (*batch.input_ids.shape, width)
    if len(output.hidden_states) <= num_layers or any(layer.shape != expected for layer in layers):
        raise UnsupportedModelError(
            f"the base model must return one state [B, T, D] = {list(expected)} a layer for {num_layers} layers and "
            f"its embeddings, got {[list(layer.shape) for layer in output.hidden_states]} from "
            f"{type(backbone).__name__}"
        )
    lengths = batch.attention_mask.sum(1)
    if file.origin["pooling"] == "last":
        rows = torch.arange(len(items), device=device)
        pooled = [layer[rows, (lengths - 1).clamp(min=0)].float() for layer in layers]
    else:
        weights = batch.attention_mask[:, :, None].bool()
        pooled = [layer.float().masked_fill(~weights, 0).sum(1) / lengths.clamp(min=1)[:, None] for layer in layers]
    stacked = torch.stack(pooled, dim=1)  # [B, a, D]
    return stacked.masked_fill((lengths == 0)[:, None, None], 0).cpu()
