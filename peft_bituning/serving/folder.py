"""The saved folder: what it holds, how it is written, and the strict way back."""

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError

from ..artifacts import whole_file, write_whole
from ..assembly import refuse_adapter
from ..base_models import BaseModel, check_same_base, load_base_model
from ..catalog.encoder import HistoryEncoder, HistorySettings
from ..catalog.item_table import ItemTable
from ..data import ItemCatalog, PromptTemplate
from ..errors import ArtifactError, ConfigurationError, DataError
from ..recommenders import Hybrid, IDRecommender, load_recommender
from ..recommenders.hybrid.hybrid import SEQUENCE_FOLDER
from ..recommenders.hybrid.hybrid import SETTINGS_FILE as SETTINGS_OF_HYBRID
from ..recommenders.hybrid.hybrid import TENSORS_FILE as TENSORS_OF_HYBRID
from ..recommenders.hybrid.part import EmbeddingRecommender
from .card import write_card
from .manifest import MANIFEST_FILE, check_manifest, listed_files, write_manifest

SETTINGS_FILE = "laser.json"
TEMPLATE_FILE = "template.json"
CARD_FILE = "README.md"
ITEMS_FILE = "catalog/items.jsonl"
TABLE_FILE = "catalog/item_table.safetensors"
RECOMMENDER_FOLDER = "recommender"
HYBRID_FOLDER = "hybrid"
USER_ADAPTER = "default"
ITEM_ADAPTER = "items"
FORMAT_VERSION = 1

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_RECOMMENDER_FILES = ("config.json", "model.safetensors")
_HYBRID_FILES = (SETTINGS_OF_HYBRID, TENSORS_OF_HYBRID)


@dataclass(frozen=True)
class LaserSettings:
    """What a saved recommender remembers beside tensors.

    Args:
        base_model: name, revision and fingerprint of the language model, and whether it was a local folder
            (`is_local`).
        max_length: tokens of a prompt at most.
        max_history: items of a prompt at most, or None.
        max_item_tokens: tokens of an item at most, or None.
        max_collaborative_items: items of a history that the ID recommender reads at most.
        max_collaborative_states: newest items of a history whose collaborative embeddings the prefix reads, or None.
        recommender_hash: content hash of the ID recommender, or None without one.
        table_checksum: sha256 of the item table.
        results: metrics and counts for the model card.
        version: version of this package.
        item_collaborative: what the prefix reads of an item, see `HistoryEncoder`.
        format_version: version of this file's layout.
    """

    base_model: dict[str, Any]
    max_length: int
    max_history: int | None
    max_item_tokens: int | None
    max_collaborative_items: int
    max_collaborative_states: int | None
    recommender_hash: str | None
    table_checksum: str
    results: dict[str, Any]
    version: str
    item_collaborative: str = "history"
    format_version: int = FORMAT_VERSION

    @classmethod
    def of(cls, base: BaseModel, encoder: HistoryEncoder, table: ItemTable, results: dict[str, Any]) -> "LaserSettings":
        """Say what a recommender remembers.

        Args:
            base: the language model.
            encoder: encodes users and items.
            table: the item table.
            results: metrics and counts, as `fit` measured them.
        """
        prompts, known = encoder.collator.prompts, encoder.id_recommender
        return cls(
            base_model={
                "name": base.name,
                "revision": base.revision,
                "fingerprint": base.fingerprint(),
                "is_local": base.is_local,
            },
            max_length=prompts.max_length or encoder.settings.max_length,
            max_history=prompts.max_items,
            max_item_tokens=prompts.max_item_tokens,
            max_collaborative_items=encoder.collator.max_items,
            max_collaborative_states=encoder.settings.max_collaborative_states,
            item_collaborative=encoder.settings.item_collaborative,
            recommender_hash=None if known is None else known.content_hash(),
            table_checksum=table.checksum(),
            results={key: value for key, value in results.items() if key != "log_history"},
            version=version("peft_bituning"),
        )

    @property
    def history(self) -> HistorySettings:
        """How much of a history is read."""
        names = [each.name for each in fields(HistorySettings)]
        return HistorySettings(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class SavedParts:
    """Everything of a saved recommender but the adapters and the language model.

    Args:
        settings: limits and provenance.
        template: the prompt template.
        items: the catalog.
        table: the item table, in catalog order.
        id_recommender: the frozen ID recommender, or None.
        hybrid: what ranks, to be written; it is read by `read_hybrid`.
    """

    settings: LaserSettings
    template: PromptTemplate
    items: ItemCatalog
    table: ItemTable
    id_recommender: IDRecommender | None
    hybrid: Hybrid | None = None


def write_folder(folder: Path, model: PeftModel, parts: SavedParts, repo_id: str | None = None) -> None:
    """Write a recommender; the manifest comes last, so that an interrupted save is no saved folder.

    Args:
        folder: the folder; files of an earlier save are replaced, others left.
        model: the PEFT model with both adapters.
        parts: the rest.
        repo_id: the Hub repository that the model card's example loads; None loads the folder.
    """
    (folder / "catalog").mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST_FILE).unlink(missing_ok=True)
    model.save_pretrained(str(folder), selected_adapters=[USER_ADAPTER, ITEM_ADAPTER], save_embedding_layers=False)
    (folder / ITEM_ADAPTER / CARD_FILE).unlink(missing_ok=True)
    with whole_file(folder / ITEMS_FILE) as temporary:
        parts.items.to_jsonl(temporary)
    parts.table.save(folder / TABLE_FILE)
    write_whole(folder / TEMPLATE_FILE, parts.template.to_json() + "\n")
    write_whole(folder / SETTINGS_FILE, json.dumps(asdict(parts.settings), indent=2) + "\n")
    if parts.id_recommender is not None:
        parts.id_recommender.save_pretrained(folder / RECOMMENDER_FOLDER)
    if parts.hybrid is not None:
        parts.hybrid.save_pretrained(folder / HYBRID_FOLDER, with_sequence=_apart(parts))
    settings = parts.settings
    with whole_file(folder / CARD_FILE) as temporary:
        write_card(temporary, settings.results, settings.base_model, parts.template, parts.items, repo_id or ".")
    files = [*_needed_files(parts.id_recommender is not None), *_hybrid_files(parts), CARD_FILE]
    write_manifest(folder, files)


