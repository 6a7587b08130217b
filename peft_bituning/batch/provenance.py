"""What made a list of recommendations: enough to tell two recommenders apart."""

import json
from typing import Any

from peft import get_peft_model_state_dict

from ..artifacts import sha256_of_json, sha256_of_tensors
from ..serving.recommender import USER_ADAPTER, LaserRecommender


def made_by(recommender: LaserRecommender) -> dict[str, Any]:
    """Return what tells one recommender's lists from another's, as JSON values.

    Args:
        recommender: a trained recommender.

    Returns:
        The base model's name, revision, configuration and type, checksums of the user adapter, the item table, the
        catalog and the ID recommender, and the settings of the index and the prompt.
    """
    base, settings = recommender.base, recommender.settings
    adapter = get_peft_model_state_dict(recommender.model, adapter_name=USER_ADAPTER, save_embedding_layers=False)
    frozen, index = recommender.id_recommender, recommender.index
    return {
        "base_model": base.name,
        "base_model_revision": base.revision,
        "base_model_fingerprint": base.fingerprint(),
        "dtype": str(base.model.dtype),
        "quantization": str(getattr(base.model, "quantization_method", None)),
        "adapter": sha256_of_tensors(adapter, "{name} {shape} {dtype}\n"),
        "item_table": recommender.table.checksum(),
        "catalog": sha256_of_json([recommender.items.item_ids, recommender.items.attributes]),
        "index": {
            "class": type(index).__name__,
            **{name: getattr(index, name) for name in ("kind", "parameters") if hasattr(index, name)},
        },
        "recommender": None if frozen is None else frozen.content_hash(),
        "template": json.loads(recommender.template.to_json()),
        "max_length": settings.max_length,
        "max_history": settings.max_history,
        "max_item_tokens": settings.max_item_tokens,
        "max_collaborative_items": settings.max_collaborative_items,
        "max_collaborative_states": settings.max_collaborative_states,
        "item_collaborative": settings.item_collaborative,
    }
