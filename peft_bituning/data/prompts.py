"""Prompts as token ids, cut at whole items to fit a context."""

import sys
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from ..errors import ConfigurationError, ContextLengthError, UnknownItemError
from .items import ItemCatalog
from .templates import PromptTemplate

# A piece is tokenised behind this letter, which is then taken off: tokenizers that put a blank before the start of
# every text (SentencePiece) would else put one before every piece.
_ANCHOR = "a"

_Line = tuple[list[int], bool]  # the tokens of an item's line, and whether its text was cut


class PromptEncoder:
    """Turns histories into token ids through a template.

    A prompt is tokenised in pieces (instruction, each item's marker, each item's text), so that items are cached and
    a prompt that is too long loses whole items: the oldest go first, the instruction never. Only an item that does
    not fit alone is cut. No end-of-text token is appended, even if the tokenizer would; what it puts before a text
    (BOS) is kept. Special tokens spelled out in an item's text are tokenised as plain text where the tokenizer can.

    Args:
        template: The template.
        tokenizer: Tokenizer of the base model.
        items: The catalog.
        max_length: Longest prompt in tokens, T; the caller takes off the prefix and the suffix. `None` is no limit.
        max_items: Most items in a prompt; `None` is no limit.
        max_item_tokens: Most tokens of one item's line; `None` is no limit.

    Raises:
        ConfigurationError: A limit is below 1.
    """

    def __init__(
        self,
        template: PromptTemplate,
        tokenizer: PreTrainedTokenizerBase,
        items: ItemCatalog,
        max_length: int | None = None,
        max_items: int | None = None,
        max_item_tokens: int | None = None,
    ) -> None:
        for name, limit in (("max_length", max_length), ("max_items", max_items), ("max_item_tokens", max_item_tokens)):
            if limit is not None and limit < 1:
                raise ConfigurationError(f"{name} must be at least 1 or None, got {limit!r}.")
        self.template = template
        self.tokenizer = tokenizer
        self.items = items
        self.max_length = max_length
        self.max_items = max_items
        self.max_item_tokens = max_item_tokens
        self.fields = template.fields_for(items)
        self.counts = {"histories_shortened": 0, "items_dropped": 0, "items_cut": 0}
        self._anchor = self._tokens(_ANCHOR)
        self._bodies: dict[int, list[int]] = {}
        self._heads: dict[tuple[int, bool], list[int]] = {}
        self._openings: dict[str, list[int]] = {}

    def reset_counts(self) -> None:
        """Set the counts of prompts that lost items, of the items lost, and of item lines that were cut to zero.

        All count calls of `encode`, so that a history encoded twice counts twice.
        """
        self.counts.update(dict.fromkeys(self.counts, 0))

    def text(self, history: Sequence[int], kind: str = "user") -> str:
        """Return the text of a prompt, before any cutting; the arguments are those of `encode`."""
        instruction = self.template.instruction_for(kind)
        lines = [
            self.template.head(number, first=number == 1 and not instruction)
            + self.template.body(self.items.attributes[self._checked(item)], self.fields)
            for number, item in enumerate(history, start=1)
        ]
        return instruction + "".join(lines)

    def encode(self, history: Sequence[int], kind: str = "user") -> list[int]:
        """Return the token ids of a prompt [T]: what the tokenizer puts first, instruction, newest items that fit.

        Args:
            history: Catalog indices in time order; empty for a cold start (instruction only). Items are numbered
                from 1 after the oldest were dropped.
            kind: `user` or `item`, which may have different instructions.

        Raises:
            ContextLengthError: The instruction, or it and the start of one item, does not fit.
            UnknownItemError: An index is outside the catalog.
        """
        opening, lines = self._fitted(history, kind)
        tokens = list(opening)
        for line, is_cut in lines:
            tokens += line
            self.counts["items_cut"] += is_cut
        self.counts["histories_shortened"] += len(lines) < len(history)
        self.counts["items_dropped"] += len(history) - len(lines)
        return tokens

    def length(self, history: Sequence[int], kind: str = "user") -> int:
        """Return the number of tokens that `encode` gives, without counting; it raises what `encode` does."""
        opening, lines = self._fitted(history, kind)
        return len(opening) + sum(len(line) for line, _ in lines)

    def over(self, items: ItemCatalog) -> "PromptEncoder":
        """Return an encoder of the same settings over another catalog, with neither tokens nor counts of this one."""
        return PromptEncoder(
            self.template, self.tokenizer, items, self.max_length, self.max_items, self.max_item_tokens
        )

    def twins(self) -> list[list[int]]:
        """Return the groups of items whose prompts are identical, also by cutting, and so cannot be told apart."""
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for item in range(len(self.items)):
            _, [(line, _)] = self._fitted([item], "item")
            groups[tuple(line)].append(item)
        return [group for group in groups.values() if len(group) > 1]

    @cached_property
    def twin_count(self) -> int:
        """Number of items that share their prompt with another one."""
        return sum(map(len, self.twins()))

    def _fitted(self, history: Sequence[int], kind: str) -> tuple[list[int], list[_Line]]:
        """Return the opening's tokens, and the lines of the newest items that fit, the last one at least."""
        opening = self._opening(kind)
        room = (self.max_length or sys.maxsize) - len(opening)
        if room < 0:
            raise ContextLengthError(
                f"The instruction alone takes {len(opening)} tokens, {-room} more than max_length={self.max_length}. "
                "Raise max_length or shorten the instruction of the template."
            )
        items = [self._checked(item) for item in history]
        if self.max_items is not None:
            items = items[-self.max_items :]
        is_bare = not self.template.instruction_for(kind)
        kept = items[-self._number_fitting(items, room, is_bare) :]
        limit = room if len(kept) == 1 else sys.maxsize
        return opening, [self._line(item, place, is_bare, limit) for place, item in enumerate(kept, start=1)]

    def _number_fitting(self, items: Sequence[int], room: int, is_bare: bool) -> int:
        """Return how many of the newest items fit, at least one; numbers are those after dropping."""
        # Markers do not get longer for smaller numbers, so counting with the first one gives an upper bound.
        number, total = 0, 0
        for item in reversed(items):
            total += len(self._line(item, 1, is_bare)[0])
            if total > room:
                break
            number += 1
        while number > 1:
            lines = [self._line(item, place, is_bare)[0] for place, item in enumerate(items[-number:], start=1)]
            if sum(map(len, lines)) <= room:
                break
            number -= 1
        return max(number, 1)

    def _line(self, item: int, number: int, is_bare: bool, room: int = sys.maxsize) -> _Line:
        """Return the tokens of an item's line, cut to the limits; a bare prompt begins with its first item."""
        head = self._head(number, is_bare and number == 1)
        line = head + self._body(item)
        limit = min(self.max_item_tokens or sys.maxsize, room)
        if len(head) >= limit < len(line):
            raise ContextLengthError(
                f"{limit} tokens are left for an item, but its marker {self.template.head(number)!r} takes {len(head)} "
                f"and its text {len(line) - len(head)}. Raise max_length or max_item_tokens by "
                f"{len(head) + 1 - limit} at least."
            )
        return line[:limit], limit < len(line)

    def _opening(self, kind: str) -> list[int]:
        if kind not in self._openings:
            self._openings[kind] = self._leading_tokens() + self._tokens(self.template.instruction_for(kind))
        return self._openings[kind]

    def _head(self, number: int, first: bool) -> list[int]:
        if (number, first) not in self._heads:
            text = self.template.head(number, first)
            self._heads[number, first] = self._tokens(text) if first else self._piece(text)
        return self._heads[number, first]

    def _body(self, item: int) -> list[int]:
        if item not in self._bodies:
            self._bodies[item] = self._piece(self.template.body(self.items.attributes[item], self.fields))
        return self._bodies[item]

    def _piece(self, text: str) -> list[int]:
        """Tokenise a text as it stands inside another one."""
        tokens = self._tokens(_ANCHOR + text)
        length = len(self._anchor)
        return tokens[length:] if tokens[:length] == self._anchor else self._tokens(text)

    def _tokens(self, text: str) -> list[int]:
        if not text:
            return []
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def _leading_tokens(self) -> list[int]:
        """What the tokenizer itself puts before a text: a BOS token, or nothing."""
        tokens = list(self.tokenizer(_ANCHOR)["input_ids"])
        for start in range(len(tokens) - len(self._anchor) + 1):
            if tokens[start : start + len(self._anchor)] == self._anchor:
                return tokens[:start]
        return []

    def _checked(self, item: int) -> int:
        if not 0 <= item < len(self.items):
            raise UnknownItemError(
                f"Item index {item} is outside the catalog of {len(self.items)} items (0 to {len(self.items) - 1})."
            )
        return int(item)
