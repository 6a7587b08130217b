"""The plan of a comparison: a YAML file, checked field by field before any work is done."""

from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_type_hints

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WrapValidator, model_validator
from typing_extensions import TypedDict

from peft_bituning.base_models import BaseModel as LanguageModel
from peft_bituning.base_models import load_base_model
from peft_bituning.data import Interactions, ItemCatalog, load_interactions
from peft_bituning.errors import ConfigurationError
from peft_bituning.training import LaserArguments
from peft_bituning.training.arguments import ID_RECOMMENDERS, PAPER, RENAMED

from .cells import present_names
from .methods import METHODS, TUNERS, Method

# What a method may set for itself; everything else of `training` is the same for all of them.
OWN_TRAINING = (
    "learning_rate",
    "stage2_learning_rate",
    "weight_decay",
    "warmup_ratio",
    "max_collaborative_states",
    "item_collaborative",
    "prefix_text",
    "suffix_text",
)
RESERVED = {"seed", "output_dir", "resume", "overwrite_output_dir"}
#: What a file that does not say it means: the defaults that `LaserArguments` once had, so that an old file is still the
#: same comparison.
DEFAULTS: dict[str, Any] = {
    **PAPER,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-3,
    "stage2_learning_rate": None,
    "save_total_limit": 1,
}


def _known_training(values: Any) -> Any:
    """Take out what this version has no longer, and refuse what is the comparison's own."""
    if not isinstance(values, dict):
        return {} if values is None else values
    if reserved := RESERVED & values.keys():
        raise ValueError(f"must leave {', '.join(sorted(reserved))} to the comparison")
    return present_names(values)


def _training_type() -> Any:
    """A dict of some fields of `LaserArguments`, each of its type; the numbers stay as the file writes them."""
    as_written = WrapValidator(lambda value, check: (check(value), value)[1])  # 1 is no 1.0 in a cell's identity
    hints = {name: hint for name, hint in get_type_hints(LaserArguments).items() if name not in RESERVED}
    written = {name: Annotated[hint, as_written] for name, hint in hints.items()}
    kind = TypedDict("Training", written, total=False)  # type: ignore[misc]
    kind.__pydantic_config__ = ConfigDict(extra="forbid", strict=True)  # type: ignore[attr-defined]
    return Annotated[kind, BeforeValidator(_known_training)]


if TYPE_CHECKING:
    Training = dict[str, Any]
else:
    Training = _training_type()


class Strict(BaseModel):
    """A part of a file: no other names, no other types, never changed."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Source(Strict):
    """What rows with `source: true` are trained on first."""

    dataset: str  # as `load_interactions` takes it
    max_users: int | None = Field(default=None, ge=1)  # a seeded cut of so many users; None is all

    def load(self) -> Interactions:
        """Read the histories; the items of a cut are its users' alone, as nobody is ranked on the rest."""
        data = load_interactions(self.dataset)
        if self.max_users is None:
            return data
        data = data.sample_users(self.max_users, 0)
        kept = sorted({item for history in data.histories for item in history})
        place = {item: number for number, item in enumerate(kept)}
        ids, attributes = data.items.item_ids, data.items.attributes
        items = ItemCatalog(tuple(ids[item] for item in kept), tuple(attributes[item] for item in kept))
        histories = tuple(tuple(place[item] for item in history) for history in data.histories)
        return replace(data, items=items, histories=histories)


class ColdStart(Strict):
    """Which test users are shown apart from the others."""

    user_events: int = Field(ge=0)  # those with at most so many training events
    item_events: int = Field(ge=0)  # those whose target occurs in training at most so often


class Row(Strict):
    """A row of the table."""

    method: str  # its name among `METHODS`
    training: Training = {}  # what it has for itself
    train_fraction: float = Field(default=1.0, ge=0, le=1)  # the share of the users to train on
    source: bool = False  # start from the weights that were trained on the source
    over: str | None = None  # the row whose LoRA to train over
    line: str | None = None  # its line in a picture over the shares
    settings: dict[str, Any] = {}  # everything else that the file says of it, which is the method's own

    @classmethod
    def sorted_out(cls, label: str, values: Any) -> Any:
        """Tell a row's own fields from its method's settings; what is no row stays for the check to refuse."""
        values = {} if values is None else values
        if not isinstance(values, dict):
            return values
        own = cls.model_fields.keys() - {"settings"}
        known = {name: value for name, value in values.items() if name in own}
        settings = {name: value for name, value in values.items() if name not in own}
        return {"method": label, **known, "settings": settings}


