"""What a prompt of candidates says, and what is cut."""

from collections.abc import Callable

import pytest
from bench.candidates import LETTERS, CandidatePrompts
from bench.candidates.prompts import normalised
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_bituning.data import ItemCatalog
from peft_bituning.errors import ConfigurationError, ContextLengthError, UnknownItemError

LETTERED = """A user took these items, from the oldest to the newest:
1. thing 3 of 9
2. thing 1 of 1
The next item is one of these:
A. thing 9 of 81
B. thing 0 of 0
C. thing 2 of 4
Letter of the next item:"""
TITLED = LETTERED.replace("A. ", "- ").replace("B. ", "- ").replace("C. ", "- ").replace("Letter of", "Title of")


@pytest.mark.parametrize(("kind", "text"), [("letters", LETTERED), ("titles", TITLED)])
def test_the_text(kind: str, text: str, make_prompts: Callable[..., CandidatePrompts]) -> None:
    prompts = make_prompts(kind)
    assert prompts.tokenizer.decode(prompts.prompt([3, 1], [9, 0, 2])) == text
    assert prompts.tokenizer.decode(prompts.title(9)) == " thing 9 of 81"
    assert prompts.names[9] == "thing 9 of 81" and prompts.titles_cut == 0
    newest = make_prompts(kind, max_items=1)
    assert newest.prompt([3, 1], [9]) == prompts.prompt([1], [9])


def test_the_oldest_go_first_and_no_candidate(make_prompts: Callable[..., CandidatePrompts]) -> None:
    whole, candidates = make_prompts(), [9, 8, 7, 6]
    for max_length in range(170, 330, 13):
        prompts = make_prompts(max_length=max_length)
        tokens = prompts.prompt([0, 1, 2, 3, 4, 5], candidates)
        assert len(tokens) + prompts.longest_title + 1 <= max_length
        if prompts.titles_cut:
            continue
        kept = next(n for n in range(7) if whole.prompt([0, 1, 2, 3, 4, 5][6 - n :], candidates) == tokens)
        assert 1 <= kept <= 6
        assert (kept < 6) == (prompts.counts["histories_shortened"] == 1)
        more = len(whole.prompt([0, 1, 2, 3, 4, 5][5 - kept :], candidates)) if kept < 6 else 10**6
        assert more + prompts.longest_title + 1 > max_length


def test_it_always_fits(make_prompts: Callable[..., CandidatePrompts]) -> None:
    """Titles of any length: all candidates, one item of the history and the answer find room."""
    tokenizer = make_prompts().tokenizer

    @settings(deadline=None, max_examples=25)
    @given(lengths=st.lists(st.integers(1, 60), min_size=4, max_size=4), max_length=st.integers(150, 400))
    def check(lengths: list[int], max_length: int) -> None:
        items = ItemCatalog.from_records({"item_id": str(n), "title": "x" * length} for n, length in enumerate(lengths))
        prompts = CandidatePrompts(LETTERS, tokenizer, items, 4, max_length)
        tokens = prompts.prompt([0, 1, 2, 3], [3, 1, 2, 0])
        assert len(tokens) + prompts.longest_title + 1 <= max_length
        whole = [len(prompts.following(" " + "x" * length)) for length in lengths]
        shown = [len(prompts.title(item)) for item in range(4)]
        assert prompts.titles_cut == sum(a < b for a, b in zip(shown, whole, strict=True))
        assert min(shown) > 0

    check()


def test_titles_are_cut(make_prompts: Callable[..., CandidatePrompts]) -> None:
    items = ItemCatalog.from_records([{"item_id": "i0", "title": "abcdefghij"}, {"item_id": "i1"}])
    marker = len(make_prompts(items=items).following("\nA."))
    prompts = make_prompts(items=items, max_item_tokens=marker + 4)
    assert prompts.names == ["abc", "i1"] and prompts.longest_title == 4 and prompts.titles_cut == 1
    text = prompts.tokenizer.decode(prompts.prompt([0], [1, 0]))
    assert "\n1. abc\n" in text and "\nA. i1\nB. abc\n" in text
    with pytest.raises(ContextLengthError, match=f"beside the {marker} tokens of its marker, got {marker}"):
        make_prompts(items=items, max_item_tokens=marker)
    with pytest.raises(ContextLengthError, match="max_length must leave room for 6 titles beside .* got 100"):
        make_prompts(max_length=100)
    with pytest.raises(ConfigurationError, match="num_candidates must be at most 26, got 27"):
        make_prompts(size=27)
    assert len(make_prompts("titles", size=27)._markers) == 27
    with pytest.raises(UnknownItemError):
        prompts.prompt([0], [2])


def test_normalised() -> None:
    assert normalised(' "Blade  Runner\t(1982)" ') == normalised("blade runner (1982)") == "blade runner (1982)"
    assert normalised("\ufb01lm \u2167") == "film viii"
    assert normalised("Alien") != normalised("Aliens")
