"""Prompt templates: how a history is put into words (paper 3.1.1 and 4.5.2)."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigurationError
from .items import ItemCatalog


@dataclass(frozen=True)
class PromptTemplate:
    """How a history, or a single item, is put into words.

    A prompt is the instruction, then one line an item: the marker, the title, and the attributes in brackets, as in
    `>> 1. TITLE (brand: B, category: C)`. What an item lacks is left out.

    Args:
        name: Name of the template, for reports.
        instruction: First line; "" for none.
        item_instruction: First line of item prompts where it differs; `None` takes `instruction`.
        marker: Start of an item's line; `{number}` is its place in the prompt, from 1.
        fields: Attributes printed, in order; `None` prints brand and category where the catalog has them, else its
            other text columns.
        sources: Where an attribute's text is taken from another column: printed name to column.

    Raises:
        ConfigurationError: A value has the wrong type, or the marker another placeholder than `{number}`.
    """

    name: str = "paper"
    instruction: str = ""
    item_instruction: str | None = None
    marker: str = ">> {number}."
    fields: tuple[str, ...] | None = None
    sources: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for attribute, rule in (("name", ""), ("instruction", ""), ("item_instruction", " or None"), ("marker", "")):
            value = getattr(self, attribute)
            if not isinstance(value, str) and not (rule and value is None):
                raise ConfigurationError(f"{attribute} must be text{rule}, got {value!r}.")
        if self.fields is not None:
            if isinstance(self.fields, str) or not all(isinstance(name, str) for name in self.fields):
                raise ConfigurationError(f"fields must be a list of column names or None, got {self.fields!r}.")
            object.__setattr__(self, "fields", tuple(self.fields))
        texts = [*self.sources, *self.sources.values()] if isinstance(self.sources, Mapping) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise ConfigurationError(f"sources must map printed names to columns, got {self.sources!r}.")
        object.__setattr__(self, "sources", dict(self.sources))
        try:
            self.marker.format(number=1)
        except (KeyError, IndexError, ValueError) as error:
            raise ConfigurationError(
                f"marker may only hold the placeholder {{number}}, got {self.marker!r}."
            ) from error

    def instruction_for(self, kind: str) -> str:
        """Return the first line of prompts of a kind, `user` or `item`; a ConfigurationError names any other kind."""
        if kind not in ("user", "item"):
            raise ConfigurationError(f"kind must be 'user' or 'item', got {kind!r}.")
        return self.instruction if kind == "user" or self.item_instruction is None else self.item_instruction

    def fields_for(self, items: ItemCatalog) -> tuple[str, ...]:
        """Return the attributes printed for the items of a catalog, in order."""
        if self.fields is not None:
            return self.fields
        preferred = tuple(name for name in ("brand", "category") if name in items.text_columns)
        return preferred or items.text_columns

    def head(self, number: int, first: bool = False) -> str:
        """Return what stands before an item's title: the marker, behind a line break unless it opens the prompt."""
        return ("" if first else "\n") + self.marker.format(number=number)

    def body(self, attributes: Mapping[str, str], fields: Sequence[str]) -> str:
        """Return an item's title and, of its attributes, the fields printed, each with the space before it."""
        title = attributes.get("title", "")
        printed = ((name, attributes.get(self.sources.get(name, name), "")) for name in fields)
        listed = ", ".join(f"{name}: {value}" for name, value in printed if value)
        return (f" {title}" if title else "") + (f" ({listed})" if listed else "")

    def to_dict(self) -> dict[str, Any]:
        """Return the template as JSON values."""
        return json.loads(self.to_json())

    def to_json(self) -> str:
        """Return the template as JSON text."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, indent=2)

    @classmethod
    def from_json(cls, text: str) -> "PromptTemplate":
        """Read a template from JSON text; what is left out has its default, what is wrong a ConfigurationError."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigurationError(f"A template must be JSON; reading it failed: {error}.") from error
        if not isinstance(values, dict):
            raise ConfigurationError(f"A template must be a JSON object, got {text[:60]!r}.")
        known = [entry.name for entry in dataclasses.fields(cls)]
        unknown = sorted(values.keys() - set(known))
        if unknown:
            raise ConfigurationError(f"A template has the keys {', '.join(known)}; got unknown {', '.join(unknown)}.")
        return cls(**values)

    @classmethod
    def from_preset(cls, name: str) -> "PromptTemplate":
        """Return a preset by its name; a ConfigurationError lists the presets where there is none of that name."""
        if name not in PRESETS:
            raise ConfigurationError(f"template must be one of {', '.join(PRESETS)}, got {name!r}.")
        return PRESETS[name]


_PAPER = (
    "You are an intelligent recommendation assistant. Please summarize the user's characteristics into a single token "
    "based on the browsing history. In chronological order, the user has browsed the following items:"
)

#: The template of the paper, its three variants (4.5.2, Table 6), and the one of the authors' released data.
PRESETS: dict[str, PromptTemplate] = {
    template.name: template
    for template in (
        PromptTemplate("paper", _PAPER),
        PromptTemplate("no_phrase", _PAPER.replace(" into a single token", "")),
        PromptTemplate("no_instruction"),
        PromptTemplate(
            "two_instructions",
            _PAPER,
            item_instruction=(
                "You are an intelligent recommendation assistant. Please summarize the item characteristics into a "
                "single token:"
            ),
        ),
        PromptTemplate(
            "released",
            "You are an intelligent recommendation assistant. Please summarize my characteristics with a single token "
            "based on my browsing history. In chronological order, I have browsed the following items:",
            marker=">>{number}.",
            fields=("brand", "category"),
            sources={"category": "brand"},
        ),
    )
}