def _rows(values: Any) -> Any:
    if not isinstance(values, dict) or not values:
        raise ValueError(f"must be rows by name, got {values!r}; known: {', '.join(METHODS)}")
    return {label: Row.sorted_out(label, row) for label, row in values.items()}


def _present(names: Any) -> Any:
    return [RENAMED.get(name, name) for name in names] if isinstance(names, list) else names


def _different(values: list[int]) -> list[int]:
    if not values or len(set(values)) != len(values):
        raise ValueError(f"must be different numbers, at least one, got {values!r}")
    return values


class Plan(Strict):
    """A configuration file; its fields are the file's names, but for `name`."""

    name: str = "compare"  # of the table's files; the configuration file's own
    # rows of the table, in the file each None or `{method, training: {...}, ...}` with its method's settings beside
    methods: Annotated[dict[str, Row], BeforeValidator(_rows)]
    question: str | None = None  # what the table is to answer, printed above it
    # fields of `training` that the question is about: rows may set them for themselves
    varies: Annotated[list[str], BeforeValidator(_present)] = []
    # what the Laser paper prints for rows of this table, Recall@10, NDCG@10 and MRR by row
    paper: dict[str, list[float]] = {}
    validation: bool = False  # show what the kept weights reached on validation as well
    cold_start: ColdStart | None = None  # show users with few events, and rare targets, apart from the others
    dataset: str = "ml-100k"  # as `load_interactions` takes it
    max_users: int | None = Field(default=None, ge=1)  # a seeded cut of so many users; None is all
    source: Source | None = None
    model: str = "smollm2-135m"  # the language model of all methods that use one: Hub id, folder or alias
    model_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attn_implementation: str | None = None  # passed to transformers
    output_dir: str = "output/compare"  # folder of cells and table
    # one cell per method and seed; methods without chance take the first
    seeds: Annotated[list[int], BeforeValidator(_different)] = [0]
    training: Training = {}  # the same for all methods
    baseline: str | None = None  # the row that others are compared with; None is the best by NDCG@10 that is not ours
    published: bool = False  # show published results of rivals that are not run, from another split

    @classmethod
    def of(cls, values: dict[str, Any], path: Path) -> Self:
        """Check what a file holds.

        Raises:
            ConfigurationError: a field is unknown, of another type, out of range, or does not fit another one.
        """
        if "name" in values:
            raise ConfigurationError(f"{path.name} must hold {_known([])}, got name")
        try:
            return cls.model_validate({**values, "name": path.stem})
        except ValidationError as error:
            raise ConfigurationError(_sentence(error, path.name)) from None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        """Hold the fields against each other."""
        if self.baseline is not None and self.baseline not in self.methods:
            raise ConfigurationError(f"baseline must be one of the methods, got {self.baseline!r}")
        if reserved := RESERVED & set(self.varies):
            raise ConfigurationError(f"varies must leave {', '.join(sorted(reserved))} to the comparison")
        if foreign := sorted(set(self.varies) - {each.name for each in fields(LaserArguments)}):
            raise ConfigurationError(f"varies must be fields of LaserArguments, got {', '.join(foreign)}")
        for label, numbers in self.paper.items():
            if label not in self.methods or len(numbers) != 3:
                raise ConfigurationError(
                    f"paper must hold Recall@10, NDCG@10 and MRR of rows of the file, got {label}: {numbers!r}"
                )
        for label, row in self.methods.items():
            if row.method not in METHODS:
                raise ConfigurationError(
                    f"methods must be among {', '.join(METHODS)}, got {row.method!r}; a row of another name says "
                    "`method: NAME`"
                )
            allowed = [*OWN_TRAINING, *self.varies]
            if foreign := sorted(row.training.keys() - set(allowed)):
                raise ConfigurationError(
                    f"training of {label} must be among {', '.join(allowed)}, got {', '.join(foreign)}; everything "
                    "else is the same for all methods, but for what the file says under `varies`"
                )
            _check_row(self, label, row)
        return self

    def registered(self, label: str) -> Method:
        """Return a row's method."""
        return METHODS[self.methods[label].method]

    def arguments(self, label: str, seed: int, folder: Path) -> LaserArguments:
        """Return the settings of a row's run."""
        values = {**DEFAULTS, **self.training, **self.methods[label].training}
        return LaserArguments(output_dir=str(folder), seed=seed, resume=True, **values)

    def load_data(self, of_source: bool = False) -> Interactions:
        """Read the histories, those of the source on demand."""
        if of_source and self.source is not None:
            return self.source.load()
        data = load_interactions(self.dataset)
        return data if self.max_users is None else data.sample_users(self.max_users, 0)

    def load_base(self) -> LanguageModel:
        """Load the language model."""
        dtype: torch.dtype = getattr(torch, self.model_dtype)
        return load_base_model(self.model, dtype, attn_implementation=self.attn_implementation)


