"""Templates: the texts of the paper, what is printed, and their JSON."""

import json

import pytest

from peft_bituning.data import PRESETS, ItemCatalog, PromptEncoder, PromptTemplate
from peft_bituning.errors import ConfigurationError

INSTRUCTION = (
    "You are an intelligent recommendation assistant. Please summarize the user's characteristics into a single token "
    "based on the browsing history. In chronological order, the user has browsed the following items:"
)


@pytest.fixture
def text(catalog: ItemCatalog, byte_tokenizer):
    """Return a printer of prompts: preset, history, kind."""
    return lambda name, history, kind="user": PromptEncoder(PRESETS[name], byte_tokenizer, catalog).text(history, kind)


def test_paper_prints_instruction_and_numbered_lines(text) -> None:
    assert text("paper", [0, 1, 2, 3]) == (
        INSTRUCTION + "\n>> 1. Brass lamp (brand: Acme, category: garden)\n>> 2. Steel kettle (category: kitchen)"
        "\n>> 3. (brand: Bolt, category: tools)\n>> 4. Rope & drill (brand: Corvo)"
    )


def test_an_item_prompt_is_a_one_item_history(text) -> None:
    assert text("paper", [1], "item") == text("paper", [1]) == INSTRUCTION + "\n>> 1. Steel kettle (category: kitchen)"


def test_an_empty_history_is_the_instruction_alone(text) -> None:
    assert text("paper", []) == INSTRUCTION


def test_variants_of_the_paper(text) -> None:
    assert text("no_phrase", []) == INSTRUCTION.replace(" into a single token", "")
    assert (
        text("no_instruction", [1, 1])
        == ">> 1. Steel kettle (category: kitchen)\n>> 2. Steel kettle (category: kitchen)"
    )
    assert text("two_instructions", [1]).startswith(INSTRUCTION)
    assert text("two_instructions", [1], "item").startswith(
        "You are an intelligent recommendation assistant. Please summarize the item characteristics into a single "
        "token:\n>> 1. Steel"
    )


def test_released_repeats_the_brand_as_category(text) -> None:
    assert text("released", [0, 1]) == (
        "You are an intelligent recommendation assistant. Please summarize my characteristics with a single token "
        "based on my browsing history. In chronological order, I have browsed the following items:"
        "\n>>1. Brass lamp (brand: Acme, category: Acme)\n>>2. Steel kettle"
    )


def test_other_columns_are_printed_where_there_is_neither_brand_nor_category(byte_tokenizer) -> None:
    movies = ItemCatalog.from_records([{"item_id": 1, "title": "Toy Story", "year": 1995, "genres": "Comedy"}])
    assert PRESETS["paper"].fields_for(movies) == ("year", "genres")
    encoder = PromptEncoder(PRESETS["no_instruction"], byte_tokenizer, movies)
    assert encoder.text([0]) == ">> 1. Toy Story (year: 1995, genres: Comedy)"


def test_a_template_of_ones_own(catalog: ItemCatalog, byte_tokenizer) -> None:
    template = PromptTemplate("mine", "Seen:", marker="- ({number})", fields=("category",))
    assert PromptEncoder(template, byte_tokenizer, catalog).text([0]) == "Seen:\n- (1) Brass lamp (category: garden)"
    assert PromptTemplate(fields=()).fields_for(catalog) == ()


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name: str) -> None:
    template = PRESETS[name]
    assert PromptTemplate.from_json(template.to_json()) == template
    assert PromptTemplate.from_json(json.dumps(template.to_dict())) == template
    assert hash(PromptTemplate.from_preset(name)) == hash(template)


def test_wrong_templates_say_what_is_wrong() -> None:
    with pytest.raises(ConfigurationError, match="unknown colour"):
        PromptTemplate.from_json(json.dumps({"name": "a", "colour": "red"}))
    with pytest.raises(ConfigurationError, match="must be a JSON object"):
        PromptTemplate.from_json("[]")
    with pytest.raises(ConfigurationError, match="must be JSON; reading it failed"):
        PromptTemplate.from_json("{")
    with pytest.raises(ConfigurationError, match="placeholder {number}, got '{title}'"):
        PromptTemplate(marker="{title}")
    with pytest.raises(ConfigurationError, match="fields must be a list"):
        PromptTemplate.from_json(json.dumps({"fields": "brand"}))
    with pytest.raises(ConfigurationError, match="sources must map"):
        PromptTemplate.from_json(json.dumps({"sources": ["brand"]}))
    with pytest.raises(ConfigurationError, match="instruction must be text, got 3"):
        PromptTemplate.from_json(json.dumps({"instruction": 3}))
    with pytest.raises(ConfigurationError, match="item_instruction must be text or None, got 3"):
        PromptTemplate.from_json(json.dumps({"item_instruction": 3}))
    with pytest.raises(ConfigurationError, match="one of paper, no_phrase.*got 'papers'"):
        PromptTemplate.from_preset("papers")
    with pytest.raises(ConfigurationError, match="kind must be 'user' or 'item', got 'x'"):
        PRESETS["paper"].instruction_for("x")