def read_folder(folder: Path) -> SavedParts:
    """Read and check everything but the adapters, which need the language model.

    Args:
        folder: what `write_folder` wrote.

    Returns:
        The parts.

    Raises:
        ArtifactError: a file is missing, changed, damaged, or belongs to another save.
    """
    listed = check_manifest(folder, editable=[CARD_FILE])
    settings = _read_settings(folder / SETTINGS_FILE, listed)
    _check_listed(listed, _needed_files(settings.recommender_hash is not None))
    try:
        template = PromptTemplate.from_json((folder / TEMPLATE_FILE).read_text(encoding="utf-8"))
        items = ItemCatalog.from_jsonl(folder / ITEMS_FILE)
    except (ConfigurationError, DataError, UnicodeDecodeError) as error:
        raise ArtifactError(
            f"{TEMPLATE_FILE} or {ITEMS_FILE} cannot be used: {error} Download or save the folder again"
        ) from error
    table = ItemTable.load(folder / TABLE_FILE, len(items))
    if table.checksum() != settings.table_checksum:
        raise ArtifactError(
            f"{TABLE_FILE} is not the table that {SETTINGS_FILE} names (sha256 differs); they are from two saves, "
            "save or download the folder again"
        )
    return SavedParts(settings, template, items, table, _read_recommender(folder, settings.recommender_hash))


def read_catalog(folder: Path) -> tuple[ItemCatalog, dict[str, Any], IDRecommender | None]:
    """Read what a hybrid needs beside its own files: the catalog, the results, the ID recommender.

    Args:
        folder: what `write_folder` wrote with a hybrid.

    Raises:
        ArtifactError: a file is missing, changed or damaged, or there is no hybrid.
    """
    listed = check_manifest(folder, editable=[CARD_FILE])
    settings = _read_settings(folder / SETTINGS_FILE, listed)
    _check_listed(listed, [ITEMS_FILE, *(f"{HYBRID_FOLDER}/{name}" for name in _HYBRID_FILES)])
    try:
        items = ItemCatalog.from_jsonl(folder / ITEMS_FILE)
    except DataError as error:
        raise ArtifactError(f"{ITEMS_FILE} cannot be used: {error} Download or save the folder again") from error
    return items, settings.results, _read_recommender(folder, settings.recommender_hash)


def read_hybrid(
    folder: Path, items: ItemCatalog, known: IDRecommender | None, laser: EmbeddingRecommender | None = None
) -> Hybrid:
    """Read the hybrid of a folder whose manifest was checked; `known` is the ID recommender that the prefix reads."""
    place = folder / HYBRID_FOLDER
    own = f"{HYBRID_FOLDER}/{SEQUENCE_FOLDER}/{_RECOMMENDER_FILES[0]}"
    return Hybrid.from_pretrained(place, items, None if own in listed_files(folder) else known, laser)


def has_hybrid(folder: Path) -> bool:
    """Whether a folder whose manifest was checked was saved with a hybrid: files of an earlier save may be left."""
    return f"{HYBRID_FOLDER}/{SETTINGS_OF_HYBRID}" in listed_files(folder)


def item_identity(folder: Path) -> dict[str, Any]:
    """Return what the item embeddings of a saved recommender depend on, as `table_blocks` takes it.

    Args:
        folder: what `write_folder` wrote.

    Returns:
        JSON values: the language model's name and configuration, limits of a prompt, what the prefix reads of an item,
        and the sha256 of the adapter `items`, the ID recommender, the template and the catalog.

    Raises:
        ArtifactError: a file is missing, changed or damaged.
    """
    listed = check_manifest(folder, editable=[CARD_FILE])
    settings = _read_settings(folder / SETTINGS_FILE, listed)
    adapter = [f"{ITEM_ADAPTER}/{name}" for name in _ADAPTER_FILES]
    files = [*adapter, TEMPLATE_FILE, ITEMS_FILE]
    _check_listed(listed, files)
    return {
        "base_model": settings.base_model,
        "max_length": settings.max_length,
        "max_item_tokens": settings.max_item_tokens,
        "recommender": settings.recommender_hash,
        "item_collaborative": settings.item_collaborative,
        **{name: listed[name] for name in files},
    }


