"""One method, one seed, one split: what goes into a cell of a comparison, and what comes out."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from peft_bituning.artifacts import weights_hash
from peft_bituning.base_models import BaseModel
from peft_bituning.data import Interactions, LeaveOneOut
from peft_bituning.errors import CheckpointError, ConfigurationError
from peft_bituning.evaluation import RankingReport
from peft_bituning.training.arguments import LaserArguments
from peft_bituning.training.stage_result import Weights

from ..cells import digest

ReportT = TypeVar("ReportT")
_USERS, _ITEMS = "users.", "items."


@dataclass(frozen=True)
class KeptWeights:
    """The trained weights of both sides, as a saved recommender has them."""

    users: Weights  # A', which encodes users
    items: Weights  # A, which encoded the item table that A' speaks to

    def to_tensors(self) -> Weights:
        """Return everything as tensors for one file."""
        named = {f"{_USERS}{name}": value for name, value in self.users.items()}
        named |= {f"{_ITEMS}{name}": value for name, value in self.items.items()}
        return {name: value.contiguous() for name, value in named.items()}

    @classmethod
    def from_tensors(cls, tensors: Weights) -> "KeptWeights":
        """Take apart what `to_tensors` returned; raise `CheckpointError` where one of the sides is not there."""
        sides = [
            {name.removeprefix(side): value for name, value in tensors.items() if name.startswith(side)}
            for side in (_USERS, _ITEMS)
        ]
        if not all(sides):
            raise CheckpointError("kept weights must be of users and of items, got one side; train them again")
        return cls(*sides)

    def content_hash(self) -> str:
        """Return the sha256 (hex) over names and values."""
        return weights_hash(self.to_tensors())


@dataclass(frozen=True)
class Trial:
    """What a method is given."""

    method: str
    settings: dict[str, Any]  # its own settings, in place of its defaults
    data: Interactions
    split: LeaveOneOut  # its `training_users` may be few, or nobody
    load_base: Callable[[], BaseModel]  # loads the language model, for methods that need one
    arguments: LaserArguments  # the run's settings; `output_dir` is the trial's folder, `seed` its seed
    shared: Path  # a folder for what several trials use: frozen recommenders, states of the items' texts
    device: torch.device
    start: KeptWeights | None = None  # the weights of another trial to start from; None starts anew
    keeps_weights: bool = False  # return the trained weights, for other trials to start from

    @property
    def is_trained(self) -> bool:
        """Whether there is anybody to train on."""
        return self.split.training_users is None or bool(self.split.training_users)

    @property
    def drawn(self) -> str | None:
        """A hash of the users that are trained on; None where that is all of them."""
        users = self.split.training_users
        return None if users is None else digest(sorted(users))

    @property
    def folder(self) -> Path:
        """The trial's own folder."""
        return Path(self.arguments.output_dir)

    @property
    def num_items(self) -> int:
        """I."""
        return len(self.data.items)

    def only(self, *names: str) -> dict[str, Any]:
        """Return the settings, or raise `ConfigurationError` where one is not among the names."""
        unknown = sorted(set(self.settings) - set(names))
        if unknown:
            raise ConfigurationError(
                f"settings of {self.method} must be among {', '.join(names) or '(none)'}, got {', '.join(unknown)}"
            )
        return dict(self.settings)


@dataclass(frozen=True)
class TrialResult(Generic[ReportT]):
    """What a method gives."""

    report: ReportT  # every test user's rank, or answer, in the split's order
    valid: dict[str, Any] | None  # validation metrics of the weights that were chosen; None where nothing is
    trainable_parameters: int  # 0 for methods that count
    adapter_bytes: int  # what has to be kept beside the language model
    # `training`, `encoding` (of `items`), `user` (from history to ranked catalog) or `answering`, as `Meter` has them
    phases: dict[str, dict[str, Any]]
    # `epochs`, `updates`, `rows` and `tokens` that training ran over, None where there are none
    trained: dict[str, Any]
    details: dict[str, Any]  # whatever else describes the run, as JSON values
    weights: KeptWeights | None = None  # where the trial `keeps_weights`

    def to_values(self) -> dict[str, Any]:
        """Return what a cell keeps of it beside report and weights."""
        return {name: value for name, value in vars(self).items() if name not in ("report", "weights")}


Run = Callable[[Trial], TrialResult[RankingReport]]


@dataclass(frozen=True)
class Method:
    """A method of the comparison."""

    run: Run  # trains and evaluates it
    is_ours: bool = False  # whether it is what others are the baselines of
    is_random: bool = True  # whether a seed changes anything
    uses_language_model: bool = False  # whether the language model has a part in it
    arguments: tuple[str, ...] = ()  # the fields of `LaserArguments` that decide its result
    takes_share: bool = False  # whether it trains on no more than the split's `training_users`
    takes_start: bool = False  # whether it starts from another trial's weights, and then needs nobody to train on


METHODS: dict[str, Method] = {}


def register_method(name: str, **properties: Any) -> Callable[[Run], Run]:
    """Make a function a method, by its name in files; `properties` are the other fields of `Method`."""

    def register(run: Run) -> Run:
        METHODS[name] = Method(run, **properties)
        return run

    return register
