"""The model card of a saved recommender, written from its results."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..data import ItemCatalog, PromptTemplate
from .results_table import results_table


def write_card(
    path: Path,
    results: dict[str, Any],
    base_model: dict[str, Any],
    template: PromptTemplate,
    items: ItemCatalog,
    source: str = ".",
) -> None:
    """Write a model card.

    Args:
        path: the file, `README.md` of the saved folder.
        results: what `training.fit` measured; may be empty.
        base_model: name, revision and fingerprint of the language model.
        template: the prompt template.
        items: the catalog, for the example.
        source: what the example loads: the Hub repository, or "." for the folder itself.
    """
    name, revision = base_model["name"], base_model.get("revision")
    # Only Hub ids belong into the metadata: an alias or a folder's name would point to somebody else's model.
    metadata = ModelCardData(
        library_name="peft",
        base_model=name if "/" in name else None,
        pipeline_tag="feature-extraction",
        tags=["recommendation", "sequential-recommendation", "bituning", "laser"],
    )
    example = list(items.item_ids[: min(2, len(items))])
    counts = results.get("dataset", {})
    parts = [
        f"---\n{metadata.to_yaml()}\n---",
        "# Sequential recommender (Laser)",
        f"A `peft_bituning` adapter that turns `{name}`{f' (revision `{revision}`)' if revision else ''} into a "
        f"sequential recommender over {len(items)} items. The language model is frozen and not part of this folder.",
        "## Use" + (" (from inside this folder)" if source == "." else ""),
        "```python\n"
        "from peft_bituning.serving import LaserRecommender\n\n"
        f"recommender = LaserRecommender.from_pretrained({json.dumps(source)})\n"
        f"print(recommender.recommend([{json.dumps(example)}], k=5))\n"
        "```",
        "Bad or missing files stop the loading with an error; new items are added without training by "
        "`recommender.add_items([...])`.",
    ]
    if results.get("rows"):
        parts += [
            "## Results",
            f"Leave-one-out, ranked against the whole catalog of {counts.get('items', len(items))} items, test split. "
            "`seen` says whether items of the history stay among the candidates. ± is the standard error over users.",
            results_table(results["rows"]),
        ]
    if counts:
        listed = ", ".join(f"{key} {value}" for key, value in counts.items() if isinstance(value, int | float | str))
        parts += ["## Data", listed]
    parts += ["## Prompt", f"```json\n{template.to_json()}\n```"]
    if results.get("versions"):
        parts += ["## Versions", ", ".join(f"{key} {value}" for key, value in results["versions"].items())]
    card = ModelCard("\n\n".join(parts) + "\n")
    path.write_text(str(card), encoding="utf-8")
