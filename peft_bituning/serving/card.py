"""The model card of a saved recommender, written from its results."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..artifacts import write_whole
from ..data import ItemCatalog, PromptTemplate
from ..evaluation import SEEN_ITEMS

METRICS = ("recall@10", "ndcg@10", "mrr")


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
        base_model: name, revision, fingerprint of the language model, and whether it was a local folder.
        template: the prompt template.
        items: the catalog, for the example.
        source: what the example loads: the Hub repository, or "." for the folder itself.
    """
    name, revision, is_local = base_model["name"], base_model.get("revision"), bool(base_model.get("is_local"))
    # Only Hub ids belong into the metadata: an alias or a folder's name would point to somebody else's model.
    metadata = ModelCardData(
        library_name="peft",
        base_model=name if "/" in name and not is_local else None,
        pipeline_tag="feature-extraction",
        tags=["recommendation", "sequential-recommendation", "bituning", "laser"],
    )
    sections = [
        f"---\n{metadata.to_yaml()}\n---",
        "# Sequential recommender (Laser)",
        f"This adapter turns the language model `{name}`{f' (revision `{revision}`)' if revision else ''} into a "
        f"sequential recommender over {len(items)} items: it reads a purchase history as text and finds the items "
        "whose embeddings are nearest. The language model is frozen and not part of this repository"
        + (f"; it was a local folder, `{name}`." if is_local else "."),
        "## Use" + (" (from inside this folder)" if source == "." else ""),
        _example(items, source, name if is_local else None),
        "Every file is checked on loading: a missing or changed one is an error. New items need no training, their "
        'text is enough: `recommender.add_items([{"item_id": ..., "title": ...}])`. '
        "`peft.PeftModel.from_pretrained(llm, ...)` after `import peft_bituning` loads the bare adapter.",
    ]
    counts = results.get("dataset", {})
    if results.get("rows"):
        sections += [
            "## Results",
            "Test split of a leave-one-out evaluation: the last item of each user, ranked among all "
            f"{counts.get('items', len(items))} items. `seen` says whether the items of a user's own history stay "
            "among the candidates; ± is the standard error over users.",
            results_table(results["rows"]),
        ]
    if counts:
        sections += ["## Data", _data_table(counts)]
    sections += ["## Prompt", f"```json\n{template.to_json()}\n```"]
    if results.get("versions"):
        versions = ", ".join(f"{package} {number}" for package, number in results["versions"].items())
        sections += ["## Versions", versions]
    write_whole(path, str(ModelCard("\n\n".join(sections) + "\n")))


def results_table(rows: Sequence[dict[str, Any]]) -> str:
    """Lay out methods and their test metrics.

    Args:
        rows: each with `name` and `test`, the metrics of `RankingReport.metrics`.

    Returns:
        A Markdown table: a line a method and filter mode.
    """
    lines = [
        "| method | seen | Recall@10 | NDCG@10 | MRR | users |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        for mode, seen in SEEN_ITEMS.items():
            metrics = row["test"][mode]
            cells = [f"{metrics[name]:.4f} ± {metrics[f'{name}_se']:.4f}" for name in METRICS]
            lines.append(f"| {row['name']} | {seen} | {' | '.join(cells)} | {row['test']['users']} |")
    return "\n".join(lines)


def _example(items: ItemCatalog, source: str, base_folder: str | None) -> str:
    history = json.dumps(list(items.item_ids[:2]))
    if base_folder is None:
        load = f"recommender = LaserRecommender.from_pretrained({json.dumps(source)})\n"
    else:
        load = (
            "# base_model: the folder of the language model on your machine\n"
            f"recommender = LaserRecommender.from_pretrained({json.dumps(source)}, "
            f"base_model={json.dumps(base_folder)})\n"
        )
    return (
        "```python\n"
        "from peft_bituning import LaserRecommender\n\n"
        f"{load}"
        f"for item_id, score in recommender.recommend([{history}], k=5)[0]:\n"
        "    print(item_id, round(score, 3))\n"
        "```"
    )


def _data_table(counts: dict[str, Any]) -> str:
    """List the counts; `rejected` and other groups of counts are spelled out, empty ones left out."""
    lines = ["| count | value |", "| --- | --- |"]
    for key, value in counts.items():
        groups = value.items() if isinstance(value, dict) else [("", value)]
        for kind, number in groups:
            shown = f"{number:.4g}" if isinstance(number, float) else str(number).replace("|", "\\|")
            lines.append(f"| {' '.join([*key.split('_'), *str(kind).split('_')]).strip()} | {shown} |")
    return "\n".join(lines)
