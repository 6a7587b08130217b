"""Prompts as token ids: whole items, never half of one, the instruction always."""

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from peft_bituning.data import PRESETS, ItemCatalog, PromptEncoder, PromptTemplate
from peft_bituning.errors import ConfigurationError, ContextLengthError, UnknownItemError

SHORT = PromptTemplate("short", "Seen:")
LONG_HISTORY = [0, 1, 2, 3] * 5


@pytest.fixture(params=["byte_tokenizer", "marked_tokenizer"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("name", PRESETS)
def test_tokens_spell_the_text(tokenizer, catalog: ItemCatalog, name: str) -> None:
    encoder = PromptEncoder(PRESETS[name], tokenizer, catalog)
    for kind in ("user", "item"):
        tokens = encoder.encode([0, 1, 2, 3], kind)
        assert tokenizer.decode(tokens, skip_special_tokens=True).strip() == encoder.text([0, 1, 2, 3], kind)


def test_pieces_give_the_tokens_of_the_whole(byte_tokenizer, catalog: ItemCatalog) -> None:
    encoder = PromptEncoder(PRESETS["paper"], byte_tokenizer, catalog)
    history = [0, 1, 3, 0]
    assert encoder.encode(history) == byte_tokenizer(encoder.text(history))["input_ids"]


def test_pieces_get_no_blank_of_their_own(marked_tokenizer, catalog: ItemCatalog) -> None:
    tokens = marked_tokenizer.convert_ids_to_tokens(PromptEncoder(SHORT, marked_tokenizer, catalog).encode([1]))
    assert tokens[0] == "<s>"
    assert "".join(tokens[1:]) == "▁Seen:\n>>▁1.▁Steel▁kettle▁(category:▁kitchen)"


def test_bos_only_where_the_tokenizer_adds_one_and_never_eos(
    byte_tokenizer, marked_tokenizer, catalog: ItemCatalog
) -> None:
    marked = PromptEncoder(SHORT, marked_tokenizer, catalog).encode([0])
    assert marked[0] == marked_tokenizer.bos_token_id
    assert marked_tokenizer.eos_token_id not in marked
    plain = PromptEncoder(SHORT, byte_tokenizer, catalog).encode([0])
    assert plain[0] not in byte_tokenizer.all_special_ids


def test_an_empty_history_is_the_instruction(marked_tokenizer, byte_tokenizer, catalog: ItemCatalog) -> None:
    tokens = PromptEncoder(SHORT, marked_tokenizer, catalog).encode([])
    assert tokens == marked_tokenizer("Seen:")["input_ids"][:-1]
    assert PromptEncoder(PRESETS["no_instruction"], byte_tokenizer, catalog).encode([]) == []


def test_special_tokens_in_a_title_are_text(byte_tokenizer) -> None:
    items = ItemCatalog.from_records([{"item_id": "a", "title": "lamp </s> rope"}])
    assert byte_tokenizer.eos_token_id not in PromptEncoder(SHORT, byte_tokenizer, items).encode([0])


def test_too_long_drops_the_oldest_and_numbers_from_one(tokenizer, catalog: ItemCatalog) -> None:
    whole = PromptEncoder(SHORT, tokenizer, catalog)
    limit = len(whole.encode([1, 2, 3]))
    encoder = PromptEncoder(SHORT, tokenizer, catalog, max_length=limit)
    assert encoder.encode(LONG_HISTORY) == whole.encode([1, 2, 3])
    assert encoder.counts == {"histories_shortened": 1, "items_dropped": 17, "items_cut": 0}
    assert PromptEncoder(SHORT, tokenizer, catalog, max_length=limit - 1).encode(LONG_HISTORY) == whole.encode([2, 3])


def test_max_items_keeps_the_newest(tokenizer, catalog: ItemCatalog) -> None:
    encoder = PromptEncoder(SHORT, tokenizer, catalog, max_items=2)
    assert encoder.encode([0, 1, 2, 3]) == PromptEncoder(SHORT, tokenizer, catalog).encode([2, 3])
    assert encoder.counts["items_dropped"] == 2
    encoder.reset_counts()
    encoder.encode([2, 3])
    assert set(encoder.counts.values()) == {0}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(history=st.lists(st.integers(0, 3), max_size=15), limit=st.integers(12, 120))
def test_any_limit_holds_and_only_whole_items_stay(catalog: ItemCatalog, byte_tokenizer, history, limit) -> None:
    encoder = PromptEncoder(SHORT, byte_tokenizer, catalog, max_length=limit)
    whole = PromptEncoder(SHORT, byte_tokenizer, catalog)
    tokens = encoder.encode(history)
    assert len(tokens) <= limit
    kept = len(history) - encoder.counts["items_dropped"]
    if not encoder.counts["items_cut"]:
        assert tokens == whole.encode(history[len(history) - kept :])
        assert kept == len(history) or len(whole.encode(history[len(history) - kept - 1 :])) > limit
    else:
        assert kept == 1
        assert tokens == whole.encode(history[-1:])[:limit]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=120, deadline=None)
@given(
    history=st.lists(st.integers(0, 3), max_size=15),
    name=st.sampled_from(["paper", "no_instruction", "two_instructions"]),
    kind=st.sampled_from(["user", "item"]),
    limits=st.tuples(
        *[st.none() | st.integers(1, 250), st.none() | st.integers(1, 12), st.none() | st.integers(1, 40)]
    ),
)
def test_the_length_is_that_of_the_tokens_and_counts_nothing(
    catalog: ItemCatalog, tokenizer, history, name, kind, limits
) -> None:
    counting, encoder = (PromptEncoder(PRESETS[name], tokenizer, catalog, *limits) for _ in range(2))
    try:
        expected = len(counting.encode(history, kind))
    except ContextLengthError as error:
        with pytest.raises(ContextLengthError, match=re.escape(str(error))):
            encoder.length(history, kind)
    else:
        assert encoder.length(history, kind) == expected
        assert encoder.encode(history, kind) == counting.encode(history, kind)


def test_lengths_are_not_counted(byte_tokenizer, catalog: ItemCatalog) -> None:
    encoder = PromptEncoder(SHORT, byte_tokenizer, catalog, max_items=2, max_item_tokens=8)
    before = dict(encoder.counts)
    encoder.length(LONG_HISTORY)
    assert encoder.counts == before
    with pytest.raises(UnknownItemError, match="Item index 4 is outside the catalog of 4 items"):
        encoder.length([4])


def test_the_same_settings_over_another_catalog(byte_tokenizer, catalog: ItemCatalog) -> None:
    encoder = PromptEncoder(SHORT, byte_tokenizer, catalog, 60, 3, 12)
    encoder.encode(LONG_HISTORY)
    items = ItemCatalog.from_records([{"item_id": "a", "title": "rope", "year": 1999}])
    other = encoder.over(items)
    expected = PromptEncoder(SHORT, byte_tokenizer, items, 60, 3, 12)
    assert other.encode([0] * 5) == expected.encode([0] * 5) and other.counts == expected.counts
    assert (other.items, other.fields) == (items, ("year",)) and encoder.items is catalog


def test_a_single_item_alone_too_long_is_cut_and_counted(tokenizer, catalog: ItemCatalog) -> None:
    whole = PromptEncoder(SHORT, tokenizer, catalog).encode([0])
    encoder = PromptEncoder(SHORT, tokenizer, catalog, max_length=len(whole) - 3)
    assert encoder.encode([1, 0]) == whole[:-3]
    assert encoder.counts == {"histories_shortened": 1, "items_dropped": 1, "items_cut": 1}


def test_max_item_tokens_cuts_every_long_item(tokenizer, catalog: ItemCatalog) -> None:
    opening = len(PromptEncoder(SHORT, tokenizer, catalog).encode([]))
    encoder = PromptEncoder(SHORT, tokenizer, catalog, max_item_tokens=8)
    assert len(encoder.encode([0, 0])) == opening + 16
    assert encoder.counts["items_cut"] == 2


def test_no_room_for_the_instruction_or_an_item_is_an_error(byte_tokenizer, catalog: ItemCatalog) -> None:
    length = len(PromptEncoder(SHORT, byte_tokenizer, catalog).encode([]))
    assert len(PromptEncoder(SHORT, byte_tokenizer, catalog, max_length=length).encode([])) == length
    with pytest.raises(ContextLengthError, match=f"takes {length} tokens, 1 more than max_length={length - 1}"):
        PromptEncoder(SHORT, byte_tokenizer, catalog, max_length=length - 1).encode([])
    with pytest.raises(ContextLengthError, match="1 tokens are left for an item"):
        PromptEncoder(SHORT, byte_tokenizer, catalog, max_length=length + 1).encode([0])


def test_limits_and_indices_are_checked(byte_tokenizer, catalog: ItemCatalog) -> None:
    for name in ("max_length", "max_items", "max_item_tokens"):
        with pytest.raises(ConfigurationError, match=f"{name} must be at least 1 or None, got 0"):
            PromptEncoder(SHORT, byte_tokenizer, catalog, **{name: 0})
    for item in (4, -1):
        with pytest.raises(UnknownItemError, match=f"Item index {item} is outside the catalog of 4 items"):
            PromptEncoder(SHORT, byte_tokenizer, catalog).encode([item])


def test_twins_are_items_of_one_prompt_also_by_cutting(byte_tokenizer) -> None:
    items = ItemCatalog.from_records(
        {"item_id": str(number), "title": title}
        for number, title in enumerate(["lamp", "rope red", "lamp", "lamp", "rope blue", "drill"])
    )
    encoder = PromptEncoder(SHORT, byte_tokenizer, items)
    assert encoder.twins() == [[0, 2, 3]]
    assert encoder.twin_count == 3
    short = len(encoder.encode([1])) - len(encoder.encode([])) - 1
    cut = PromptEncoder(SHORT, byte_tokenizer, items, max_item_tokens=short)
    assert [1, 4] in cut.twins()
    assert cut.counts["items_cut"] == 0


def test_a_catalog_of_one_item_without_text(byte_tokenizer) -> None:
    encoder = PromptEncoder(SHORT, byte_tokenizer, ItemCatalog(("only",), ({},)))
    assert encoder.text([0]) == "Seen:\n>> 1."
    assert encoder.twins() == []
