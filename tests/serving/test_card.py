"""The model card: valid metadata, the results, a snippet that runs, and no word of this machine."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from peft_bituning.data import ItemCatalog, PromptTemplate, load_interactions
from peft_bituning.recommenders import build_recommender
from peft_bituning.serving.card import groups_table, results_table, write_card
from peft_bituning.training import fit

ITEMS = ItemCatalog.from_records([{"item_id": "007", "title": "Lamp"}, {"item_id": 'quo"te', "title": "Rope"}])


@pytest.fixture
def card(trained) -> str:
    return (trained.folder / "README.md").read_text(encoding="utf-8")


def written(path: Path, base_model: dict, results: dict | None = None, source: str = ".") -> str:
    write_card(path, results or {}, base_model, PromptTemplate.from_preset("paper"), ITEMS, source)
    return path.read_text(encoding="utf-8")


def snippet(card: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    return code


def test_metadata_is_valid_and_claims_no_hub_model_for_a_local_one(trained) -> None:
    data = ModelCard.load(trained.folder / "README.md").data.to_dict()
    assert data["library_name"] == "peft"
    assert "recommendation" in data["tags"] and "bituning" in data["tags"]
    assert "base_model" not in data


def test_the_card_holds_what_the_run_measured(trained, card) -> None:
    results = json.loads((trained.folder / "results.json").read_text())
    assert results_table(results["rows"]) in card
    assert groups_table(results["rows"]) in card and results["language_model"]["verdict"] in card
    assert "| Laser after stage 2 |" in card and "± " in card
    for line in ("| users | 30 |", "| items | 12 |", "| events | 163 |", "| source | a ring |"):
        assert line in card
    assert "`tiny-llama`" in card
    assert PromptTemplate.from_json(re.findall(r"```json\n(.*?)```", card, flags=re.DOTALL)[0]).name == "paper"
    assert "torch 2" in card


def test_tables_have_a_line_per_row_and_the_best_in_bold(trained) -> None:
    rows = json.loads((trained.folder / "results.json").read_text())["rows"]
    head, _, *lines = results_table(rows).splitlines()
    assert head.count("kept") == head.count("left out") == 3 and len(lines) == len(rows)
    best = max(row["test"]["unfiltered"]["ndcg@10"] for row in rows)
    for row, line in zip(rows, lines, strict=True):
        cell = line.split("|")[3].strip()
        assert cell.startswith("**") == (row["test"]["unfiltered"]["ndcg@10"] == best)
        assert f"{row['test']['unfiltered']['ndcg@10']:.4f}" in cell
    groups = groups_table(rows).splitlines()
    assert "users with up to 3 events" in groups[0] and len(groups) == len(rows) + 2
    for row in rows:
        del row["test"]["groups"]
    assert groups_table(rows) == ""  # of a folder from before


def test_the_snippet_runs_beside_the_language_model(trained, copied, card, monkeypatch, capsys) -> None:
    (copied / "tiny-llama").symlink_to(trained.base_folder)
    monkeypatch.chdir(copied)
    exec(compile(snippet(card), "card", "exec"), {})
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    expected = trained.recommender.recommend([["007", "8"]], k=5)[0]
    assert lines == [f"{item} {round(score, 3)}" for item, score in expected]


def test_a_hub_model_is_named_with_its_revision(tmp_path) -> None:
    path = tmp_path / "README.md"
    card = written(path, {"name": "someone/llm", "revision": "abc123", "is_local": False}, source="me/laser")
    assert ModelCard.load(path).data.base_model == "someone/llm"
    assert "`someone/llm` (revision `abc123`)" in card
    assert 'LaserRecommender.from_pretrained("me/laser")' in snippet(card)
    assert json.loads(re.findall(r"recommend\(\[(.*?)\], k", card)[0]) == ["007", 'quo"te']


@pytest.mark.parametrize("base", [{"name": "smollm2-135m"}, {"name": "a/b", "is_local": True}])
def test_aliases_and_folders_are_no_hub_models(tmp_path, base) -> None:
    written(tmp_path / "README.md", base)
    assert ModelCard.load(tmp_path / "README.md").data.base_model is None


def test_a_card_without_results_has_no_empty_sections(tmp_path) -> None:
    card = written(tmp_path / "README.md", {"name": "someone/llm"})
    assert [line for line in card.splitlines() if line.startswith("## ")] == [
        "## Use (from inside this folder)",
        "## Prompt",
    ]


def test_counts_are_spelled_out(tmp_path) -> None:
    counts = {"source": "a|b", "rejected": {"bad_timestamp": 2}, "rows_read": {}, "density": 0.123456}
    card = written(tmp_path / "README.md", {"name": "x"}, {"dataset": counts})
    assert "| rejected bad timestamp | 2 |" in card
    assert "| source | a\\|b |" in card
    assert "| density | 0.1235 |" in card
    assert "rows read" not in card


def test_no_file_names_a_path_of_this_machine(trained, tiny_config, tiny_arguments, tmp_path) -> None:
    """Everything that can be given as a path is given as one: data, template, recommender, base model, output."""
    secret = tmp_path / "secret-place"
    (secret / "data").mkdir(parents=True)
    items = trained.data.items
    (secret / "data" / "items.jsonl").write_text("".join(f'{{"item_id": "{i}", "title": "{i}"}}\n' for i in range(12)))
    rows = [f"{u},{i},{t}\n" for u, row in enumerate(trained.data.histories) for t, i in enumerate(row)]
    (secret / "data" / "interactions.csv").write_text("user_id,item_id,order\n" + "".join(rows))
    (secret / "template.json").write_text(PromptTemplate("own", "Seen:").to_json())
    build_recommender("sasrec", len(items), seed=0).save_pretrained(secret / "sasrec")
    arguments = tiny_arguments(
        secret / "output",
        id_recommender=str(secret / "sasrec"),
        template=str(secret / "template.json"),
        stage2_epochs=0,
    )
    data = load_interactions(f"folder:{secret / 'data'}", rejects_path=secret / "output" / "rejects.jsonl")
    fit(data, base_model=trained.base_folder, config=tiny_config, arguments=arguments)
    scanned = 0
    for path in (secret / "output").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            for place in (secret, trained.base_folder.parent, Path.home(), Path(__file__).parents[2]):
                if str(place) != "/":
                    assert str(place).encode() not in content, f"{path.name} names {place}"
            scanned += path.suffix in (".json", ".jsonl", ".md")
    assert scanned >= 9