def load_base(settings: LaserSettings, given: str | Path | BaseModel | None, dtype: torch.dtype) -> BaseModel:
    """Load the language model that a folder names, or the given one, in a type for its frozen weights.

    Raises:
        ArtifactError: it is another model, or was a local folder that is not here.
        ConfigurationError: it cannot be loaded.
    """
    recorded = settings.base_model
    name = recorded["name"]
    if given is None and recorded.get("is_local") and not Path(name).is_dir():
        raise ArtifactError(
            f"the language model was a local folder named {name!r}, which is not saved here; give it as base_model="
        )
    base = load_base_model(given or name, dtype, None if given is not None else recorded.get("revision"))
    check_same_base(base, name, recorded["fingerprint"])
    return base


def load_adapters(base: BaseModel, folder: Path) -> PeftModel:
    """Put both saved adapters on the language model, strictly.

    Args:
        base: the language model; it is changed in place.
        folder: what `write_folder` wrote.

    Returns:
        The PEFT model with the adapters `default` and `items`.

    Raises:
        ConfigurationError: the language model carries an adapter already.
        AdapterLoadError: tensors are missing, unexpected or mis-shaped.
        ArtifactError: an adapter's files cannot be read.
    """
    refuse_adapter(base)
    try:
        model = PeftModel.from_pretrained(base.model, str(folder), adapter_name=USER_ADAPTER)
        model.load_adapter(str(folder / ITEM_ADAPTER), adapter_name=ITEM_ADAPTER)
    except ConfigurationError as error:
        raise ArtifactError(f"an adapter_config.json of the folder cannot be used: {error}") from error
    except (OSError, json.JSONDecodeError, KeyError, TypeError, SafetensorError) as error:
        raise ArtifactError(
            f"the adapter files ({', '.join(_ADAPTER_FILES)}, also in {ITEM_ADAPTER}/) cannot be read: {error!r}; they "
            "are truncated or damaged, download or save the folder again"
        ) from error
    return model


def _needed_files(has_recommender: bool) -> list[str]:
    names = [SETTINGS_FILE, TEMPLATE_FILE, ITEMS_FILE, TABLE_FILE]
    names += [f"{prefix}{name}" for prefix in ("", f"{ITEM_ADAPTER}/") for name in _ADAPTER_FILES]
    return names + [f"{RECOMMENDER_FOLDER}/{name}" for name in _RECOMMENDER_FILES if has_recommender]


def _apart(parts: SavedParts) -> bool:
    """Whether the hybrid's ID recommender is not the one that the prefix reads, which is in the folder anyway."""
    sequence = None if parts.hybrid is None else parts.hybrid.settings()["sequence"]
    return sequence is not None and sequence != parts.settings.recommender_hash


def _hybrid_files(parts: SavedParts) -> list[str]:
    if parts.hybrid is None:
        return []
    own = [f"{SEQUENCE_FOLDER}/{name}" for name in _RECOMMENDER_FILES] if _apart(parts) else []
    return [f"{HYBRID_FOLDER}/{name}" for name in (*_HYBRID_FILES, *own)]


def _check_listed(listed: Collection[str], needed: Sequence[str]) -> None:
    left_out = [name for name in needed if name not in listed]
    if left_out:
        raise ArtifactError(
            f"{MANIFEST_FILE} must list every file of the folder, but leaves out {', '.join(left_out)}; download or "
            "save the folder again"
        )


def _read_settings(path: Path, listed: Collection[str]) -> LaserSettings:
    _check_listed(listed, [SETTINGS_FILE])
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        found = values.get("format_version")
        if found == FORMAT_VERSION:
            return LaserSettings(**values)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{path.name} cannot be read ({error}); it is damaged, download or save the folder again"
        ) from error
    raise ArtifactError(
        f"{path.name} must have format_version {FORMAT_VERSION}, got {found!r}; use the version of peft_bituning that "
        f"saved it ({values.get('version', 'unknown')})"
    )


def _read_recommender(folder: Path, expected: str | None) -> IDRecommender | None:
    if expected is None:
        return None
    recommender = load_recommender(folder / RECOMMENDER_FOLDER)
    found = recommender.content_hash()
    if found != expected:
        raise ArtifactError(
            f"the ID recommender in {RECOMMENDER_FOLDER}/ is not the one the adapter was trained with (hash "
            f"{found[:12]}, trained with {expected[:12]}); restore the original, an adapter cannot read another "
            "recommender's embeddings"
        )
    return recommender
