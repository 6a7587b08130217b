"""Prompts that show a history and the candidates for what comes next."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from peft_bituning.data.items import ItemCatalog
from peft_bituning.data.prompts import PromptEncoder
from peft_bituning.data.templates import PromptTemplate
from peft_bituning.errors import ConfigurationError, ContextLengthError

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class ChoiceTemplate:
    """How a choice between candidates is put into words: one title a line, the history numbered."""

    name: str  # for reports
    instruction: str  # first line, before the history
    question: str  # the line before the candidates
    marker: str  # start of a candidate's line; `{letter}` is its letter, from A
    ending: str  # the last line, which the answer completes


LETTERS = ChoiceTemplate(
    "letters",
    "A user took these items, from the oldest to the newest:",
    "The next item is one of these:",
    "{letter}.",
    "Letter of the next item:",
)
TITLES = ChoiceTemplate(
    "titles",
    "A user took these items, from the oldest to the newest:",
    "The next item is one of these:",
    "-",
    "Title of the next item:",
)


class CandidatePrompts(PromptEncoder):
    """Turns histories and candidates into token ids.

    An item is its title, or its id where it has none. A prompt that is too long loses the oldest items of the history
    and never a candidate; where the longest titles of the catalog could leave no room for a history of one item, all
    lines are cut to what always fits.

    Args:
        choice: the template.
        tokenizer: tokenizer of the base model.
        items: the catalog.
        num_candidates: candidates a prompt at most.
        max_length: longest prompt with its answer, tokens.
        max_items: most items of a history; None is no limit.
        max_item_tokens: most tokens of one item's line, its marker among them; None is no limit.

    Raises:
        ConfigurationError: more candidates than letters where the template shows letters, or a limit below 1.
        ContextLengthError: `max_length` leaves no room for a title.
    """

    def __init__(
        self,
        choice: ChoiceTemplate,
        tokenizer: PreTrainedTokenizerBase,
        items: ItemCatalog,
        num_candidates: int,
        max_length: int,
        max_items: int | None = None,
        max_item_tokens: int | None = None,
    ) -> None:
        if "{letter}" in choice.marker and num_candidates > len(ALPHABET):
            raise ConfigurationError(f"num_candidates must be at most {len(ALPHABET)}, got {num_candidates!r}")
        template = PromptTemplate(choice.name, choice.instruction, marker="{number}.", fields=())
        # Titles are cut here, the same in the history and among the candidates, and not by the line.
        super().__init__(template, tokenizer, items, max_length, max_items, None)
        self.choice = choice
        self._question = self._piece("\n" + choice.question)
        self._ending = self._piece("\n" + choice.ending)
        self._markers = [
            self._piece("\n" + choice.marker.format(letter=ALPHABET[place % len(ALPHABET)]))
            for place in range(num_candidates)
        ]
        self.title_tokens = self._title_limit(num_candidates, max_length, max_item_tokens)
        self._bodies.clear()
        self.longest_title = self._longest_title()  # tokens
        self._room = max_length - self.longest_title - 1  # the answer, and what ends it

    def prompt(self, history: Sequence[int], candidates: Sequence[int]) -> list[int]:
        """Return the token ids of a prompt, up to where the answer begins.

        Args:
            history: catalog indices in time order.
            candidates: catalog indices in the order in which they are shown.

        Returns:
            Token ids; with the longest answer at most `max_length`.
        """
        tail = list(self._question)
        for marker, item in zip(self._markers, candidates, strict=False):
            tail += marker + self.title(item)
        tail += self._ending
        tokens = list(self._opening("user"))
        kept = [self._checked(item) for item in history]
        if self.max_items is not None:
            kept = kept[-self.max_items :]
        if kept:
            room = self._room - len(tokens) - len(tail)
            kept = kept[len(kept) - self._number_fitting(kept, room, False) :]
        if len(kept) < len(history):
            self.counts["histories_shortened"] += 1
            self.counts["items_dropped"] += len(history) - len(kept)
        for number, item in enumerate(kept, start=1):
            tokens += self._line(item, number, False)[0]
        return tokens + tail

    def title(self, item: int) -> list[int]:
        """Return the tokens of a title as prompts show it, its leading blank among them."""
        return self._body(self._checked(item))

    @cached_property
    def names(self) -> list[str]:
        """What every item is told apart by [I]: its title as it is shown, normalised."""
        titles = [self.title(item) for item in range(len(self.items))]
        return [normalised(text) for text in self.tokenizer.batch_decode(titles)]

    @cached_property
    def titles_cut(self) -> int:
        """Number of items whose titles are shown in part."""
        limit = self.title_tokens
        whole = (len(self._piece(self._text(item))) for item in range(len(self.items)))
        return 0 if limit is None else sum(length > limit for length in whole)

    def following(self, text: str) -> list[int]:
        """Tokenise a text as it stands after a prompt."""
        return self._piece(text)

    def _title_limit(self, num_candidates: int, max_length: int, max_item_tokens: int | None) -> int | None:
        """Return the most tokens of a title: the limit of lines, or what leaves room for one item of the history."""
        markers = [*self._markers, self._head(1, False)]
        limit = None
        if max_item_tokens is not None:
            limit = max_item_tokens - max(map(len, markers))
            if limit < 1:
                raise ContextLengthError(
                    f"max_item_tokens must leave room for a title beside the {max_item_tokens - limit} tokens of its "
                    f"marker, got {max_item_tokens}"
                )
        fixed = len(self._opening("user")) + len(self._question) + len(self._ending) + sum(map(len, markers)) + 1
        titles = num_candidates + 2  # and those of one item of the history, and of the answer
        fitting = (max_length - fixed) // titles
        if fitting < 1:
            raise ContextLengthError(
                f"max_length must leave room for {titles} titles beside {fixed} tokens, got {max_length}; raise it or "
                "take fewer candidates"
            )
        self.title_tokens = limit
        return fitting if fitting < self._longest_title() else limit

    def _longest_title(self) -> int:
        return max(len(self.title(item)) for item in range(len(self.items)))

    def _text(self, item: int) -> str:
        return f" {self.items.attributes[item].get('title') or self.items.item_ids[item]}"

    def _body(self, item: int) -> list[int]:
        """Take the title alone, or the id: a candidate must be called something."""
        if item not in self._bodies:
            self._bodies[item] = self._piece(self._text(item))[: self.title_tokens]
        return self._bodies[item]


def normalised(text: str) -> str:
    """Return a text as answers are compared: Unicode NFKC, lower case, blanks as one, quotes around it gone."""
    text = re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text)).strip()
    return text.strip("\"'").strip().casefold()