def _check_row(plan: Plan, label: str, row: Row) -> None:
    """Refuse a share, a source or a row below that the row's method can do nothing with."""
    method, share, starts, over = plan.registered(label), row.train_fraction, row.source, row.over
    recommender = plan.arguments(label, plan.seeds[0], Path(".")).id_recommender
    refused = {
        f"train_fraction of {label} must be 1 for its method, got {share!r}; leave it out": (
            share < 1 and not method.takes_share
        ),
        f"source of {label} must be left out for its method, which takes on no weights": (
            starts and not method.takes_start
        ),
        f"source must be {{dataset: NAME, max_users: N}} for {label}, which starts from it, got None; say it in the "
        "file, or --source": starts and plan.source is None,
        f"train_fraction of {label} must be > 0 without `source: true`, got {share!r}; nothing would be trained at "
        "all": share == 0 and not starts,
        f"id_recommender of {label} must be {' or '.join(ID_RECOMMENDERS)}, trained on each of the two catalogs, got "
        f"{recommender!r}": starts and recommender not in (*ID_RECOMMENDERS, "none"),
        f"over of {label} must be a row of the file whose method is lora, got {over!r}": (
            over is not None and (over not in plan.methods or plan.methods[over].method != "lora")
        ),
        f"over of {label} must be left out for its method, which tunes no language model": (
            over is not None and row.method not in TUNERS
        ),
        f"over of {label} must stand without source and train_fraction; leave them out": (
            over is not None and (starts or share != 1)
        ),
    }
    for message, holds in refused.items():
        if holds:
            raise ConfigurationError(message)


def _sentence(error: ValidationError, file: str) -> str:
    """Say the first error of a file in our words."""
    first = error.errors()[0]
    place = [each for each in first["loc"] if isinstance(each, str) and each != "[key]"]
    if len(place) > 1 and place[0] == "methods":
        del place[0]
    rule, got = first["msg"].replace("Input should", "must"), f", got {first['input']!r}"
    if first["type"] == "value_error":
        rule, got = str(first["ctx"]["error"]), ""
        if not rule.startswith("must "):
            return rule
    elif first["type"] == "extra_forbidden":
        unknown = place.pop()
        rule, got = f"must hold {_known(place)}", f", got {unknown}"
    elif first["type"] == "missing":
        rule = "must be given"
    elif first["type"] in ("model_type", "dict_type"):
        rule = "must be lines of `name: value`"
    return f"{' of '.join(reversed(place)) or file} {rule}{got}"


def _known(place: list[str]) -> str:
    """List the fields that a part of a file may have."""
    if "training" in place[-1:]:
        return "fields of LaserArguments"
    parts: dict[str, type[Strict]] = {"source": Source, "cold_start": ColdStart}
    if place:
        return ", ".join(parts[place[-1]].model_fields)
    return ", ".join(["based_on", *(name for name in Plan.model_fields if name != "name")])
