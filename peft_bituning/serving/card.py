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
            f"{counts.get('items', len(items))} items; those of a user's own history are kept among the candidates, or "
            "left out. ± is the standard error over users, the best of a column is bold.",
            results_table(results["rows"]),
            groups_table(results["rows"]),
            results.get("language_model", {}).get("verdict", ""),
        ]
    if counts:
        sections += ["## Data", _data_table(counts)]
    sections += ["## Prompt", f"```json\n{template.to_json()}\n```"]
    if results.get("versions"):
        versions = ", ".join(f"{package} {number}" for package, number in results["versions"].items())
        sections += ["## Versions", versions]
    write_whole(path, str(ModelCard("\n\n".join(filter(None, sections)) + "\n")))


def results_table(rows: Sequence[dict[str, Any]]) -> str:
    """Lay out methods and their test metrics, the best of each column in bold.

    Args:
        rows: each with `name` and `test`, the metrics of `RankingReport.metrics`.

    Returns:
        A Markdown table: a line a method, seen items kept, then left out.
    """
    titles = [f"{title}, {seen}" for seen in SEEN_ITEMS.values() for title in ("R@10", "N@10", "MRR")]
    columns = [[row["test"][mode][name] for row in rows] for mode in SEEN_ITEMS for name in METRICS]
    errors = [[row["test"][mode][f"{name}_se"] for row in rows] for mode in SEEN_ITEMS for name in METRICS]
    cells = [
        [_best(value, values, f"{value:.4f} ± {error:.4f}") for value, error in zip(values, spread, strict=True)]
        for values, spread in zip(columns, errors, strict=True)
    ]
    return _table(
        ["method", *titles], [[_label(row), *line] for row, line in zip(rows, zip(*cells, strict=True), strict=True)]
    )


def groups_table(rows: Sequence[dict[str, Any]]) -> str:
    """Lay out the NDCG@10 of groups of users or targets, seen items kept, the best of each in bold.

    Args:
        rows: as `results_table` takes them; those of earlier versions have no groups and are left out.

    Returns:
        A Markdown table, or nothing where no row has groups.
    """
    rows = [row for row in rows if row["test"].get("groups")]
    sizes = {name: each["users"] for row in rows for name, each in row["test"]["groups"].items()}
    if not sizes:
        return ""
    values = {name: [row["test"]["groups"][name]["unfiltered"]["ndcg@10"] for row in rows] for name in sizes}
    titles = [f"{name} ({size} users)" for name, size in sizes.items()]
    lines = [
        [_label(row), *(_best(column[place], column, f"{column[place]:.4f}") for column in values.values())]
        for place, row in enumerate(rows)
    ]
    return _table(["N@10, seen items kept", *titles], lines)


def _label(row: dict[str, Any]) -> str:
    """Name a row for somebody who has not read the paper."""
    return f"Laser {row['name']}" if row["name"].startswith("after stage") else str(row["name"])


def _best(value: float, values: Sequence[float], shown: str) -> str:
    return f"**{shown}**" if value == max(values) > 0 else shown


def _table(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [titles, ["---"] * len(titles), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


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
